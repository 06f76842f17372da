"""Frozen dataclass ⇄ command line, for the processes the launcher starts.

A child's configuration is one dataclass whose fields are its flags: `to_argv` writes the line the launcher logs and
runs, `from_argv` reads it back, so any child can be started by hand with exactly that line. People use the launcher's
flags (launcher/tgi_launcher/cli.py); these are between our own processes.

Field types: str, int, float, bool, `Literal[...]` of strings, any of them `| None`, and `tuple[str, ...]` or
`tuple[int, ...]` (the flag is repeated). A field is declared with `flag(...)`, which holds its help text.
"""

import argparse
import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

_NO_DEFAULT: Any = dataclasses.MISSING


def flag(help: str, default: Any = _NO_DEFAULT) -> Any:
    """A dataclass field that is a flag. help: one sentence, with the unit. Without a default the flag is required."""
    return dataclasses.field(default=default, metadata={"help": help})


def _unwrap(annotation: Any) -> tuple[Any, bool, bool, list[str] | None]:
    """(scalar type, is optional, is repeated, choices) of a field's type."""
    optional = repeated = False
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        (annotation,) = [a for a in typing.get_args(annotation) if a is not type(None)]
        optional = True
    if typing.get_origin(annotation) is tuple:
        annotation, repeated = typing.get_args(annotation)[0], True
    if typing.get_origin(annotation) is typing.Literal:
        return str, optional, repeated, list(typing.get_args(annotation))
    return annotation, optional, repeated, None


def to_argv(config: Any) -> list[str]:
    """Flags that reproduce `config`; values equal to the default are left out."""
    argv: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None or value == field.default:
            continue
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(name if value else "--no-" + name[2:])
        elif isinstance(value, tuple):
            argv += [part for item in value for part in (name, str(item))]
        else:
            argv += [name, str(value)]
    return argv


def add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Adds one flag per field of `cls`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = "--" + field.name.replace("_", "-")
        scalar, _, repeated, choices = _unwrap(hints[field.name])
        required = field.default is dataclasses.MISSING
        options: dict[str, Any] = {"help": field.metadata.get("help"), "required": required, "dest": field.name}
        if not required:
            options["default"] = field.default
        if scalar is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        elif repeated:
            options["default"] = None
            parser.add_argument(name, type=scalar, action="append", choices=choices, **options)
        else:
            parser.add_argument(name, type=scalar, choices=choices, **options)


def from_namespace(cls: type[T], namespace: argparse.Namespace) -> T:
    """The `cls` that parsed flags describe."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = getattr(namespace, field.name)
        if isinstance(value, list):
            value = tuple(value)
        values[field.name] = field.default if value is None and field.default is not dataclasses.MISSING else value
    return cls(**values)


def from_argv(cls: type[T], argv: list[str], *, prog: str, description: str | None = None) -> T:
    """Parses `argv`; prints usage and exits with status 2 when it is wrong."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    add_flags(parser, cls)
    return from_namespace(cls, parser.parse_args(argv))
