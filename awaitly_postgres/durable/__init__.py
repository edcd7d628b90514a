"""Joins the two: workflows whose steps are recorded in the store."""
