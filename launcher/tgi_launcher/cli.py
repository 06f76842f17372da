"""`text-generation-launcher`: parses flags and environment into `Flags` and starts the launch.

The only module of the launcher that reads `os.environ`. Parsing follows clap where users can see it: the command line
beats the environment beats the default, an empty environment variable counts as set, a boolean variable is exactly
`true` or `false`, choices are case-sensitive, and what cannot be parsed ends with status 2. The flags: `flags.py`.
"""

import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import click

from .errors import LauncherError
from .flags import SECTIONS, Flags, Kind, Spec, specs

PROG = "text-generation-launcher"
_LIMITS = {Kind.USIZE: 2**64 - 1, Kind.U64: 2**64 - 1, Kind.U32: 2**32 - 1, Kind.U16: 2**16 - 1}


def version() -> str:
    """Version of the installed distribution."""
    from importlib import metadata  # not at the top: it imports half of the standard library

    return metadata.version("text-generation-inference")


def option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_value(name: str, spec: Spec, raw: str) -> Any:
    """The value that `raw` spells for the flag `name`. Raises click.UsageError in clap's words."""
    if spec.choices:
        if raw not in spec.choices:
            raise _invalid(name, raw, f"[possible values: {', '.join(spec.choices)}]")
        return raw
    match spec.kind:
        case Kind.STR | Kind.REPEATED:
            return raw
        case Kind.BOOL | Kind.SWITCH:
            if raw not in ("true", "false"):
                raise _invalid(name, raw, "[possible values: true, false]")
            return raw == "true"
        case Kind.F32:
            return _number(name, raw)
        case Kind.LIST:
            return tuple(_integer(name, part, Kind.USIZE) for part in raw.split(","))
    return _integer(name, raw, spec.kind)


def _integer(name: str, raw: str, kind: Kind) -> int:
    if not re.fullmatch(r"\+?[0-9]+", raw):
        raise _invalid(name, raw, f"expected a {kind.value}")
    if (value := int(raw)) > _LIMITS[kind]:
        raise _invalid(name, raw, f"expected a whole number of at most {_LIMITS[kind]}")
    return value


def _number(name: str, raw: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", raw):
        raise _invalid(name, raw, "expected a number")
    return float(raw)


def _invalid(name: str, raw: str, why: str) -> click.UsageError:
    return click.UsageError(f"invalid value '{raw}' for '{option_name(name)}': {why}")


def parse(given: Mapping[str, Any], environ: Mapping[str, str]) -> Flags:
    """`given`: what click found on the command line, None where nothing. Raises click.UsageError."""
    values: dict[str, Any] = {}
    sources: dict[str, Literal["flag", "env"]] = {}
    for name, (spec, default) in specs().items():
        raw = given.get(name)
        if raw is not None and raw != ():
            sources[name] = "flag"
        elif spec.has_env and name.upper() in environ:
            raw, sources[name] = environ[name.upper()], "env"
        else:
            values[name] = default
            continue
        values[name] = _combine(name, spec, raw)
    return Flags(**values, sources=sources)


def _combine(name: str, spec: Spec, raw: Any) -> Any:
    if raw is True:
        return True
    parts = raw if isinstance(raw, tuple) else (raw,)
    parsed = [parse_value(name, spec, part) for part in parts]
    if spec.kind is Kind.REPEATED:
        return tuple(parsed)
    if spec.kind is Kind.LIST:
        return tuple(number for numbers in parsed for number in numbers)
    return parsed[-1]


class _Command(click.Command):
    """A command whose help lists the options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                known = specs().get(parameter.name or "")
                sections.setdefault(known[0].section if known else "Other", []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def _option(name: str, spec: Spec, default: Any) -> click.Option:
    notes = [f"env {name.upper()}"] if spec.has_env else []
    if default not in (None, False, ()):
        notes.append(f"default {default}")
    help = f"{spec.help} [{'; '.join(notes)}]" if notes else spec.help
    declarations = [option_name(name), *([f"-{spec.short}"] if spec.short else [])]
    if spec.kind is Kind.SWITCH:
        return click.Option(declarations, is_flag=True, flag_value=True, default=None, help=help, type=bool)
    metavar = f"[{'|'.join(spec.choices)}]" if spec.choices else _METAVARS[spec.kind]
    multiple = spec.kind in (Kind.LIST, Kind.REPEATED)
    return click.Option(declarations, type=str, default=None, multiple=multiple, help=help, metavar=metavar)


_METAVARS = {
    Kind.STR: "TEXT",
    Kind.REPEATED: "TEXT",
    Kind.BOOL: "true|false",
    Kind.F32: "NUMBER",
    Kind.LIST: "N,N,...",
    Kind.USIZE: "N",
    Kind.U64: "N",
    Kind.U32: "N",
    Kind.U16: "N",
}


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"{PROG} {version()}")
        ctx.exit()


def command(run: Callable[[Flags, Mapping[str, str]], int]) -> click.Command:
    """The click command. `run` gets the flags and the environment and returns the exit status."""

    def callback(**given: Any) -> int:
        given.pop("version")
        environ = dict(os.environ)
        return run(parse(given, environ), environ)

    show_version = click.Option(
        ["--version", "-V"], is_flag=True, is_eager=True, callback=_print_version, help="Show the version and exit."
    )
    options = [_option(name, spec, default) for name, (spec, default) in specs().items()]
    return _Command(
        PROG,
        params=[*options, show_version],
        callback=callback,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
        help="Serves a text generation model: REST and server-sent events, TGI's and OpenAI's. "
        "No usage statistics are ever sent. Every option can also be given by its environment variable.",
    )


def _quit(signum: int, _: Any) -> typing.NoReturn:
    """A signal before anything was started: there is nothing to stop."""
    sys.exit(0)


def main(argv: Sequence[str] | None = None, programs: Any = None) -> typing.NoReturn:
    """Entry point. programs: a children.Programs that replaces the installed ones (tests)."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _quit)

    def run(flags: Flags, environ: Mapping[str, str]) -> int:
        from . import launch  # after parsing: a wrong flag is answered at once

        return launch.run(flags, environ, programs)

    try:
        status = command(run).main(args=None if argv is None else list(argv), prog_name=PROG, standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except LauncherError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
