"""Read-only admin pages: the list of workflows, and the timeline of one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from attrs import frozen
from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import PermissionDenied
from django.db.models import BooleanField
from django.db.models.expressions import RawSQL
from django.http import Http404
from django.template.response import TemplateResponse
from django.utils.html import format_html
from django.utils.timesince import timesince

from ... import SnapshotFormatError, postgres
from ...store.rows import RunInfo, StepInfo, elide, elide_steps, reasons, steps_of
from . import connection
from .models import Workflow

_store = postgres("", auto_create_table=False)  # works on Django's connections; opens none itself

_HELD = (
    "EXISTS (SELECT FROM awaitly_workflow_lock l WHERE l.workflow_id = awaitly_snapshots.id "
    "AND l.expires_at > clock_timestamp())"
)
_STATUS = "(awaitly_snapshots.snapshot->'execution'->>'status')"
_PENDING = f"NULLIF({_STATUS} = 'completed', false) IS NULL"  # as in the partial index
_FILTERS = {
    "running": f"{_PENDING} AND {_HELD}",
    "pending": f"{_PENDING} AND NOT {_HELD} AND {_STATUS} IS DISTINCT FROM 'failed'",
    "failed": f"{_PENDING} AND NOT {_HELD} AND {_STATUS} = 'failed'",
    "completed": f"{_STATUS} = 'completed'",
}
_MANY = 500  # steps; a longer timeline leaves some out
_MOST_TEXT = 5_000  # characters of one value


@frozen
class Bar:
    """One step of the timeline; ``left`` and ``width`` are in per cent of the whole.

    ``hidden`` is the number of steps left out before it.
    """

    step: StepInfo
    duration: str
    left: str
    width: str
    value: str
    hidden: int


class _List(ChangeList):
    """Reads the state of all workflows on the page in one statement."""

    result_list: Any

    def get_results(self, request: Any) -> None:
        super().get_results(request)
        ids = [workflow.id for workflow in self.result_list]
        rows = _store.details(ids, conn=connection(self.root_queryset.db))
        found = {row.id: row for row in rows}
        # A workflow deleted between the two statements is left out of the page.
        self.result_list = [w for w in self.result_list if w.id in found]
        for workflow in self.result_list:
            workflow.row = found[workflow.id]


class _StateFilter(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, name.capitalize()) for name in _FILTERS]

    def queryset(self, request: Any, queryset: Any) -> Any:
        condition = _FILTERS.get(self.value() or "")
        if condition is None:
            return queryset
        return queryset.filter(RawSQL(condition, (), output_field=BooleanField()))  # noqa: S611


@admin.register(Workflow)
class WorkflowAdmin(admin.ModelAdmin):
    """Shows workflows; nothing here changes them."""

    list_display = ("id", "workflow", "steps", "age", "state")
    list_filter = (_StateFilter,)
    search_fields = ("id",)
    show_full_result_count = False
    list_per_page = 50

    class Media:
        """The colours of the states."""

        css = {"all": ("awaitly/workflow.css",)}  # noqa: RUF012

    def has_add_permission(self, request: Any) -> bool:
        """Return False: these pages are read-only."""
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:
        """Return False: these pages are read-only."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        """Return False: these pages are read-only."""
        return False

    def get_queryset(self, request: Any) -> Any:
        """Leave the snapshots in the database: the list does not need them."""
        return super().get_queryset(request).defer("snapshot")

    def get_changelist(self, request: Any, **kwargs: Any) -> type[ChangeList]:
        """Use the list that also reads the state of each workflow."""
        return _List

    def workflow(self, obj: Any) -> str:
        """Return the name of the workflow."""
        return obj.row.workflow or "–"

    def steps(self, obj: Any) -> int:
        """Return the number of recorded steps."""
        return int(obj.row.step_count)

    @admin.display(description="written", ordering="updated_at")
    def age(self, obj: Any) -> str:
        """Return how long ago the row was written."""
        time = f"{obj.row.updated_at:%Y-%m-%d %H:%M:%S} UTC"
        return str(format_html('<span title="{}">{}</span>', time, _age(obj.row)))

    def state(self, obj: Any) -> str:
        """Return the state in its colour, and who holds the lease or when it can be resumed."""
        state, lease = _state(obj.row), _lease(obj.row)
        badge = format_html('<span class="awaitly-state {0}">{0}</span>', state)
        return str(badge if lease == "free" else format_html("{} <small>{}</small>", badge, lease))

    def change_view(
        self, request: Any, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> TemplateResponse:
        """Show one workflow as a timeline."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        id, conn = unquote(object_id), connection(self.get_queryset(request).db)
        rows = [] if "\0" in id else _store.details([id], conn=conn)
        faults: Sequence[str] = ()
        snapshot = None
        try:
            snapshot = _store.load(id, conn=conn) if rows else None
        except SnapshotFormatError as error:
            faults = error.errors
        except ValueError as error:  # written by other software, under an id not valid here
            faults = [str(error)]
        if snapshot is None and not faults:
            raise Http404(f"no workflow is stored as {id!r}")
        (row,) = rows
        metadata = (snapshot.metadata if snapshot else None) or {}
        steps = steps_of(snapshot) if snapshot else []
        context = {
            **self.admin_site.each_context(request),
            "opts": self.model._meta,
            "media": self.media,
            "title": id,
            "row": row,
            "state": _state(row),
            "age": _age(row),
            "lease": _lease(row),
            "metadata": metadata,
            "values": [(n, _text(metadata[n])) for n in ("input", "output") if n in metadata],
            "failure": reasons(metadata.get("failure")),
            "faults": faults,
            "bars": list(_timeline(steps)),
            **(extra_context or {}),
        }
        return TemplateResponse(request, "admin/awaitly/workflow/timeline.html", context)


