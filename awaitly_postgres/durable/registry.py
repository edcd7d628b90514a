"""The registered workflow functions and their names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Literal

from attrs import evolve, frozen

from .. import _json
from ..errors import VersionMismatch, WorkflowConflict
from ..snapshot import WorkflowSnapshot
from ..store.rows import is_input
from ..workflow.codec import Codec, encode
from ..workflow.workflow import name_of, stored_version
from .pending import Backoff

OnVersionMismatch = Literal["error", "clear"] | Callable[[WorkflowSnapshot, int], WorkflowSnapshot]


@frozen
class Entry:
    """A workflow function with its name, its version, and the rules for its runs.

    Without its own ``max_attempts`` (``...``) or ``backoff``, those of the `Durable` apply.
    """

    name: str
    fn: Callable[..., Any]
    version: int = 1
    on_version_mismatch: OnVersionMismatch = "error"
    max_attempts: int | EllipsisType | None = ...
    backoff: Backoff | None = None

    def max_attempts_or(self, default: int | None) -> int | None:
        """Return its ``max_attempts``, or the default where it has none."""
        own = self.max_attempts
        return default if isinstance(own, EllipsisType) else own

    def encode_call(
        self, id: str, codec: Codec | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> str:
        """Return the arguments as JSON text; raise TypeError if the function does not take them."""
        self.check_call(args, kwargs, f", run {id!r}")
        return encode(codec, {"args": list(args), "kwargs": dict(kwargs)}, f"the input of {id!r}")

    def check_call(self, args: Sequence[Any], kwargs: Mapping[str, Any], of: str = "") -> None:
        """Raise TypeError, as a call would, if the function does not take these arguments."""
        if (signature := _signature(self.fn)) is not None:
            try:
                signature.bind(None, *args, **kwargs)  # None stands for the step
            except TypeError as error:
                raise TypeError(f"workflow {self.name!r}{of}: {error}") from None

    def check_function(self) -> None:
        """Raise TypeError if the function cannot be a workflow."""
        fn = self.fn
        if not callable(fn):
            raise TypeError(f"the workflow must be a function, not {fn!r}")
        if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(
                f"workflow {self.name!r} is async, but workflows are blocking functions; make it "
                "a plain def, and call asyncio.run() inside a step"
            )
        if inspect.isgeneratorfunction(fn):
            raise TypeError(
                f"workflow {self.name!r} is a generator, which only runs while somebody iterates "
                "over it; return a list instead of using yield"
            )
        if (signature := _signature(fn)) is not None:
            try:
                signature.bind_partial(None)
            except TypeError:
                raise TypeError(
                    f"workflow {self.name!r} takes no positional argument, but is called with a "
                    "Step as its first"
                ) from None

    def check_identity(self, id: str, metadata: Mapping[str, Any], input: str) -> None:
        """Raise `WorkflowConflict` if what is stored belongs to another workflow or input.

        Args:
            id: the id of the run.
            metadata: the metadata of the stored snapshot.
            input: the input of this call, as JSON text.
        """
        name = metadata.get("workflow", self.name)
        if name != self.name:
            raise WorkflowConflict(id, "workflow", repr(name), repr(self.name))
        # An input of another shape was written by Node; there is nothing to compare it with.
        if is_input(metadata.get("input")):
            theirs = _json.canonical(_json.dumps(metadata["input"]))
            ours = _json.canonical(input)
            if theirs != ours:
                shown = [_json.shorten(text, 200) for text in (theirs, ours)]
                raise WorkflowConflict(id, "input", *shown)

    def check_version(self, id: str, stored: WorkflowSnapshot) -> None:
        """Raise `VersionMismatch` if ``stored`` has another version, which is an error here."""
        version = stored_version(stored.metadata or {})
        if version != self.version and self.on_version_mismatch == "error":
            raise VersionMismatch(id, version, self.version)

    def at_its_version(self, id: str, stored: WorkflowSnapshot) -> WorkflowSnapshot | None:
        """Return the state to continue from, migrated if need be; None to start afresh."""
        if stored_version(stored.metadata or {}) == self.version:
            return stored
        migrate = self.on_version_mismatch
        if not callable(migrate):
            self.check_version(id, stored)
            return None  # "clear"
        migrated = migrate(stored, self.version)
        if isinstance(migrated, Mapping):
            migrated = WorkflowSnapshot.from_json(migrated)
        if not isinstance(migrated, WorkflowSnapshot):
            raise TypeError(
                f"on_version_mismatch of {self.name!r} must return a WorkflowSnapshot, "
                f"not {type(migrated).__name__}"
            )
        return evolve(migrated, metadata={**(migrated.metadata or {}), "version": self.version})


class Registry(dict[str, Entry]):
    """The workflow functions of one `Durable`, by name."""

    def add(self, entry: Entry) -> None:
        """Register a function; raise ValueError if another one has its name."""
        self[entry.name] = self._checked(entry)

    def of(self, fn: Callable[..., Any]) -> Entry:
        """Return the entry ``fn`` is registered as, or a new one that is not registered."""
        for entry in self.values():
            if entry.fn == fn:  # not `is`: each access to a bound method makes a new object
                return entry
        # Its runs would be resumed with the function that is registered under its name.
        return self._checked(Entry(name_of(fn), fn))

    def _checked(self, entry: Entry) -> Entry:
        entry.check_function()
        known = self.get(entry.name)
        # The same function defined again, in the same module, is a reload: it replaces the old one.
        if known is not None and _place(known.fn) != _place(entry.fn):
            raise ValueError(
                f"{_place(known.fn)} is already registered as {entry.name!r}; "
                f"give {_place(entry.fn)} another name="
            )
        return entry


@functools.lru_cache(maxsize=256)
def _signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):  # a built-in that has no signature to inspect
        return None


def _place(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', name_of(fn))}"
