"""Admin pages: the list of workflows, and a page for each, with its actions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from attrs import frozen
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.contrib.admin.views.main import ChangeList
from django.contrib.auth import get_permission_codename
from django.core.exceptions import PermissionDenied
from django.db import router
from django.db.models import BooleanField, Q
from django.db.models.expressions import RawSQL
from django.http import Http404, HttpResponse, HttpResponseBadRequest, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.html import format_html
from django.utils.text import smart_split, unescape_string_literal

from ... import AwaitlyError, Durable, RunInfo, SnapshotFormatError
from ...store.rows import STATES, StepInfo
from ...store.text import age, elide, elide_steps, fold_maps, span
from . import connection, shared_store
from .models import Workflow

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
        using = self.root_queryset.db
        rows = shared_store(using).details(ids, conn=connection(using))
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
        sql = shared_store(queryset.db).where_state(state)  # takes the seven words only
        return queryset.filter(RawSQL(sql, (), output_field=BooleanField()))  # noqa: S611


# -- what can be done ------------------------------------------------------------------------
#
# Each returns what to log, or None if there was nothing to do. With ATOMIC_REQUESTS, cancelling and
# answering are part of the request's transaction, as the log is; the others have their own.


def _retry(durable: Durable, id: str, posted: Any) -> str | None:
    return "Made due now." if durable.retry(id) else None


def _cancel(durable: Durable, id: str, posted: Any) -> str | None:
    return "Cancelled." if durable.cancel(id) else None


def _rewind(durable: Durable, id: str, posted: Any) -> str | None:
    key = posted.get("key", "")
    gone = durable.rewind(id, key)
    return f"Rewound to step {key!r}; {len(gone)} step{'' if len(gone) == 1 else 's'} forgotten."


def _answer(durable: Durable, id: str, posted: Any) -> str | None:
    key, text = posted.get("key", ""), posted.get("value", "")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}; a string needs quotes") from None
    if not durable.signal(id, key, value):
        return None
    return f"Answered wait {key!r} with {elide(json.dumps(value), 200)}."


_Act = Callable[[Durable, str, Any], str | None]

ACTS: dict[str, _Act] = {
    "retry": _retry,
    "cancel": _cancel,
    "rewind": _rewind,
    "answer": _answer,
}


def _acts_on(run: RunInfo) -> set[str]:
    """Return what makes sense for a run in its state; the rest is not offered."""
    acts = set() if run.state in ("completed", "cancelled") else {"cancel"}
    if run.state in ("retrying", "waiting", "failed"):
        acts.add("retry")
    if run.state != "running" and run.step_count:
        acts.add("rewind")
    if run.state != "running" and run.waits_for:
        acts.add("answer")
    return acts


# -- the pages -------------------------------------------------------------------------------


@admin.register(Workflow)
class WorkflowAdmin(admin.ModelAdmin):
    """Shows workflows; each action on them needs its own permission."""

    list_display = ("id", "workflow", "steps", "written", "state")
    list_filter = (_StateFilter,)
    search_fields = ("id",)
    search_help_text = "Part of an id, a workflow or metadata; or metadata as name=value."
    show_full_result_count = False
    list_per_page = 50
    actions = ("retry_now",)

    class Media:
        """The colours of the states."""

        css = {"all": ("awaitly/workflow.css",)}  # noqa: RUF012

    def has_add_permission(self, request: Any) -> bool:
        """Return False: only a Durable starts workflows."""
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:
        """Return False: a document is not edited."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        """Return False: deleting does not stop a run."""
        return False

    def has_retry_permission(self, request: Any) -> bool:
        """Return whether the user may have workflows retried."""
        return self.may(request, "retry")

    def may(self, request: Any, act: str) -> bool:
        """Return whether the user has the permission for one of `ACTS`."""
        codename = get_permission_codename(act, self.opts)
        return bool(request.user.has_perm(f"{self.opts.app_label}.{codename}"))

    # -- the list ----------------------------------------------------------------------------

    def get_queryset(self, request: Any) -> Any:
        """Leave the snapshots in the database: the list does not need them."""
        return super().get_queryset(request).defer("snapshot")

    def get_changelist(self, request: Any, **kwargs: Any) -> type[ChangeList]:
        """Use the list that also reads the state of each workflow."""
        return _List

    def get_search_results(self, request: Any, queryset: Any, search_term: str) -> tuple[Any, bool]:
        """Find each word in the id, the workflow or the metadata; ``name=value`` exactly."""
        for word in smart_split(search_term):
            if word[0] in "\"'" and word[0] == word[-1] and len(word) > 1:
                word = unescape_string_literal(word)
            queryset = queryset.filter(_matches(word))
        return queryset, False

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

    @admin.action(description="Retry selected workflows now", permissions=["retry"])
    def retry_now(self, request: Any, queryset: Any) -> None:
        """Make the selected workflows due."""
        for id in queryset.values_list("pk", flat=True):
            self._do(request, "retry", id)

    # -- one workflow ------------------------------------------------------------------------

    def change_view(
        self, request: Any, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        """Show one workflow with its timeline, or do one of `ACTS` and show it again."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        id = unquote(object_id)
        row, faults = self._read(request, id)
        if request.method == "POST":
            if (act := request.POST.get("act")) not in ACTS:
                return HttpResponseBadRequest("act must be one of: " + ", ".join(ACTS))
            self._do(request, act, id)
            return HttpResponseRedirect(request.path)
        shown = {"metadata": row.metadata or None, "input": row.input, "result": row.result}
        last = max(row.steps, key=lambda step: step.seq, default=None)
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "media": self.media,
            "title": id,
            "object_id": object_id,
            "row": row,
            "acts": {act for act in _acts_on(row) if self.may(request, act)},
            "last_step": last and last.key,
            "written": age(row.age),
            "values": [(name, _text(value)) for name, value in shown.items() if value is not None],
            "faults": faults,
            "bars": list(_timeline(fold_maps(row.steps))),
            **(extra_context or {}),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "admin/awaitly/workflow/timeline.html", context)

    def _read(self, request: Any, id: str) -> tuple[RunInfo, Sequence[str]]:
        """Return a run as far as it can be read, and what is wrong with it."""
        store = shared_store(using := self.get_queryset(request).db)
        conn = connection(using)
        rows = [] if "\0" in id else store.details([id], conn=conn)
        if not rows:
            raise Http404(f"no workflow is stored as {id!r}")
        try:
            return Durable(store).get(id, conn=conn) or rows[0], ()
        except SnapshotFormatError as error:
            return rows[0], error.errors
        except ValueError as error:  # an id written by others that the store does not accept
            return rows[0], [str(error)]

    def _durable(self) -> Durable:
        return Durable(shared_store(router.db_for_write(Workflow)))

    def _do(self, request: Any, act: str, id: str) -> None:
        """Do it if the user may, log it as Django logs changes, and show a message."""
        if not self.may(request, act):
            raise PermissionDenied
        try:
            done = ACTS[act](self._durable(), id, request.POST)
        except (AwaitlyError, ValueError) as error:
            self.message_user(request, f"{id}: {error}", messages.ERROR)
            return
        if done is None:
            text = f"{id}: nothing was done, because it has ended or changed meanwhile. Reload it."
            self.message_user(request, text, messages.WARNING)
            return
        self.log_change(request, Workflow(id=id), done)
        self.message_user(request, f"{id}: {done}", messages.SUCCESS)


def _matches(word: str) -> Q:
    """Return the condition for one word of a search."""
    name, equals, text = word.partition("=")
    if equals and name:
        found = Q()
        for value in (text, *_number_or_word(text)):
            for place in ("custom__contains", "contains"):  # of Node and version 0.1, the second
                found |= Q(**{f"snapshot__metadata__{place}": {name: value}})
        return found
    return (
        Q(id__icontains=word)
        | Q(snapshot__metadata__workflow__icontains=word)
        | Q(snapshot__metadata__custom__icontains=word)
    )


def _number_or_word(text: str) -> tuple[Any, ...]:
    """Return what JSON has ``text`` for, if it is a number, true, false or null."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    return (value,) if finite or value is None else ()


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