def _state(row: RunInfo) -> str:
    """Return the state in one word; for an unfinished run that is idle, how it got there."""
    if row.state in ("completed", "cancelled", "running"):
        return row.state
    if row.status == "failed":
        return "failed"
    if row.workflow is None:
        return "saved"  # by hand, or by Node: it names no workflow to resume it with
    if row.waits_for:
        return "suspended"
    return "submitted" if row.attempts == 0 else "interrupted"


def _lease(row: RunInfo) -> str:
    """Return who holds the lease, or when the run can be resumed."""
    if row.held_until is not None:
        return f"locked by {row.held_by} for {_span(row.seen_at, row.held_until)}"
    if _state(row) in ("completed", "cancelled", "saved"):
        return "free"
    if row.is_due:
        return "resumable now"
    if row.next_at is None:
        return f"waits for {', '.join(row.waits_for)}"
    return f"resumable in {_span(row.seen_at, row.next_at)}"


def _age(row: RunInfo) -> str:
    return f"{_span(row.updated_at, row.seen_at)} ago"


def _timeline(steps: Sequence[StepInfo]) -> Iterator[Bar]:
    """Place the steps on an axis from the first start to the last end."""
    starts = [step.started_at.timestamp() if step.started_at else None for step in steps]
    measured = [(at, at + s.seconds) for at, s in zip(starts, steps, strict=True) if at is not None]
    begin = min((at for at, _ in measured), default=0.0)
    whole = max((end for _, end in measured), default=0.0) - begin or 1.0
    last = -1
    for i in elide_steps(steps, _MANY):
        step, at = steps[i], starts[i]
        left = 0.0 if at is None else 100 * (at - begin) / whole
        yield Bar(
            step=step,
            duration="" if at is None else _duration(step.seconds),
            left=f"{min(left, 99.5):.2f}%",
            width=f"{min(max(100 * step.seconds / whole, 0.5), 100.5 - min(left, 99.5)):.2f}%",
            value=_text(step.value),
            hidden=i - last - 1,
        )
        last = i


def _text(value: Any) -> str:
    return elide(json.dumps(value, ensure_ascii=False, indent=2), _MOST_TEXT)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def _span(since: datetime, until: datetime) -> str:
    seconds = max((until - since).total_seconds(), 0.0)
    return f"{seconds:.0f}\xa0s" if seconds < 60 else str(timesince(since, until))
