"""Ready-made codecs: arguments and results as objects, stored as plain JSON.

Each needs its extra, ``awaitly-postgres[cattrs]`` or ``awaitly-postgres[pydantic]``, when an
instance is made. A value is encoded by its own type, and decoded by the annotation: the return
annotation of the step function or the workflow, or that of the parameter. Without an annotation it
stays JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import time, timedelta
from decimal import Decimal
from types import ModuleType
from typing import Any, TypeVar, get_type_hints
from uuid import UUID

from attrs import define, field

from .errors import NotSerializable

# cattrs would silently convert a float to an int, or anything to a str; that is refused. An int may
# come as a string, because the keys of a JSON object are strings.
_ACCEPTED: dict[type, tuple[type, ...]] = {
    str: (str,),
    bool: (bool,),
    int: (int, str),
    float: (float, int),
}


@define
class CattrsCodec:
    """Encodes attrs classes, dataclasses, date, Decimal, UUID, Enum, set, tuple ... with cattrs.

    Args:
        converter: a cattrs converter to use as it is. By default one is made for JSON; register
            hooks for more classes on the attribute ``converter``.

    Example:
        >>> from attrs import frozen
        >>> @frozen
        ... class Order:
        ...     id: UUID
        ...     total: Decimal
        >>> codec = CattrsCodec()
        >>> json = codec.encode(Order(UUID(int=7), Decimal("9.90")))
        >>> json
        {'id': '00000000-0000-0000-0000-000000000007', 'total': '9.90'}
        >>> codec.decode(json, Order).total
        Decimal('9.90')
    """

    converter: Any = field(factory=lambda: _make_converter())

    def encode(self, value: Any) -> Any:
        """Return ``value`` as JSON; raise `NotSerializable` with the path if that fails."""
        try:
            return self.converter.unstructure(value)
        except Exception as error:
            raise _culprit(self.converter.unstructure, value, error) from error

    def decode(self, json: Any, type: Any) -> Any:
        """Return ``json`` as a value of ``type``; raise ValueError if it does not fit."""
        if type is Any:
            return json
        try:
            return self.converter.structure(json, type)
        except Exception as error:
            faults = _import("cattrs").transform_error(error)
            raise ValueError("; ".join(faults)) from error


@define
class PydanticCodec:
    """Encodes models, dataclasses and all other types that pydantic supports, with pydantic.

    What a model leaves out or masks when it is serialised (an excluded field, a ``SecretStr``) is
    lost.

    Example:
        >>> from pydantic import BaseModel
        >>> class Order(BaseModel):
        ...     id: UUID
        ...     total: Decimal
        >>> codec = PydanticCodec()
        >>> json = codec.encode(Order(id=UUID(int=7), total="9.90"))
        >>> json
        {'id': '00000000-0000-0000-0000-000000000007', 'total': '9.90'}
        >>> codec.decode(json, Order).total
        Decimal('9.90')
    """

    _pydantic: ModuleType = field(factory=lambda: _import("pydantic"), init=False, repr=False)
    _core: ModuleType = field(factory=lambda: _import("pydantic_core"), init=False, repr=False)

    def encode(self, value: Any) -> Any:
        """Return ``value`` as JSON; raise `NotSerializable` with the path if that fails."""
        to_json = functools.partial(self._core.to_jsonable_python, round_trip=True)
        try:
            json = to_json(value)
        except Exception as error:
            raise _culprit(to_json, value, error) from error
        return _sort_sets(value, json)

    def decode(self, json: Any, type: Any) -> Any:
        """Return ``json`` as a value of ``type``; raise ValueError if it does not fit."""
        if type is Any:
            return json
        try:
            # validate_json, not validate_python: strict models accept a string for a date only in
            # JSON.
            return _adapter(type).validate_json(self._core.to_json(json))
        except self._pydantic.ValidationError as error:
            faults = [f"{e['msg']} @ ${_path(e['loc'])}" for e in error.errors(include_url=False)]
            raise ValueError("; ".join(faults)) from error


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = module.partition("_")[0]
        raise ImportError(
            f"{module} is not installed; pip install 'awaitly-postgres[{extra}]'", name=module
        ) from error


def _make_converter() -> Any:
    """Make a cattrs converter for JSON, with hooks for types that cattrs does not cover."""
    _import("cattrs")
    from cattrs.cols import is_any_set, is_mapping
    from cattrs.preconf.json import make_converter

    converter = make_converter()

    def key(value: Any, _: Any = None) -> Any:
        plain = converter.unstructure(value)
        return str(plain) if type(plain) is int else plain

    def sorted_set(value: AbstractSet[Any]) -> list[Any]:
        return sorted(map(converter.unstructure, value), key=repr)

    converter.register_unstructure_hook_factory(
        is_mapping, lambda kind: converter.gen_unstructure_mapping(kind, key_handler=key)
    )
    converter.register_unstructure_hook_func(is_any_set, sorted_set)

    def named_tuple(value: Any, kind: Any) -> Any:
        types = get_type_hints(kind)  # cattrs does not resolve postponed annotations here
        pairs = zip(value, kind._fields, strict=True)
        return kind(*(converter.structure(v, types.get(name, Any)) for v, name in pairs))

    converter.register_structure_hook_func(_is_named_tuple, named_tuple)
    converter.register_unstructure_hook_func(
        _is_named_tuple, lambda value: [converter.unstructure(part) for part in value]
    )
    converter.register_unstructure_hook(Decimal, str)
    converter.register_structure_hook(Decimal, lambda value, _: Decimal(str(value)))
    converter.register_unstructure_hook(UUID, str)
    converter.register_structure_hook(UUID, lambda value, _: UUID(value))
    converter.register_unstructure_hook(time, lambda value: value.isoformat())
    converter.register_structure_hook(time, lambda value, _: time.fromisoformat(value))
    converter.register_unstructure_hook(timedelta, lambda value: value.total_seconds())
    converter.register_structure_hook(timedelta, lambda value, _: timedelta(seconds=value))
    converter.register_structure_hook(type(None), _none)
    converter.register_structure_hook_func(
        lambda kind: kind is object or isinstance(kind, TypeVar), lambda value, _: value
    )
    for kind in _ACCEPTED:
        converter.register_structure_hook(kind, _primitive)
    return converter


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _primitive(value: Any, kind: type) -> Any:
    accepted = next(_ACCEPTED[base] for base in kind.__mro__ if base in _ACCEPTED)
    if not isinstance(value, accepted):
        raise TypeError(f"{kind.__name__} expected, not {type(value).__name__}")
    return kind(value)


def _none(value: Any, _: Any) -> None:
    if value is not None:
        raise TypeError(f"None expected, not {type(value).__name__}")


@functools.lru_cache(maxsize=1024)
def _adapter(type: Any) -> Any:
    return _import("pydantic").TypeAdapter(type)


def _sort_sets(value: Any, json: Any) -> Any:
    """Sort every list in ``json`` that was a set in ``value``; return ``json``.

    The order of a set of strings differs between processes, and the same id with a different input
    is a `WorkflowConflict`.
    """
    if isinstance(json, list) and isinstance(value, (list, tuple, AbstractSet)):
        for part, below in zip(value, json, strict=False):
            _sort_sets(part, below)
        if isinstance(value, AbstractSet):
            json.sort(key=repr)
    elif isinstance(json, dict):
        if isinstance(value, Mapping):
            pairs = zip(value.values(), json.values(), strict=False)
        else:
            aliases = {name: name for name in _field_names(value)}
            for name, info in getattr(type(value), "model_fields", {}).items():
                aliases[name] = info.serialization_alias or name
            names = [name for name, alias in aliases.items() if alias in json]
            pairs = zip(
                [getattr(value, name) for name in names],
                [json[aliases[name]] for name in names],
                strict=True,
            )
        for part, below in pairs:
            _sort_sets(part, below)
    return json


def _culprit(encode: Callable[[Any], Any], value: Any, error: Exception) -> NotSerializable:
    """Return the error for the innermost part of ``value`` that cannot be encoded."""
    path, depth = "$", 0
    parts = _parts(value)
    while depth < 100 and (part := next(parts, None)) is not None:
        try:
            encode(part[1])
        except Exception as inner:
            path, error, depth = path + part[0], inner, depth + 1
            parts = _parts(part[1])
    return NotSerializable(path, str(error))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((_path([key]), part) for key, part in value.items())
    elif isinstance(value, (list, tuple, AbstractSet)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    else:
        yield from ((f".{name}", getattr(value, name, None)) for name in _field_names(value))


def _field_names(value: Any) -> list[str]:
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        return [known.name for known in dataclasses.fields(kind)]
    names = [known.name for known in getattr(kind, "__attrs_attrs__", ())]
    return [*names, *getattr(kind, "model_fields", ())]


def _path(location: Any) -> str:
    """Return a path in the usual notation: ``.items[0].price``."""
    return "".join(
        f".{part}" if isinstance(part, str) and part.isidentifier() else f"[{part!r}]"
        for part in location
    )
