"""Exceptions as JSON, and back.

The format is the JavaScript package's ``SerializedCause``. What only Python needs (the class, its
arguments and its attributes) goes into the step's ``meta``. Rebuilding an exception imports
nothing, unpickles nothing and runs no ``__init__`` of its class: others can write to the table, so
what it holds is data, never code.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MemberDescriptorType, ModuleType
from typing import Any

from .. import _json
from ..errors import NotSerializable, StepFailed

_MAX_STACK = 8_000  # characters
_MAX_GROUPS = 10  # levels of nested exception groups
_ROOMS = tuple(str(Path(__file__).parents[1] / room) for room in ("workflow", "store", "durable"))


def to_json(error: BaseException, depth: int = 0) -> dict[str, Any]:
    """Return the fields of a failed step: ``error``, ``cause`` and ``meta``."""
    kind = type(error)
    exception: dict[str, Any] = {"type": f"{kind.__module__}:{kind.__qualname__}"}
    # An OSError keeps its file names outside of its args.
    args = list(OSError.__reduce__(error)[1] if isinstance(error, OSError) else _args(error))
    exception["args"] = args if _fits(args) else [_message(error)]
    if members := _members(error):
        exception["args"] = [_message_of_group(error)]
        exception["exceptions"] = [
            to_json(member, depth + 1) for member in members if depth < _MAX_GROUPS
        ]
    exception["state"] = {name: value for name, value in _state(error) if _fits({name: value})}
    return {
        "error": kind.__name__,
        "cause": _cause(error),
        "meta": {"origin": "throw", "exception": exception},
    }


def from_json(key: str, step: Mapping[str, Any]) -> Exception:
    """Rebuild the exception of a failed step; if that is impossible, return a `StepFailed`."""
    cause = step.get("cause") or {}
    exception = (step.get("meta") or {}).get("exception")
    error = _rebuild(key, exception) if isinstance(exception, Mapping) else None
    if error is None:
        name = cause.get("name") or cause.get("originalType") or "an error"
        reason = cause.get("message", cause.get("stringRepresentation", ""))
        error = StepFailed(key, str(name), str(reason), step.get("error"))
    return error


def run_from_json(key: str, failure: Mapping[str, Any]) -> Exception:
    """Rebuild the exception that a run failed with, from what `run_to_json` returned.

    ``key`` is the last step of the run, for the message of a `StepFailed`.
    """
    return from_json(key, {"cause": failure, "meta": {"exception": failure.get("exception")}})


def run_to_json(error: BaseException) -> dict[str, Any]:
    """Return the error of a failed run for its metadata: the cause as Node reads it, and more."""
    told = to_json(error)
    return {**told["cause"], "exception": told["meta"]["exception"]}


def _args(error: BaseException) -> tuple[Any, ...]:
    """Return the built-in ``args``, even if the class of ``error`` redefines that name."""
    args: tuple[Any, ...] = vars(BaseException)["args"].__get__(error)
    return args


def _group() -> type[BaseException] | None:
    """Return the class of exception groups; before Python 3.11 that of the backport, if loaded."""
    backport = sys.modules.get("exceptiongroup")
    return getattr(builtins, "BaseExceptionGroup", getattr(backport, "BaseExceptionGroup", None))


def _members(error: BaseException) -> Sequence[BaseException]:
    """Return the exceptions of a group, and none for any other class with that attribute."""
    group: Any = _group()
    if group is None or not isinstance(error, group):
        return ()
    return tuple(group.exceptions.__get__(error))


def _message_of_group(error: BaseException) -> str:
    group: Any = _group()
    return _clean(str(group.message.__get__(error)))


def _state(error: BaseException) -> Iterator[tuple[str, Any]]:
    yield from _attributes(error).items()
    for name, slot in _slots(type(error)).items():
        with suppress(AttributeError):
            yield name, slot.__get__(error)


def _slots(kind: type) -> dict[str, Any]:
    """Return the slots of a class, where attrs and dataclasses may keep its attributes."""
    own = [_class_members(base) for base in _mro(kind)[::-1] if id(base) not in _BUILTINS]
    return {
        name: member
        for members in own
        for name, member in members.items()
        if type(member) is MemberDescriptorType
    }


def _fits(value: Any) -> bool:
    try:
        _json.dumps(value, depth=_json.VALUE_DEPTH)
    except NotSerializable:
        return False
    return True


def _cause(error: BaseException, depth: int = 0) -> dict[str, Any]:
    # Only the user's frames: ours, between the workflow and its step, are noise.
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_ROOMS)
    ]
    stack = f"Traceback (most recent call last):\n{''.join(traceback.format_list(frames))}"
    with suppress(Exception):  # formatting the last lines runs code of the exception's class
        stack += "".join(traceback.format_exception_only(type(error), error))
    cause: dict[str, Any] = {
        "type": "error",
        "name": type(error).__name__,
        "message": _message(error),
        "stack": _clean(stack[-_MAX_STACK:]),
    }
    if error.__cause__ is not None and depth < 10:
        cause["cause"] = _cause(error.__cause__, depth + 1)
    return cause


def _message(error: BaseException) -> str:
    try:
        return _clean(str(error))
    except Exception:
        return "<str() of this exception failed>"


def _clean(text: str) -> str:
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _rebuild(key: str, exception: Mapping[str, Any]) -> Exception | None:
    kind = _loaded_class(exception.get("type"))
    args, state = exception.get("args"), exception.get("state")
    if kind is None or not isinstance(args, list):
        return None
    # __new__ and __init__ of the nearest built-in base, which run no code of the class itself.
    builtin: Any = next(base for base in _mro(kind) if id(base) in _BUILTINS)
    try:
        if "exceptions" in exception:
            args = [*args, [from_json(key, member) for member in exception["exceptions"]]]
            builtin = _group()
        error: Exception = builtin.__new__(kind, *args)
        with suppress(TypeError):  # UnicodeError requires bytes, which are not JSON
            builtin.__init__(error, *args)
        slots = _slots(kind)
        for name, value in state.items() if isinstance(state, Mapping) else ():
            if name in slots:
                slots[name].__set__(error, value)
            else:
                _attributes(error)[name] = value
        # An error that cannot be printed is worse than a `StepFailed`. Printing a SyntaxError also
        # reads line numbers and source text from attributes that may hold anything.
        str(error)
        if issubclass(kind, SyntaxError):
            traceback.format_exception_only(kind, error)
    except Exception:
        return None
    return error


# Read at the C level: ordinary attribute access on a lazy module may import another module, and on
# a lazy object may call its code.
_module_members = vars(ModuleType)["__dict__"].__get__
_class_members = vars(type)["__dict__"].__get__
_mro = vars(type)["__mro__"].__get__
_attributes = vars(BaseException)["__dict__"].__get__
_BUILTINS = {id(kind) for kind in vars(builtins).values() if isinstance(kind, type)}


def _loaded_class(name: object) -> type[Exception] | None:
    """Return the exception class named ``module:qualified.name`` if its module is imported."""
    if not isinstance(name, str):
        return None
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        kind = type(found)
        if issubclass(kind, ModuleType):
            found = _module_members(found).get(part)
        elif issubclass(kind, type):
            found = _class_members(found).get(part)
        else:
            return None
    return found if issubclass(type(found), type) and issubclass(found, Exception) else None
