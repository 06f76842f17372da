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

from tgi_proto import logs
from tgi_proto.argv import add_flags, from_namespace

from .config import ShardConfig
from .errors import StartError

PROG = "text-generation-server"


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits 0 after SIGTERM or success, 1 after a failure, 2 on wrong usage."""
    args = _parser().parse_args(argv)
    sys.exit(_run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, allow_abbrev=False, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve one shard of a model", allow_abbrev=False)
    add_flags(serve, ShardConfig)
    serve.set_defaults(command=_serve, json_output=True)

    download = commands.add_parser(
        "download-weights", help="fetch a model and convert its weights to safetensors", allow_abbrev=False
    )
    download.add_argument("model_id", help="a Hub id, or a local directory")
    download.add_argument("--revision", help="branch, tag or commit on the Hub")
    download.add_argument("--extension", choices=[".safetensors"], default=".safetensors", help="weights to prefer")
    download.add_argument("--auto-convert", action=argparse.BooleanOptionalAction, default=True)
    download.add_argument(
        "--trust-remote-code", action=argparse.BooleanOptionalAction, help="never needed: no code is run here"
    )
    download.add_argument("--merge-lora", action=argparse.BooleanOptionalAction, help="not built yet")
    download.set_defaults(command=_download)

    convert = commands.add_parser(
        "convert", help="convert a local model's .bin weights to safetensors", allow_abbrev=False
    )
    convert.add_argument("model_dir", type=Path)
    convert.add_argument("out_dir", type=Path, nargs="?", help="where to write; default: beside the .bin files")
    convert.set_defaults(command=_convert)
    for command in (download, convert):
        command.add_argument("--logger-level", dest="log_level", default="INFO")
        command.add_argument("--json-output", action=argparse.BooleanOptionalAction, default=False)
    return parser


def _run(args: argparse.Namespace) -> int:
    """Runs the command with its logs set up; an exception becomes its one-line cause, the traceback and status 1."""
    command: Callable[[argparse.Namespace, logging.Logger], int] = args.command
    level = args.log_level.upper()
    if args.json_output:
        fields = {"rank": args.rank} if command is _serve else {}
        logger = logs.setup("tgi_shard", level, stream=sys.stdout, **fields)
    else:
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout, force=True)
        logger = logging.getLogger("tgi_shard")
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
    if args.merge_lora:
        raise StartError("`--merge-lora` is not built yet: merge the adapter with peft and give the merged model")
    path = Path(args.model_id)
    if not path.is_dir():
        path = _fetch(args.model_id, args.revision, ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])
        if not any(path.glob("*.safetensors")):
            logger.warning("no safetensors weights found for %s, downloading PyTorch weights", args.model_id)
            path = _fetch(args.model_id, args.revision, ["*.bin"])
    if any(path.glob("*.safetensors")):
        logger.info("safetensors weights are in %s", path)
        return 0
    if not args.auto_convert:
        raise StartError(f"{path} has no *.safetensors, and --no-auto-convert was given")
    return _convert(argparse.Namespace(model_dir=path, out_dir=None), logger)


def _fetch(model_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Downloads the matching files at the top of a Hub repository; returns the snapshot's directory."""
    from huggingface_hub import snapshot_download

    others = ["*/*", "*arguments*", "*args*", "*training*"]  # nested formats, and pickles that are no weights
    return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns, ignore_patterns=others))


def _convert(args: argparse.Namespace, logger: logging.Logger) -> int:
    from .convert import convert

    convert(args.model_dir, args.out_dir or args.model_dir)
    logger.info("converted %s to safetensors", args.model_dir)
    return 0
