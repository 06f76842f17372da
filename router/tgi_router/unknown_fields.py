"""Which fields of a JSON body nobody knows: the names that the request's structs do not declare.

Pure, and derived from the structs alone. msgspec skips such fields without a word; here they get names, so that a
misspelt parameter is never taken for one that was honoured. Called by bodies.py once a body was decoded.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import inspect

# One level of a value: what lies deeper is skipped, not decoded.
_VALUE = msgspec.json.Decoder(dict[str, msgspec.Raw] | list[msgspec.Raw] | str | int | float | bool | None)
_LONGEST_NAME, _LONGEST_LIST = 64, 1024  # characters shown


@dataclass(frozen=True, slots=True)
class Known:
    """What a place in a body may hold, as far as names go.

    fields: the names an object has here; None = any. inner: those of them with names of their own. items: of an array.
    """

    fields: frozenset[str] | None = None
    inner: tuple[tuple[str, "Known"], ...] = ()
    items: "Known | None" = None


@cache
def known(*types: type) -> Known:
    """What the structs `types`, all decoded from the same body, know of it."""
    found = _known(inspect.UnionType(tuple(inspect.type_info(one) for one in types)))
    if found is None or found.fields is None:
        raise TypeError(f"{types} are no structs")
    return found


def _known(place: inspect.Type) -> Known | None:
    """None where any name will do: dictionaries, Any, and what is no container."""
    types = place.types if isinstance(place, inspect.UnionType) else (place,)
    structs = [one for one in types if isinstance(one, inspect.StructType)]
    lists = [one for one in types if isinstance(one, inspect.ListType)]
    opaque = any(isinstance(one, inspect.DictType | inspect.AnyType | inspect.RawType) for one in types)
    if opaque or not (structs or lists):
        return None
    items = _known(inspect.UnionType(tuple(one.item_type for one in lists))) if lists else None
    if not structs:
        return None if items is None else Known(items=items)
    declared = {field.encode_name: _known(field.type) for struct in structs for field in struct.fields}
    tags = {struct.tag_field for struct in structs if struct.tag_field is not None}
    inner = tuple((name, below) for name, below in declared.items() if below is not None)
    return Known(frozenset(declared) | tags, inner, items)


def unknown(body: bytes | msgspec.Raw, place: Known) -> list[str]:
    """The paths of the fields of `body` that `place` does not know, outer ones first. body: valid JSON."""
    found: list[str] = []
    _collect(_VALUE.decode(body), place, "", found)
    return found


def _collect(value: Any, place: Known, path: str, found: list[str]) -> None:
    """Appends to `found`. value: an object or array whose members are not decoded yet, or anything else."""
    if isinstance(value, dict):
        if place.fields is None:
            return
        if not value.keys() <= place.fields:
            found += [path + name for name in value if name not in place.fields]
        for name, below in place.inner:
            if name in value:
                _collect(_VALUE.decode(value[name]), below, f"{path}{name}.", found)
    elif isinstance(value, list) and place.items is not None:
        for index, item in enumerate(value):
            _collect(_VALUE.decode(item), place.items, f"{path[:-1]}[{index}].", found)


def similar(path: str, place: Known) -> str | None:
    """The name that was probably meant by `path`, one of those `unknown` found; None when there is none like it."""
    *outer, name = re.sub(r"\[\d+\]", "", path).split(".")
    found: Known | None = place
    for part in outer:
        found = dict(found.inner).get(part) if found is not None else None
        while found is not None and found.fields is None:
            found = found.items
    names = () if found is None else sorted(found.fields or ())
    return next(iter(get_close_matches(name, names, n=1, cutoff=0.8)), None)


def header_value(names: list[str]) -> str:
    """`names` as they may stand in a header: printable ASCII whatever the client wrote, and of bounded length."""
    shown: list[str] = []
    room = _LONGEST_LIST
    for name in names:
        text = quote(name[:_LONGEST_NAME], safe="[]")
        room -= len(text) + 2
        if room < 0:
            return ", ".join([*shown, f"and {len(names) - len(shown)} more"])
        shown.append(text)
    return ", ".join(shown)
