"""What is recorded of a run, in which order, and what of it this start has asked for.

No clock, no threads, no database: `Run` calls it with its lock held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import define, field

from .. import _json
from ..snapshot import WorkflowSnapshot


@define(eq=False)
class History:
    """The recorded steps of one run, and its place among them.

    ``steps`` holds the JSON text of every recorded step by key, of earlier starts and of this one;
    ``waits`` what this start has asked for in vain: a time by key, or None for a signal;
    ``sleeps`` when the sleeps end that an earlier start has begun.

    A failed step is *settled* when the workflow's own thread has gone on to something later, or the
    run has completed; until then it is *open*. Open failures are tried again, so `of` leaves them
    out.
    """

    steps: dict[str, str] = field(factory=dict)
    waits: dict[str, str | None] = field(factory=dict)
    sleeps: dict[str, str] = field(factory=dict)
    last_key: str | None = None
    has_left_out: bool = False  # open failures, which the next document no longer has
    generation: int = 0  # how often it was rewound with new idempotency keys
    _settled: int = -1  # the number of the last failure that a wait of the own thread has settled
    _in_order: list[str] = field(factory=list)  # recorded by the own thread, not yet asked for
    _unnumbered: set[str] = field(factory=set)  # ... by Node, which keeps no order
    _parallel: set[str] = field(factory=set)  # ... by other threads
    _asked: set[str] = field(factory=set)
    _seq: int = 0  # the number of the last recorded step
    _gone_on_after: int = 0  # the last number there was when the own thread asked for new work

    @classmethod
    def of(cls, snapshot: WorkflowSnapshot) -> History:
        """Take over what an earlier start has recorded, but for open failures."""
        recorded = snapshot.to_json()["steps"]
        metadata = snapshot.metadata or {}
        metas = {key: step.get("meta") or {} for key, step in recorded.items()}
        seqs = {key: _positive(meta.get("seq")) for key, meta in metas.items()}
        history = cls()
        history.generation = _positive(metadata.get("generation"))
        if "settled" in metadata:
            history._settled = _positive(metadata["settled"])
        settled = max(history._settled, _own_thread_went_on_after(metas, seqs))
        # Node numbers nothing, but says which step was its last.
        last_of_node = str(metadata.get("lastStepKey"))
        completed = snapshot.execution.status == "completed"
        replayed = [
            key
            for key, step in recorded.items()
            if step["ok"]
            or completed
            or seqs[key] <= settled
            or (not seqs[key] and last_of_node != key and last_of_node in recorded)
        ]
        history.has_left_out = len(replayed) < len(recorded)
        history.steps = {key: _json.dumps(recorded[key]) for key in replayed}
        history._seq = max(seqs.values(), default=0)
        if history._seq:
            history.last_key = max(seqs, key=seqs.__getitem__)
        history._parallel = {key for key in replayed if metas[key].get("parallel")}
        history._unnumbered = {key for key in replayed if not seqs[key]} - history._parallel
        in_order = [key for key in replayed if seqs[key] and key not in history._parallel]
        in_order.sort(key=seqs.__getitem__)
        history._in_order = in_order[::-1]  # the next one is the last
        for name in ("waits", "sleeps"):
            if isinstance(ends := metadata.get(name), Mapping):
                history.sleeps |= {
                    key: end
                    for key, end in ends.items()
                    if isinstance(end, str) and key not in history.steps
                }
        return history

    # -- asking ----------------------------------------------------------------------------

    def has_been_asked(self, key: str) -> bool:
        """Tell whether this start has asked for ``key`` already."""
        return key in self._asked

    def is_in_turn(self, key: str) -> bool:
        """Tell whether the own thread may ask for ``key`` now.

        Its recorded steps come in their order, and all of them before anything new. Node's, which
        keeps no order, come in any; those of other threads are free.
        """
        if key in self._parallel or key in self._unnumbered:
            return True
        if self._in_order:
            return self._in_order[-1] == key
        return not self._unnumbered

    def ask(self, key: str, own: bool) -> str | None:
        """Return the recorded step, or None for one that is new; ``own``: by the own thread."""
        self._asked.add(key)
        if key not in self.steps:
            if own:
                self._gone_on_after = self._seq
            return None
        if self._in_order and self._in_order[-1] == key:
            self._in_order.pop()
        elif key in self._parallel or key in self._unnumbered:
            self._parallel.discard(key)
            self._unnumbered.discard(key)
        else:
            self._in_order.remove(key)  # asked for by another thread, or drift is ignored
        return self.steps[key]

    def unreached(self) -> list[str]:
        """Return the recorded steps that nobody has asked for, the next one first."""
        return [*self._in_order[::-1], *sorted(self._unnumbered | self._parallel)]

    # -- recording -------------------------------------------------------------------------

    def numbered(self, timing: dict[str, Any], own: bool) -> dict[str, Any]:
        """Return the ``meta`` of the next step, with its number."""
        before = self._seq
        self._seq += 1
        meta = {**timing, "seq": self._seq}
        if not own:
            return {**meta, "parallel": True}
        # Steps of other threads were recorded since this one was asked for.
        return meta if self._gone_on_after == before else {**meta, "after": self._gone_on_after}

    def add(self, key: str, step: str) -> str:
        """Add a step of this start, its JSON text."""
        self.steps[key] = step
        self.waits.pop(key, None)
        self.sleeps.pop(key, None)
        self.last_key = key
        return step

    def forget(self, key: str) -> None:
        """Take back a step that was rolled back."""
        self.steps.pop(key, None)

    def suspend(self, key: str, due: str | None, own: bool) -> None:
        """Note that ``key`` waits: until ``due``, or for a signal."""
        self.waits[key] = due
        if due is not None:
            self.sleeps[key] = due
        if own:
            self._settled = self._gone_on_after  # it has gone on, to wait

    def standing(self, suspended: bool) -> dict[str, Any]:
        """Return what the metadata of an unfinished run tell of waits and settled failures."""
        found: dict[str, Any] = {}
        if suspended:
            found["waits"] = self.waits
        if sleeps := {key: end for key, end in self.sleeps.items() if key not in self.waits}:
            found["sleeps"] = sleeps
        if self._settled >= 0:
            found["settled"] = self._settled
        return found


def _positive(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _own_thread_went_on_after(
    metas: Mapping[str, Mapping[str, Any]], seqs: Mapping[str, int]
) -> int:
    """Return the last number that was given before the own thread asked for its last recorded step.

    A step of the own thread was asked for when all before it had been recorded, unless it says
    otherwise: that steps of other threads were recorded while it ran.
    """
    own = [key for key, seq in seqs.items() if seq and not metas[key].get("parallel")]
    return max(
        (min(_positive(metas[key].get("after", seqs[key])), seqs[key] - 1) for key in own),
        default=-1,
    )
