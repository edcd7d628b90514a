"""When a step is appended to the journal and when the snapshot is rewritten, without a database."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from awaitly_postgres.durable.written import MAX_INLINE, MIN_FOLDED, Written

SIZES = st.integers(1, 3 * MIN_FOLDED)


def written(size: int) -> Written:
    """What a run has stored whose snapshot has so many characters."""
    return Written(size=size, journal_is_empty=True)


def test_a_snapshot_that_fits_into_its_row_is_rewritten() -> None:
    """For anybody to read in one table."""
    assert not written(300).takes_appended(MAX_INLINE - 300)
    assert written(300).takes_appended(MAX_INLINE - 299)


def test_the_journal_is_folded_when_it_has_grown_as_large_as_the_snapshot() -> None:
    """So that all rewriting together stays linear."""
    large = written(2 * MIN_FOLDED).after_append("a", 2 * MIN_FOLDED - 101)
    assert large.takes_appended(100)
    assert not large.takes_appended(101)


def test_a_small_journal_is_not_worth_folding() -> None:
    """Though the snapshot is smaller still."""
    assert written(MAX_INLINE).after_append("a", MAX_INLINE).takes_appended(1)


def test_nothing_is_appended_while_a_rewrite_is_in_doubt() -> None:
    """It could land after the step, and erase it."""
    state = written(MAX_INLINE)
    assert state.takes_appended(100)
    assert not state.trying_rewrite().takes_appended(100)
    assert state.trying_rewrite().after_rewrite(MAX_INLINE).takes_appended(100)


def test_a_rewrite_forgets_neither_its_number_nor_the_progress() -> None:
    """But what was appended, which it has folded in."""
    before = Written(3, 5, 100, 50, "a", has_progressed=True)
    assert before.trying_rewrite().after_rewrite(700) == Written(
        6, 6, 700, journal_is_empty=True, has_progressed=True
    )


@given(first=SIZES, steps=st.lists(SIZES, min_size=1, max_size=60))
def test_what_is_rewritten_stays_within_three_times_what_is_recorded(
    first: int, steps: list[int]
) -> None:
    """Whatever the sizes, beyond the small snapshots that fit into their row."""
    state, total, rewritten = written(first), first, 0
    for nr, size in enumerate(steps):
        total += size
        if state.takes_appended(size):
            state = state.trying_append().after_append(str(nr), size)
        else:
            state = state.trying_rewrite().after_rewrite(total)
            rewritten += total if total > MAX_INLINE else 0
    assert rewritten <= 3 * total
