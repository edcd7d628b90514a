"""Strict JSON: what PostgreSQL's JSONB returns unchanged, or an error with the path.

``dumps`` refuses what JSONB would refuse or change, and writes the rest so that it survives: 1e16
is written as ``10000000000000000.0``, because JSONB would turn ``1e+16`` into an integer.
``as_stored`` returns a value as the server will return it, order of keys included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from .errors import NotSerializable

MAX_DEPTH = 250  # levels in a document; `_write` needs two frames per level, Python allows 1,000
VALUE_DEPTH = 240  # levels in a value, which is stored some levels deep in a document
MAX_BYTES = 268_435_455  # JENTRY_OFFLENMASK in PostgreSQL's utils/jsonb.h

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_decoder_in_order = json.JSONDecoder(object_pairs_hook=lambda pairs: _jsonb_order(pairs))
_decode = json.JSONDecoder().raw_decode
_STR, _SEQUENCES = {str}, {list, tuple}
_SCALARS = {str, int, float, bool, type(None)}
quote = json.encoder.encode_basestring  # a string without NUL and lone surrogates, as JSON
encode_own = _encoder.encode  # unchecked: for what this package composes of strings and numbers


def dumps(value: Any, path: str = "$", depth: int = MAX_DEPTH) -> str:
    """Return ``value`` as JSON text.

    Tuples become lists; subclasses of str, int, float, list and dict become the plain type.

    Args:
        value: what to encode.
        path: its path, for error messages.
        depth: how many levels it may have.

    Raises:
        NotSerializable: a part of it does not fit; the error has the path of the first one.
    """
    try:
        text = _encoder.encode(value)
        text.encode()  # lone surrogates
    except (TypeError, ValueError, RecursionError):
        text = _write(value, path, depth)
    else:
        # The text may contain a float that JSONB would change, or a NUL: check closely.
        suspect = "e+" in text or "-0.0" in text or "\\u0000" in text
        if suspect or not _is_plain(value, depth):
            text = _write(value, path, depth)
    check_size(text, None, path)
    return text


def check_size(text: str, subject: str | None, path: str = "$") -> None:
    """Raise `NotSerializable` if ``text`` is larger than one JSONB value can be."""
    if len(text) > MAX_BYTES // 4 and (size := len(text.encode())) > MAX_BYTES:
        raise NotSerializable(path, f"{size:,} bytes, JSONB holds at most {MAX_BYTES:,}", subject)


def join(texts: Mapping[str, str]) -> str:
    """Return one JSON object whose members are given as JSON text."""
    return f"{{{','.join([f'{quote(name)}:{text}' for name, text in texts.items()])}}}"


def join_to(value: dict[str, Any], texts: Mapping[str, str]) -> str:
    """Encode ``value``, which is not empty, with further members given as JSON text."""
    return f"{dumps(value)[:-1]},{join(texts)[1:]}" if texts else dumps(value)


def canonical(text: str) -> str:
    """Return the same text for all spellings of the same JSON."""
    return dumps(as_stored(text))


def loads(text: str | bytes) -> Any:
    """Decode what `dumps` or PostgreSQL wrote; raise ValueError or RecursionError otherwise."""
    return json.loads(text)


def loads_document(text: str) -> tuple[Any, dict[str, str]]:
    """Decode a document as `loads` does; return also the text of each member of its ``steps``."""
    if text.startswith("{"):
        document, texts, _ = _split(text, 0, "steps")
        return document, texts
    return loads(text), {}


def loads_members(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Decode an object as `loads` does; return also the text of each member."""
    members, texts, _ = _split(text, 0)
    return members, texts


def _split(
    text: str, at: int, within: str | None = None
) -> tuple[dict[str, Any], dict[str, str], int]:
    """Decode the object at ``at``, which PostgreSQL has written and which is therefore valid.

    Returns:
        the object, the text of each of its members (of those of its member ``within`` if that is
        given), and where it ends.
    """
    members: dict[str, Any] = {}
    texts: dict[str, str] = {}
    end = at
    while text[at := _past(text, end + 1)] != "}":  # after the brace, or a comma
        name, end = _decode(text, at)
        at = _past(text, _past(text, end) + 1)  # after the colon
        if name == within and text[at] == "{":
            members[name], texts, end = _split(text, at)
        else:
            members[name], end = _decode(text, at)
            if within is None:
                texts[name] = text[at:end]
        end = _past(text, end)
        if text[end] == "}":
            at = end
            break
    return members, texts, at + 1


