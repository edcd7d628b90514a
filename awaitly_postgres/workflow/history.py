"""The recorded steps of a run: their order, and which of them this start has asked for.

No clock, no threads, no database: `Run` calls it with its lock held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from attrs import define, field

from .._checks import as_count
from ..snapshot import Steps, WorkflowSnapshot, as_mapping

Recorded = Mapping[str, Any]  # a step, decoded: nobody else has this value


@define(eq=False, repr=False)
class History:
    """The recorded steps of one run, and how far this start has got through them.

    A failed step is *settled* once the workflow's own thread has moved on to something later, or
    the run has completed; until then it is *open*. Open failures are retried: `of` drops them.

    Attributes:
        steps: the JSON text of every recorded step by key, of earlier starts and of this one.
        waits: the keys this start is suspended on: until a time, or None for a signal.
        sleeps: when each sleep that has begun will end, by key; kept across starts.
        deadlines: the same of waits with a timeout.
        last_key: the step recorded last.
    """

    steps: dict[str, str] = field(factory=dict)
    waits: dict[str, str | None] = field(factory=dict)
    sleeps: dict[str, str] = field(factory=dict)
    deadlines: dict[str, str] = field(factory=dict)
    last_key: str | None = None
    has_left_out: bool = False  # open failures were dropped, so the stored snapshot is outdated
    key_generation: int = 0  # how often it was rewound with new idempotency keys
    _settled: int = -1  # all failures up to this number, by steps or waits of the own thread
    _in_order: list[str] = field(factory=list)  # recorded by the own thread, not yet asked for
    _unnumbered: set[str] = field(factory=set)  # ... by Node, which keeps no order
    _parallel: set[str] = field(factory=set)  # ... by other threads, and a map's but for its first
    _maps: dict[str, tuple[int, set[str]]] = field(factory=dict)  # by key: item count, recorded
    _recorded: dict[str, Recorded] = field(factory=dict)  # by earlier starts, not yet asked for
    _asked: set[str] = field(factory=set)
    _seq: int = 0  # the number of the last recorded step
    _gone_on_after: int = 0  # the last number when the own thread last asked for a new step

    @classmethod
    def of(cls, snapshot: WorkflowSnapshot) -> History:
        """Return the history of an earlier start's snapshot, without its open failures."""
        steps = cast(Steps, snapshot.steps)
        recorded = steps.to_json()
        metadata = snapshot.metadata or {}
        metas = {key: step.get("meta") or {} for key, step in recorded.items()}
        seqs = {key: as_count(meta.get("seq")) for key, meta in metas.items()}
        history = cls()
        history.key_generation = as_count(metadata.get("keyGeneration"))
        if "settled" in metadata:
            history._settled = as_count(metadata["settled"])
        settled = max(history._settled, _own_thread_went_on_after(metas, seqs))
        # Kept, because the step that settled them may be open itself, and leave the record.
        history._settled = settled
        # Node does not number its steps, but it stores the key of the last one.
        last_of_node = str(metadata.get("lastStepKey"))
        completed = snapshot.execution.status == "completed"
        replayed = [
            key
            for key, step in recorded.items()
            if step["ok"]
            or completed
            or seqs[key] <= settled
            or metas[key].get("timedOut")  # final: signals sent since were refused
            or (not seqs[key] and last_of_node != key and last_of_node in recorded)
        ]
        history.has_left_out = len(replayed) < len(recorded)
        history.steps = {key: steps.text(key) for key in replayed}
        history._recorded = {key: recorded[key] for key in replayed}
        history._seq = max(settled, *seqs.values(), 0)  # new steps come after what is settled
        if any(seqs.values()):
            history.last_key = max(seqs, key=seqs.__getitem__)
        history._note_maps(replayed, metas, seqs)
        history._unnumbered = {key for key in replayed if not seqs[key]} - history._parallel
        in_order = [key for key in replayed if seqs[key] and key not in history._parallel]
        in_order.sort(key=seqs.__getitem__)
        history._in_order = in_order[::-1]  # reversed: the next one is popped off the end
        times = {name: as_mapping(metadata.get(name)) for name in ("deadlines", "waits", "sleeps")}
        for name, ends in times.items():
            kept = history.deadlines if name == "deadlines" else history.sleeps
            known = {**history.steps, **history.deadlines}
            kept |= {k: end for k, end in ends.items() if isinstance(end, str) and k not in known}
        return history

    def _note_maps(
        self,
        replayed: Sequence[str],
        metas: Mapping[str, Mapping[str, Any]],
        seqs: Mapping[str, int],
    ) -> None:
        """Note which steps can be asked for in any order, and which belong to maps.

        A map has the place of the first of its steps in the order of the own thread.
        """
        self._parallel = {key for key in replayed if metas[key].get("parallel")}
        firsts: dict[str, str] = {}
        for key in replayed:
            if not isinstance(name := metas[key].get("map"), str):
                continue
            count, keys = self._maps.get(name) or (as_count(metas[key].get("of")), set())
            self._maps[name] = count, keys
            keys.add(key)
            if key not in self._parallel and seqs[key]:
                first = firsts.setdefault(name, key)
                if seqs[key] < seqs[first]:
                    firsts[name] = key
        for name, first in firsts.items():
            self._parallel |= self._maps[name][1] - {first}

    # -- asking ----------------------------------------------------------------------------

    def asked_twice(self, keys: Sequence[str]) -> str | None:
        """Return the first of ``keys`` that this start has asked for already, or None."""
        seen: set[str] = set()
        for key in keys:
            if key in self._asked or key in seen:
                return key
            seen.add(key)
        return None

    def is_in_turn(self, key: str) -> bool:
        """Return whether the workflow's own thread may ask for ``key`` now.

        It must ask for its recorded steps in their order, and for all of them before anything new.
        Steps recorded by Node, which keeps no order, or by other threads may come in any order.
        """
        if key in self._parallel or key in self._unnumbered:
            return True
        if self._in_order:
            return self._in_order[-1] == key
        return not self._unnumbered

    def is_map_in_turn(self, keys: Sequence[str]) -> bool:
        """Return the same for a map with these ``keys``."""
        if self._in_order and self._in_order[-1] in set(keys):
            return True
        if all(key in self._parallel or key in self._unnumbered for key in keys):
            return True  # recorded by the user's own threads, or the map is empty
        return not self._in_order and self._unnumbered.issubset(keys)

    def change_of_map(
        self, key: str, keys: Sequence[str]
    ) -> tuple[list[str], tuple[int, int]] | None:
        """Return how a map differs from its record: the missing keys, and both item counts."""
        count, recorded = self._maps.get(key) or (len(keys), set())
        if lacking := sorted(recorded.difference(keys)):
            return lacking, (count, len(keys))
        return None if count in (0, len(keys)) else ([], (count, len(keys)))

    def ask_map(self, key: str, keys: Sequence[str], own: bool) -> list[Recorded | None]:
        """Return each step of a map as it was recorded, None where it is new."""
        self._asked.add(key)
        self._asked.update(keys)
        if not (asked := set(keys)).isdisjoint(self._in_order):
            self._in_order = [k for k in self._in_order if k not in asked]
        self._parallel -= asked
        self._unnumbered -= asked
        recorded = [self._recorded.pop(k, None) for k in keys]
        if own and None in recorded:
            self._gone_on_after = self._seq
        return recorded

    def ask(self, key: str, own: bool) -> Recorded | None:
        """Return the step as it was recorded, or None if it is new. It can be asked for once.

        ``own`` says whether the workflow's own thread asks.
        """
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
            self._in_order.remove(key)  # another thread asks for it, or drift is ignored
        return self._recorded.pop(key)

    def unreached(self) -> list[str]:
        """Return the recorded steps that this start has not asked for, the next one first."""
        return [*self._in_order[::-1], *sorted(self._unnumbered | self._parallel)]

    # -- recording -------------------------------------------------------------------------

    def next_meta(self, timing: dict[str, Any], own: bool) -> dict[str, Any]:
        """Return ``timing`` with the number of the next step, for its ``meta``."""
        before = self._seq
        self._seq += 1
        meta = {**timing, "seq": self._seq}
        if not own:
            return {**meta, "parallel": True}
        # "after" is needed if other threads recorded steps while this one ran: it does not settle
        # their failures, although their numbers are lower.
        return meta if self._gone_on_after == before else {**meta, "after": self._gone_on_after}

    def add(self, key: str, step: str) -> str:
        """Add a step of this start; return ``step``, its JSON text."""
        self.steps[key] = step
        self.waits.pop(key, None)
        self.sleeps.pop(key, None)
        self.deadlines.pop(key, None)
        self.last_key = key
        return step

    def forget(self, key: str) -> None:
        """Remove a step that was entered but not stored."""
        self.steps.pop(key, None)

    def begin_sleep(self, key: str, otherwise: str) -> str:
        """Return when a sleep ends, fixed when it was first reached."""
        self.deadlines.pop(key, None)  # the code had a wait there before
        return self.sleeps.setdefault(key, otherwise)

    def begin_wait(self, key: str, otherwise: str) -> str:
        """Return when a wait times out, fixed when it was first reached."""
        self.sleeps.pop(key, None)  # as above, the other way round
        return self.deadlines.setdefault(key, otherwise)

    def suspend(self, key: str, due: str | None, own: bool) -> None:
        """Note that the run is suspended on ``key``, until ``due`` or (None) for a signal."""
        self.waits[key] = due
        if due is None:
            self.deadlines.pop(key, None)  # the code had a timeout there before
        if own:
            self._settled = self._gone_on_after  # waiting counts as moving on: it settles failures

    def unfinished_metadata(self, suspended: bool) -> dict[str, Any]:
        """Return the waits, sleeps and settled failures of an unfinished run, for its metadata.

        Other threads may begin sleeps and waits meanwhile. Copying a dict is atomic, iterating over
        it is not.
        """
        found: dict[str, Any] = {}
        waits = dict(self.waits) if suspended else {}
        if suspended:
            found["waits"] = waits
        if sleeps := {key: end for key, end in dict(self.sleeps).items() if key not in waits}:
            found["sleeps"] = sleeps
        if deadlines := dict(self.deadlines):
            found["deadlines"] = deadlines
        if self._settled >= 0:
            found["settled"] = self._settled
        return found


def _own_thread_went_on_after(
    metas: Mapping[str, Mapping[str, Any]], seqs: Mapping[str, int]
) -> int:
    """Return the number of the last step recorded before the own thread asked for its last one.

    When the own thread asked for a step, all steps with lower numbers had been recorded, unless its
    ``after`` says otherwise: the steps after that number were recorded by other threads meanwhile.
    """
    own = [key for key, seq in seqs.items() if seq and not metas[key].get("parallel")]
    return max(
        (min(as_count(metas[key].get("after", seqs[key])), seqs[key] - 1) for key in own),
        default=-1,
    )
