"""Read-only admin pages: the list of workflows, and the timeline of one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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

from ... import Durable, SnapshotFormatError, postgres
from ...store.rows import STATES, StepInfo, age, elide, elide_steps, span
from . import connection
from .models import Workflow

_store = postgres("", auto_create_table=False)  # works on Django's connections; opens none itself
_durable = Durable(_store)

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
        return [(state, state.capitalize()) for state in STATES]

    def queryset(self, request: Any, queryset: Any) -> Any:
        state = self.value()
        if state not in STATES:
            return queryset
        condition = RawSQL(_store.where_state(state), (), output_field=BooleanField())  # noqa: S611
        return queryset.filter(condition)


@admin.register(Workflow)
class WorkflowAdmin(admin.ModelAdmin):
    """Shows workflows; nothing here changes them."""

    list_display = ("id", "workflow", "steps", "written", "state")
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
    def written(self, obj: Any) -> str:
        """How long ago."""
        time = f"{obj.row.updated_at:%Y-%m-%d %H:%M:%S} UTC"
        return str(format_html('<span title="{}">{} ago</span>', time, age(obj.row.age)))

    def state(self, obj: Any) -> str:
        """One word in its colour, and who runs it or when it goes on."""
        badge = format_html('<span class="awaitly-state {0}">{0}</span>', obj.row.state)
        more = f"held by {obj.row.held_by}" if obj.row.holder else obj.row.what_next
        return str(format_html("{} <small>{}</small>", badge, more) if more else badge)

    def change_view(
        self, request: Any, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> TemplateResponse:
        """Show one workflow as a timeline."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        id, conn = unquote(object_id), connection(self.get_queryset(request).db)
        rows = [] if "\0" in id else _store.details([id], conn=conn)
        if not rows:
            raise Http404(f"no workflow is stored as {id!r}")
        row = rows[0]
        faults: Sequence[str] = ()
        try:
            row = _durable.get(id, conn=conn) or row
        except SnapshotFormatError as error:
            faults = error.errors
        except ValueError as error:  # an id written by others that the store does not accept
            faults = [str(error)]
        shown = {"metadata": row.metadata or None, "input": row.input, "result": row.result}
        context = {
            **self.admin_site.each_context(request),
            "opts": self.model._meta,
            "media": self.media,
            "title": id,
            "row": row,
            "written": age(row.age),
            "values": [(name, _text(value)) for name, value in shown.items() if value is not None],
            "faults": faults,
            "bars": list(_timeline(row.steps)),
            **(extra_context or {}),
        }
        return TemplateResponse(request, "admin/awaitly/workflow/timeline.html", context)


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
            duration="" if at is None else span(step.seconds),
            left=f"{min(left, 99.5):.2f}%",
            width=f"{min(max(100 * step.seconds / whole, 0.5), 100.5 - min(left, 99.5)):.2f}%",
            value=_text(step.value),
            hidden=i - last - 1,
        )
        last = i


def _text(value: Any) -> str:
    return elide(json.dumps(value, ensure_ascii=False, indent=2), _MOST_TEXT)
