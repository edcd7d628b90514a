"""Codecs: how arguments and results become JSON text for the store, and are decoded again."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from .. import _json
from ..errors import NotSerializable, SnapshotFormatError

T = TypeVar("T")

_ASYNC = "its function is async; call asyncio.run() inside a blocking function instead"


class Codec(Protocol):
    """Converts values to JSON and back, for arguments and results that are not plain JSON.

    Any object with these two methods will do. What they raise becomes `NotSerializable` or
    `SnapshotFormatError`.

    Example:
        >>> from datetime import date
        >>> class Dates:
        ...     def encode(self, value):
        ...         return value.isoformat() if isinstance(value, date) else value
        ...     def decode(self, json, type):
        ...         return date.fromisoformat(json) if type is date else json
    """

    def encode(self, value: Any) -> Any:
        """Return ``value`` as JSON: None, bool, int, float, str, list or dict with string keys.

        Args:
            value: an argument of a workflow, or what a step or a workflow returned.
        """

    def decode(self, json: Any, type: Any) -> Any:
        """Return the value that ``json`` stands for.

        Args:
            json: what `encode` returned, as the database returns it.
            type: the annotation of the parameter, or of the function's result; ``Any`` if there is
                none.
        """


def encode(codec: Codec | None, value: Any, subject: str) -> str:
    """Return ``value`` as JSON text; raise a `NotSerializable` that names ``subject``."""
    try:
        if inspect.iscoroutine(value):
            value.close()  # otherwise Python warns that it was never awaited
            raise NotSerializable("$", _ASYNC)
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
    """Return stored JSON as the type that ``fn`` is annotated to return; as it is without codec."""
    if codec is None:
        return typing.cast(T, value)
    try:
        return typing.cast(T, codec.decode(value, return_type(fn)))
    except Exception as error:
        raise SnapshotFormatError(id, [f"{where}: its codec failed: {error!r}"]) from error


def return_type(fn: Callable[..., Any]) -> Any:
    """Return the return annotation of ``fn``, or ``Any``."""
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
    """Return the positional and keyword arguments, after the `Step`, of a recorded input."""
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
    """Return the types of ``count`` positional arguments after the `Step`, and all by name."""
    try:
        named = typing.get_type_hints(fn)
        parameters = list(inspect.signature(fn).parameters.values())[1:]
    except (TypeError, ValueError, NameError):
        return [Any] * count, {}
    single = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [named.get(p.name, Any) for p in parameters if p.kind in single]
    rest = [named.get(p.name, Any) for p in parameters if p.kind is p.VAR_POSITIONAL] or [Any]
    return (positional + rest * count)[:count], named
