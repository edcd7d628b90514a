"""Anybody's text, made safe for a terminal."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """Escape what a terminal would obey instead of show: ids and messages are anybody's text."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
