"""The store at home in frameworks; each module needs the framework of its name."""