def _past(text: str, at: int) -> int:
    """Return where the spaces at ``at`` end; PostgreSQL writes no other whitespace."""
    while text[at] == " ":
        at += 1
    return at


def as_stored(text: str) -> Any:
    """Decode ``text`` to the value that a round trip through JSONB gives, keys in its order."""
    return _decoder_in_order.raw_decode(text)[0]


def _jsonb_order(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > 1:
        pairs.sort(key=_key_rank)
    return dict(pairs)


def _key_rank(pair: tuple[str, Any]) -> tuple[int, bytes]:
    key = pair[0].encode()
    return len(key), key  # lengthCompareJsonbStringValue in PostgreSQL's jsonb_util.c


def _is_plain(value: Any, depth: int) -> bool:
    """Return whether all keys are strings and the nesting is within bounds.

    The value has been encoded once, so it has no cycles.
    """
    if type(value) in _SCALARS:
        return True
    level = [value]
    for _ in range(depth):
        below: list[Any] = []
        for item in level:
            members = item
            if type(item) is dict:
                if not set(map(type, item)) <= _STR:
                    return False
                members = item.values()
            elif type(item) not in _SEQUENCES:
                return type(item) in _SCALARS
            if not set(map(type, members)) <= _SCALARS:
                below += [member for member in members if type(member) not in _SCALARS]
        if not below:
            return True
        level = below
    return False


def _write(value: Any, path: str, depth: int = MAX_DEPTH) -> str:
    """Encode slowly but exactly, keeping track of the path. This is the definition of `dumps`."""
    ancestors: set[int] = set()

    def refuse(path: str, reason: str) -> NoReturn:
        raise NotSerializable(path, reason)

    def string(value: str, path: str) -> str:
        if "\0" in value:
            refuse(path, "it contains a NUL character (\\u0000)")
        if not _is_unicode(value):
            refuse(path, "it contains a lone surrogate, which is not valid Unicode")
        return _encoder.encode(value)

    def write(value: Any, path: str) -> str:
        if value is None or isinstance(value, bool):
            return _encoder.encode(value)
        if isinstance(value, str):
            return string(value, path)
        if isinstance(value, int):
            try:
                return int.__repr__(value)
            except ValueError:
                refuse(path, "an integer of more than 4,300 digits")
        if isinstance(value, float):
            if not math.isfinite(value):
                refuse(path, f"{value} is not a JSON number")
            return _number(float(value))
        if not isinstance(value, (dict, list, tuple)):
            kind = type(value)
            name = kind.__name__ if kind.__module__ == "builtins" else _qualified(kind)
            refuse(path, f"a value of type {name}")
        if id(value) in ancestors:
            refuse(path, "it contains itself")
        if len(ancestors) >= depth:
            refuse(shorten(path), f"it is nested more than {depth} levels deep")
        ancestors.add(id(value))
        try:
            if not isinstance(value, dict):
                return f"[{','.join([write(v, f'{path}[{i}]') for i, v in enumerate(value)])}]"
            members = []
            for key, item in value.items():
                if not isinstance(key, str):
                    refuse(path, f"its key {shorten(repr(key))} is not a string")
                below = f"{path}.{key}" if key.isidentifier() else f"{path}[{key!r}]"
                members.append(f"{string(key, below)}:{write(item, below)}")
            return f"{{{','.join(members)}}}"
        finally:
            ancestors.discard(id(value))

    try:
        return write(value, path)
    except RecursionError:
        refuse(path, "it is nested too deeply for the stack that is left")


def _number(value: float) -> str:
    if value.is_integer():
        # As an int with a point: JSONB keeps neither exponents nor the sign of a zero.
        return f"{int(value)}.0"
    return float.__repr__(value)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def shorten(text: str, most: int = 80) -> str:
    """Cut ``text``, for a message, after ``most`` characters."""
    return text if len(text) <= most else f"{text[:most]}…"
