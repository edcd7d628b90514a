"""What a run has stored so far, and whether its next step is appended or rewrites the snapshot."""

from __future__ import annotations

from attrs import evolve, frozen

# Both in characters. PostgreSQL moves rows larger than MAX_INLINE to its TOAST table, and rewriting
# them there costs more than appending a step. Folding less than MIN_FOLDED is not worth it.
MAX_INLINE, MIN_FOLDED = 2 * 1024, 8 * 1024


@frozen
class Written:
    """What a run is known to have stored so far.

    Each write of the snapshot has a number, which it puts into the lease's token. A step appended
    to the journal has no number, so the next write checks for the step's key instead.
    """

    number: int = 0  # of the last write of the snapshot known to have succeeded
    tried: int = 0  # of the last one sent: greater than number while its outcome is unknown
    size: int = 0  # characters in the snapshot as of that write
    appended: int = 0  # characters appended to the journal since
    last_appended: str | None = None  # the key of the last step appended since
    journal_is_empty: bool = False
    is_outdated: bool = False  # the stored snapshot has steps that this start has dropped
    has_progressed: bool = False  # this start has recorded a step that succeeded

    @property
    def must_be_rewritten(self) -> bool:
        """Whether the snapshot must be rewritten before another step can be appended.

        A rewrite whose reply was lost could still arrive after the append, and erase the step.
        """
        return self.is_outdated or self.tried > self.number

    def takes_appended(self, size: int) -> bool:
        """Return whether to append a step of ``size`` characters to the journal.

        A small snapshot is rewritten whole with each step, so that one table holds everything. For
        a larger one that would take quadratic time, so steps are appended to the journal until it
        has grown as large as the snapshot; then one rewrite folds it in.
        """
        grown = self.appended + size
        small = self.size + grown <= MAX_INLINE
        due = grown >= max(MIN_FOLDED, self.size)
        return not (small or due or self.must_be_rewritten)

    def trying_append(self) -> Written:
        """Return the state during an append: the journal may already have the step."""
        return evolve(self, journal_is_empty=False) if self.journal_is_empty else self

    def after_append(self, key: str, size: int) -> Written:
        """Return the state after an append of ``size`` characters has succeeded."""
        return Written(
            self.number,
            self.tried,
            self.size,
            self.appended + size,
            key,
            has_progressed=self.has_progressed,
        )

    def trying_rewrite(self) -> Written:
        """Return the state while a rewrite of the snapshot is in progress."""
        return evolve(self, tried=self.tried + 1)

    def after_rewrite(self, size: int) -> Written:
        """Return the state after the last rewrite, which folded the journal, has succeeded."""
        return Written(
            self.tried,
            self.tried,
            size,
            journal_is_empty=True,
            has_progressed=self.has_progressed,
        )
