"""What is more than JSON: how values become JSON text for the store, and themselves again."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from .. import _json
from ..errors import NotSerializable, SnapshotFormatError

T = TypeVar("T")


class Codec(Protocol):
    """Turns values into JSON and back, for results that are more than JSON.

    ``type`` is the step function's return annotation (``Any`` without one).
    """

    def encode(self, value: Any) -> Any:
        """Return JSON: None, bool, int, float, str, list or dict with string keys."""

    def decode(self, json: Any, type: Any) -> Any:
        """Return the value of ``type`` that ``json`` stands for."""


def encode(codec: Codec | None, value: Any, subject: str) -> str:
    """Encode ``value`` for the store; raise `NotSerializable` that names ``subject``."""
    try:
        if codec is not None:
            try:
                value = codec.encode(value)
            except NotSerializable:
                raise
            except Exception as error:
                raise NotSerializable("$", f"its codec failed: {error!r}", subject) from error
        return _json.dumps(value, depth=_json.VALUE_DEPTH)
    except NotSerializable as error:
        error.subject = subject
        error.args = (error.path, error.reason, subject)
        raise


def decode(codec: Codec | None, value: Any, fn: Callable[..., T], id: str | None, where: str) -> T:
    """Turn stored JSON back into what ``fn`` returns; the JSON itself without a codec."""
    if codec is None:
        return typing.cast(T, value)
    try:
        return typing.cast(T, codec.decode(value, return_type(fn)))
    except Exception as error:
        raise SnapshotFormatError(id, [f"{where}: its codec failed: {error!r}"]) from error


def return_type(fn: Callable[..., Any]) -> Any:
    """Return what ``fn`` is annotated to return, or ``Any``."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(fn, type):
        return fn
    try:
        return typing.get_type_hints(fn).get("return", Any)
    except (TypeError, NameError, AttributeError):
        return Any


def decode_input(
    codec: Codec | None, input: Any, fn: Callable[..., Any], id: str | None
) -> tuple[list[Any], dict[str, Any]]:
    """Turn a recorded input back into the arguments that a workflow gets after its step."""
    args, kwargs = list(input["args"]), dict(input["kwargs"])
    if codec is None:
        return args, kwargs
    positional, named = _parameter_types(fn, len(args))
    try:
        args = [codec.decode(value, type) for value, type in zip(args, positional, strict=True)]
        kwargs = {name: codec.decode(v, named.get(name, Any)) for name, v in kwargs.items()}
    except Exception as error:
        raise SnapshotFormatError(id, [f"metadata.input: its codec failed: {error!r}"]) from error
    return args, kwargs


def _parameter_types(fn: Callable[..., Any], count: int) -> tuple[Sequence[Any], dict[str, Any]]:
    """Return the types of ``count`` positional parameters after the first, and all by name."""
    try:
        named = typing.get_type_hints(fn)
        parameters = list(inspect.signature(fn).parameters.values())[1:]
    except (TypeError, ValueError, NameError):
        return [Any] * count, {}
    single = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [named.get(p.name, Any) for p in parameters if p.kind in single]
    rest = [named.get(p.name, Any) for p in parameters if p.kind is p.VAR_POSITIONAL] or [Any]
    return (positional + rest * count)[:count], named
