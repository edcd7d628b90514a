"""``python -m awaitly_postgres`` and the command ``awaitly-postgres``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; if it is not installed, exit with a message that says how."""
    try:
        from .cli import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("click", "rich"):
            raise
        sys.exit("the command line is not installed; pip install 'awaitly-postgres[cli]'")
    cli(prog_name="awaitly-postgres")


if __name__ == "__main__":
    main()
