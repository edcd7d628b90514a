"""Read-only pages on what is stored: a list, and the timeline of one workflow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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

from ... import _json
from ..._checks import moment
from ...errors import SnapshotFormatError
from ...snapshot import WorkflowSnapshot, as_mapping
from ...store.database import fetch
from ...store.postgres import postgres
from . import connection
from .models import Workflow

_store = postgres("", auto_create_table=False)  # for its statements; it opens nothing itself

_HELD = (
    "EXISTS (SELECT FROM awaitly_workflow_lock l WHERE l.workflow_id = awaitly_snapshots.id "
    "AND l.expires_at > clock_timestamp())"
)
_STATUS = "(awaitly_snapshots.snapshot->'execution'->>'status')"
_PENDING = f"NULLIF({_STATUS} = 'completed', false) IS NULL"  # as the partial index has it
_FILTERS = {
    "running": f"{_PENDING} AND {_HELD}",
    "pending": f"{_PENDING} AND NOT {_HELD} AND {_STATUS} IS DISTINCT FROM 'failed'",
    "failed": f"{_PENDING} AND NOT {_HELD} AND {_STATUS} = 'failed'",
    "completed": f"{_STATUS} = 'completed'",
}
_MOST_STEPS = 500
_MOST_TEXT = 5_000  # characters of one value
_NEVER = 9999  # the year


@frozen
class Standing:
    """Where a workflow stands, without its values. ``now`` is the server's time."""

    status: str
    updated_at: datetime
    steps: int
    metadata: Mapping[str, Any]
    holder: str | None
    held_until: datetime | None
    now: datetime

    @property
    def state(self) -> str:
        """One word: the stored status, told apart further where nobody is at work."""
        if self.status == "completed":
            return "completed"
        if "cancelledAt" in self.metadata:
            return "cancelled"
        if self.holder is not None:
            return "running"
        if self.status == "failed":
            return "failed"
        if not isinstance(self.metadata.get("workflow"), str):
            return "saved"  # by hand, or by Node: there is nothing to resume it with
        if "waits" in self.metadata:
            return "suspended"
        return "submitted" if self.metadata.get("attempts") == 0 else "interrupted"

    @property
    def age(self) -> str:
        """How long ago it was last written."""
        return f"{_span(self.updated_at, self.now)} ago"

    @property
    def lease(self) -> str:
        """Who holds it, or what is to come."""
        if self.holder is not None and self.held_until is not None:
            owner = self.holder.rpartition(":")[0] or self.holder
            return f"locked by {owner} for {_span(self.now, self.held_until)}"
        if self.state in ("completed", "cancelled", "saved"):
            return "free"
        waits, signals = (as_mapping(self.metadata.get(name)) for name in ("waits", "signals"))
        due = _time(self.metadata.get("wakeAt")) or self.now
        if due <= self.now or any(key in signals for key in waits):
            return "resumable now"
        if due.year == _NEVER:
            return f"waits for {', '.join(waits)}"
        return f"resumable in {_span(self.now, due)}"


@frozen
class Bar:
    """One step of the timeline; ``left`` and ``width`` are per cent of the whole."""

    key: str
    ok: bool
    duration: str
    left: str
    width: str
    value: str
    cause: tuple[str, ...]


