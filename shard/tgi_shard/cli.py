"""`text-generation-server`: serve, download-weights, convert. TGI's name and subcommands.

`serve` takes the flags of ShardConfig; the launcher writes them. It says what it does by events on stdout
(tgi_proto/logs.py) from its first moment, so torch is imported only after the first of them.
"""

import argparse
import asyncio
import faulthandler
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tgi_proto import logs
from tgi_proto.argv import add_flags, from_namespace

from .config import ShardConfig
from .errors import StartError

PROG = "text-generation-server"

_Command = Callable[[argparse.Namespace, logging.Logger], int]


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits 0 after SIGTERM or success, 1 after a failure, 2 on wrong usage."""
    args = _parser().parse_args(argv)
    sys.exit(args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, allow_abbrev=False, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve one shard of a model", allow_abbrev=False)
    add_flags(serve, ShardConfig)
    serve.set_defaults(run=lambda args: _logged(_serve, args, "tgi_shard", args.log_level, {"rank": args.rank}))

    download = commands.add_parser("download-weights", help="fetch a model and convert its weights to safetensors")
    download.add_argument("model_id", help="a Hub id, or a local directory")
    download.add_argument("--revision", help="branch, tag or commit on the Hub")
    download.add_argument("--auto-convert", action=argparse.BooleanOptionalAction, default=True)
    download.add_argument("--logger-level", default="INFO")
    download.set_defaults(run=lambda args: _logged(_download, args, "tgi_shard", args.logger_level, {}))

    convert = commands.add_parser("convert", help="convert a local model's .bin weights to safetensors")
    convert.add_argument("model_dir", type=Path)
    convert.add_argument("out_dir", type=Path, nargs="?", help="where to write; default: beside the .bin files")
    convert.add_argument("--logger-level", default="INFO")
    convert.set_defaults(run=lambda args: _logged(_convert, args, "tgi_shard", args.logger_level, {}))
    return parser


def _logged(command: _Command, args: argparse.Namespace, target: str, level: str, fields: dict[str, Any]) -> int:
    """Runs a command with JSON logs; an exception becomes its one-line cause, the traceback and status 1."""
    logger = logs.setup(target, level.upper(), stream=sys.stdout, **fields)
    faulthandler.enable()
    try:
        return command(args, logger)
    except StartError as error:
        logger.critical("%s", error)
    except Exception as error:
        logger.critical("%s: %s", type(error).__name__, " ".join(str(error).split()), exc_info=True)
    return 1


def _serve(args: argparse.Namespace, logger: logging.Logger) -> int:
    config = from_namespace(ShardConfig, args)
    started = time.monotonic()
    logs.event(logger, "phase", "importing", phase="import")
    from . import start

    engine, info = start.prepare(config, logger)

    def ready() -> None:
        seconds = time.monotonic() - started
        logs.event(logger, "phase", f"ready after {seconds:.2f} s: {config.model_id}", phase="ready")

    from .server import serve

    return asyncio.run(serve(engine, info, config.uds_path, ready))


def _download(args: argparse.Namespace, logger: logging.Logger) -> int:
    path = Path(args.model_id)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        path = Path(snapshot_download(args.model_id, revision=args.revision, allow_patterns=patterns))
        if not any(path.glob("*.safetensors")):
            logger.warning("no safetensors weights found for %s, downloading PyTorch weights", args.model_id)
            path = Path(snapshot_download(args.model_id, revision=args.revision, allow_patterns=["*.bin"]))
    if any(path.glob("*.safetensors")):
        logger.info("safetensors weights are in %s", path)
        return 0
    if not args.auto_convert:
        raise StartError(f"{path} has no *.safetensors, and --no-auto-convert was given")
    return _convert(argparse.Namespace(model_dir=path, out_dir=None), logger)


def _convert(args: argparse.Namespace, logger: logging.Logger) -> int:
    from .convert import convert

    convert(args.model_dir, args.out_dir or args.model_dir)
    logger.info("converted %s to safetensors", args.model_dir)
    return 0
