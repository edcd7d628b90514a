"""Ids, names, limits and times, checked in one place."""

from __future__ import annotations

import re
import typing
from datetime import datetime, timedelta, timezone
from typing import Literal

from .errors import WrongType
from .snapshot import STATUSES

OnDrift = Literal["error", "ignore"]

MAX_NAME = 48  # PostgreSQL cuts names at 63 bytes; suffixes take up to 15 (_updated_at_idx)
MAX_ID = 1000  # bytes; an id and a step key share one B-tree entry of at most 2,704


def check_name(name: object, what: str) -> str:
    """Return ``name`` if it is allowed as the name of a table or schema, else raise ValueError."""
    if not isinstance(name, str):
        raise WrongType(f"{what} must be a string, not {type(name).__name__}")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII) or len(name) > MAX_NAME:
        raise ValueError(
            f"{what} {name!r} must be letters, digits and underscores, not start with a digit, "
            f"and have at most {MAX_NAME} characters"
        )
    return name


def check_id(id: object, what: str = "id", room: int = 0) -> str:
    """Return ``id`` if it can be a key in the tables, else raise ValueError.

    ``room`` is how many of the `MAX_ID` bytes a prefix takes.
    """
    if not isinstance(id, str):
        raise WrongType(f"{what} must be a string, not {type(id).__name__}")
    if not id:
        raise ValueError(f"{what} must not be empty")
    if "\0" in id:
        raise ValueError(f"{what} {id!r} contains a NUL character")
    try:
        size = len(id.encode()) + room
    except UnicodeEncodeError:
        raise ValueError(f"{what} {id!r} contains a lone surrogate") from None
    if size > MAX_ID:
        raise ValueError(f"{what} {id[:40]!r}… is {size:,} bytes long, but {MAX_ID:,} is the limit")
    return str(id)


def check_limit(limit: int, name: str = "limit") -> int:
    """Return ``limit`` if it is a positive integer of 64 bits, else raise ValueError."""
    if not isinstance(limit, int) or isinstance(limit, bool) or not 0 < limit < 2**63:
        raise ValueError(f"{name} must be a positive integer below 2**63, not {limit!r}")
    return limit


def check_status(status: str | None) -> str | None:
    """Return ``status`` if it is one of `STATUSES` or None, else raise ValueError."""
    if status is not None and status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {status!r}")
    return status


def check_ttl(ttl: float, name: str = "ttl") -> float:
    """Return ``ttl``, in seconds, if it is positive and below 10**9, else raise ValueError."""
    try:
        fits = 0 < ttl < 10**9
    except TypeError:
        raise TypeError(f"{name} must be in seconds, not {type(ttl).__name__}") from None
    if not fits:
        raise ValueError(f"{name} must be more than 0 and less than 10**9 seconds, not {ttl!r}")
    return float(ttl)


def check_seconds(duration: float | timedelta, name: str = "duration") -> float:
    """Return a duration in seconds if it is at least 0 and below 10**9, else raise ValueError."""
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    try:
        fits = not isinstance(seconds, bool) and 0 <= seconds < 10**9
    except TypeError:
        kind = type(seconds).__name__
        raise TypeError(f"{name} must be in seconds or a timedelta, not {kind}") from None
    if not fits:
        raise ValueError(f"{name} must be from 0 to less than 10**9 seconds, not {duration!r}")
    return float(seconds)


def check_moment(time: datetime, name: str) -> datetime:
    """Return ``time`` in UTC; raise if it is naive, or out of range in UTC."""
    if not isinstance(time, datetime):
        raise TypeError(f"{name} must be a datetime, not {type(time).__name__}")
    if time.utcoffset() is None:
        raise ValueError(f"{name} must be an aware datetime; {time!r} has no time zone")
    try:
        return time.astimezone(timezone.utc)
    except OverflowError:
        raise ValueError(f"{name} {time!r} is out of range in UTC") from None


def check_on_drift(on_drift: str) -> None:
    """Raise ValueError unless ``on_drift`` is ``"error"`` or ``"ignore"``."""
    if on_drift not in typing.get_args(OnDrift):
        raise ValueError(f"on_drift must be 'error' or 'ignore', not {on_drift!r}")


def moment(text: str | None) -> datetime:
    """Parse a time that the server returned; one beyond Python's range (infinity) is year 9999."""
    try:
        return datetime.fromisoformat(text or "")
    except ValueError:
        return datetime.fromisoformat("9999-12-31T23:59:59+00:00")


def as_count(value: object) -> int:
    """Return ``value`` if it is a positive integer, else 0: anyone can edit the metadata."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def read_time(text: object) -> datetime | None:
    """Parse a time of the snapshot format; return None for anything else that a row may hold."""
    if not isinstance(text, str):
        return None
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return time.astimezone(timezone.utc) if time.tzinfo else None
    except (ValueError, OverflowError):  # the latter: it is out of range in UTC
        return None