class _List(ChangeList):
    """Asks for where the workflows of one page stand, in one statement."""

    result_list: Any

    def get_results(self, request: Any) -> None:
        super().get_results(request)
        found = _standings([w.id for w in self.result_list], self.root_queryset.db)
        # What was deleted in between is gone from the page as well.
        self.result_list = [w for w in self.result_list if w.id in found]
        for workflow in self.result_list:
            workflow.standing = found[workflow.id]


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
    """Shows workflows; there is nothing here that changes them."""

    list_display = ("id", "workflow", "steps", "age", "state")
    list_filter = (_StateFilter,)
    search_fields = ("id",)
    show_full_result_count = False
    list_per_page = 50

    class Media:
        """The colours of the states."""

        css = {"all": ("awaitly/workflow.css",)}  # noqa: RUF012

    def has_add_permission(self, request: Any) -> bool:
        """Nobody may."""
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:
        """Nobody may."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        """Nobody may."""
        return False

    def get_queryset(self, request: Any) -> Any:
        """Leave the snapshots in the database; a list needs none of them."""
        return super().get_queryset(request).defer("snapshot")

    def get_changelist(self, request: Any, **kwargs: Any) -> type[ChangeList]:
        """Use the list that knows where workflows stand."""
        return _List

    def workflow(self, obj: Any) -> str:
        """The name of its function."""
        return str(obj.standing.metadata.get("workflow") or "–")

    def steps(self, obj: Any) -> int:
        """How many are recorded."""
        return int(obj.standing.steps)

    @admin.display(description="written", ordering="updated_at")
    def age(self, obj: Any) -> str:
        """How long ago."""
        time = f"{obj.standing.updated_at:%Y-%m-%d %H:%M:%S} UTC"
        return str(format_html('<span title="{}">{}</span>', time, obj.standing.age))

    def state(self, obj: Any) -> str:
        """One word in its colour, and who works on it or when it can be resumed."""
        state, lease = obj.standing.state, obj.standing.lease
        badge = format_html('<span class="awaitly-state {0}">{0}</span>', state)
        return str(badge if lease == "free" else format_html("{} <small>{}</small>", badge, lease))

    def change_view(
        self, request: Any, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> TemplateResponse:
        """Show one workflow as a timeline."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        id, using = unquote(object_id), self.get_queryset(request).db
        standing = _standings([id], using).get(id)
        faults: Sequence[str] = ()
        snapshot = None
        try:
            snapshot = _store.load(id, conn=connection(using))
        except SnapshotFormatError as error:
            faults = error.errors
        if standing is None or (snapshot is None and not faults):
            raise Http404(f"no workflow is stored as {id!r}")
        metadata = (snapshot.metadata if snapshot else None) or {}
        failure = metadata.get("failure") if isinstance(metadata.get("failure"), Mapping) else None
        bars = list(_timeline(snapshot)) if snapshot else []
        context = {
            **self.admin_site.each_context(request),
            "opts": self.model._meta,
            "media": self.media,
            "title": id,
            "standing": standing,
            "metadata": metadata,
            "values": [(n, _text(metadata[n])) for n in ("input", "output") if n in metadata],
            "failure": _causes(failure),
            "faults": faults,
            "bars": bars,
            "more": len(snapshot.steps) - len(bars) if snapshot else 0,
            **(extra_context or {}),
        }
        return TemplateResponse(request, "admin/awaitly/workflow/timeline.html", context)


def _standings(ids: list[str], using: str) -> dict[str, Standing]:
    rows = fetch(connection(using), _store._sql.details, {"ids": ids})
    return {
        id: Standing(
            status=status,
            updated_at=moment(updated_at),
            steps=steps,
            metadata=_json.loads(metadata) if metadata else {},
            holder=holder,
            held_until=None if holder is None else moment(until),
            now=moment(now),
        )
        for id, status, updated_at, steps, metadata, holder, until, now in rows
    }


def _timeline(snapshot: WorkflowSnapshot) -> Iterator[Bar]:
    """Lay the steps out over the time from the first start to the last end."""
    steps = [(key, step, _times(step.meta)) for key, step in snapshot.steps.items()]
    steps.sort(key=lambda step: step[2])
    begin = min((start for _, _, (start, _) in steps if start), default=0.0)
    whole = max((start + took for _, _, (start, took) in steps), default=0.0) - begin or 1.0
    for key, step, (start, took) in steps[:_MOST_STEPS]:
        left = 100 * max(start - begin, 0.0) / whole
        yield Bar(
            key=key,
            ok=step.ok,
            duration=_duration(took) if start else "",
            left=f"{min(left, 99.5):.2f}%",
            width=f"{min(max(100 * took / whole, 0.5), 100.5 - min(left, 99.5)):.2f}%",
            value=_text(step.value) if step.ok else _text(step.error),
            cause=_causes(step.cause),
        )


def _times(meta: Mapping[str, Any]) -> tuple[float, float]:
    """Return when a step began and how long it took, in seconds; zeros for Node's steps."""
    started, took = _time(meta.get("startedAt")), meta.get("durationMs")
    if started is None or not isinstance(took, (int, float)):
        return 0.0, 0.0
    return started.timestamp(), took / 1000


def _time(text: object) -> datetime | None:
    """Read a time of the snapshot format; None for anything else that a row may hold."""
    try:
        time = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return time if time.tzinfo else None


def _causes(cause: object) -> tuple[str, ...]:
    """Tell a failure and what caused it, nearest first."""
    told = []
    while isinstance(cause, Mapping):
        name = cause.get("name") or cause.get("originalType") or "error"
        told.append(f"{name}: {cause.get('message', cause.get('stringRepresentation', ''))}")
        cause = cause.get("cause")
    return tuple(told)


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=2)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def _span(since: datetime, until: datetime) -> str:
    seconds = max((until - since).total_seconds(), 0.0)
    return f"{seconds:.0f}\xa0s" if seconds < 60 else str(timesince(since, until))
