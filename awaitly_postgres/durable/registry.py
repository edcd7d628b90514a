"""Which workflow functions are known, and under which names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Literal

from attrs import frozen

from ..snapshot import WorkflowSnapshot
from ..workflow.workflow import name_of
from .pending import Backoff

OnVersionMismatch = Literal["error", "clear"] | Callable[[WorkflowSnapshot, int], WorkflowSnapshot]


@frozen
class Entry:
    """A workflow function under its name, with the rules for its runs.

    Where it says nothing of ``max_attempts`` (``...``) or ``backoff``, those of the `Durable` hold.
    """

    name: str
    fn: Callable[..., Any]
    version: int = 1
    on_version_mismatch: OnVersionMismatch = "error"
    max_attempts: int | EllipsisType | None = ...
    backoff: Backoff | None = None

    def check_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError, as the call itself would, if the function does not take these."""
        if (signature := _signature(self.fn)) is not None:
            signature.bind(None, *args, **kwargs)  # None stands for the step


class Registry(dict[str, Entry]):
    """The workflow functions of one `Durable`, by name."""

    def add(self, entry: Entry) -> None:
        """Register a function; raise ValueError if its name is another's."""
        known = self.get(entry.name)
        # The same place in the source again is a reloaded module.
        if known is not None and _place(known.fn) != _place(entry.fn):
            raise ValueError(
                f"{_place(known.fn)} is registered as {entry.name!r} already; "
                f"give {_place(entry.fn)} another name="
            )
        self[entry.name] = entry

    def of(self, fn: Callable[..., Any]) -> Entry:
        """Return what ``fn`` is registered as, or an entry that is not registered."""
        if not callable(fn):
            raise TypeError(f"the workflow must be a function, not {fn!r}")
        for entry in self.values():
            if entry.fn == fn:  # a bound method is another object each time
                return entry
        return Entry(name_of(fn), fn)


@functools.lru_cache(maxsize=256)
def _signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):  # something built in that does not tell
        return None


def _place(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', name_of(fn))}"
