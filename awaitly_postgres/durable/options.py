"""The options that all runs of one `Durable` share."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from attrs import define, field

from .._checks import OnDrift, check_limit, check_on_drift, check_ttl
from ..store.database import Database
from ..store.lease import DEFAULT_TTL
from ..store.statements import Statements
from ..store.store import SnapshotStore
from ..store.transaction import OpenTransaction
from ..workflow.codec import Codec, encode
from ..workflow.event import OnEvent
from .pending import Backoff
from .registry import Registry


def _check_lock_ttl(ttl: float) -> float:
    return check_ttl(ttl, "lock_ttl")


@define(eq=False, slots=False)
class Options:
    """The checked options of a `Durable` (documented there), and its registered functions."""

    store: SnapshotStore
    lock_ttl: float = field(default=DEFAULT_TTL, kw_only=True, converter=_check_lock_ttl)
    codec: Codec | None = field(default=None, kw_only=True)
    on_event: OnEvent | None = field(default=None, kw_only=True)
    on_complete: Literal["keep", "delete"] = field(default="keep", kw_only=True)
    on_drift: OnDrift = field(default="error", kw_only=True)
    max_attempts: int | None = field(default=100, kw_only=True)
    backoff: Backoff | None = field(default=None, kw_only=True)
    metadata: Mapping[str, Any] = field(factory=dict, kw_only=True)
    transaction: OpenTransaction | None = field(default=None, kw_only=True)
    # When a run is accepted for, from `with_options`: seconds from then, or a time.
    _delay: float | None = field(default=None, init=False, repr=False)
    _at: datetime | None = field(default=None, init=False, repr=False)
    _workflows: Registry = field(factory=Registry, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.store, SnapshotStore):
            raise TypeError(
                f"store must be a SnapshotStore, as postgres() returns it, not {self.store!r:.80}"
            )
        check_on_drift(self.on_drift)
        if self.on_complete not in ("keep", "delete"):
            raise ValueError(f"on_complete must be 'keep' or 'delete', not {self.on_complete!r}")
        check_retry_options(self.max_attempts, self.backoff)
        check_metadata(self.metadata)
        for name in ("on_event", "transaction"):
            if (option := getattr(self, name)) is not None and not callable(option):
                raise TypeError(f"{name} must be a function, not {option!r:.80}")
        methods = [getattr(self.codec, name, None) for name in ("encode", "decode")]
        if self.codec is not None and not all(map(callable, methods)):
            raise TypeError(
                f"codec must be an object with encode() and decode(), not {self.codec!r:.80}"
            )

    @property
    def _db(self) -> Database:
        return self.store._db

    @property
    def _sql(self) -> Statements:
        return self.store._sql


def check_metadata(metadata: object) -> str:
    """Return the user's metadata as JSON text; raise unless they are a mapping of JSON values."""
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping, not {metadata!r:.80}")
    return encode(None, dict(metadata), "metadata=")


def check_retry_options(max_attempts: int | None, backoff: object) -> None:
    """Raise unless these can decide which failures are final."""
    if max_attempts is not None:
        check_limit(max_attempts, "max_attempts")
    if backoff is not None and not callable(backoff):
        raise TypeError(f"backoff must be a function of the error and the attempt, not {backoff!r}")
