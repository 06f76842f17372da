"""Command lines and environments of the launcher's children.

Children get their configuration by argv only; the environment carries what libraries read. Secrets are taken out of it:
the API key travels in a file that only this user can read, and nobody but the download needs the Hub's token.
"""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tgi_proto.argv import to_argv

from .hub import HubSettings
from .plan import LaunchPlan
from .process import Command

_SECRETS = ("API_KEY", "HF_TOKEN", "HF_API_TOKEN", "HUGGING_FACE_HUB_TOKEN", "NGROK_AUTHTOKEN")


def _script(name: str, module: str) -> tuple[str, ...]:
    """The installed script `name` beside this interpreter; without one (a package that was only copied) its module."""
    path = Path(sys.executable).with_name(name)
    return (str(path),) if path.is_file() else (sys.executable, "-c", f"from {module} import main; main()")


@dataclass(frozen=True, slots=True)
class Programs:
    """How each child is started, before its arguments."""

    shard: tuple[str, ...]
    router: tuple[str, ...]
    download: tuple[str, ...]
    convert: tuple[str, ...]


def installed_programs() -> Programs:
    """The programs of this installation."""
    server = _script("text-generation-server", "tgi_shard.cli")
    return Programs(
        shard=(*server, "serve"),
        router=_script("text-generation-router", "tgi_router.cli"),
        download=(sys.executable, "-m", "tgi_launcher.download"),
        convert=(*server, "convert"),
    )


def _base(environ: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in environ.items() if name not in _SECRETS}
    # gRPC's C core writes lines about connections to stderr that our own records already tell.
    quiet = {"GRPC_VERBOSITY": "NONE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**quiet, **kept, "PYTHONUNBUFFERED": "1"}


def offline(environ: Mapping[str, str]) -> dict[str, str]:
    """For children that only see local directories."""
    return {**_base(environ), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def shard_environ(environ: Mapping[str, str], rank: int, world_size: int, threads: int | None) -> dict[str, str]:
    """What a shard's libraries read. The user's own OMP_* and GOMP_* settings win."""
    result = {
        **offline(environ),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "SAFETENSORS_FAST_GPU": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    if threads is not None:
        result["OMP_NUM_THREADS"] = str(threads)
    if not any(name in environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        # By default an idle OpenMP thread spins for milliseconds after each operator; on a machine with few cores that
        # is time the router does not get.
        result["GOMP_SPINCOUNT"] = "2000"
    return result


def shard_commands(plan: LaunchPlan, programs: Programs, environ: Mapping[str, str]) -> tuple[Command, ...]:
    """One command per rank."""
    return tuple(
        Command(
            name=f"shard-{config.rank}",
            argv=(*programs.shard, *to_argv(config)),
            environ=shard_environ(environ, config.rank, config.world_size, config.num_threads),
            rank=config.rank,
        )
        for config in plan.shards
    )


def router_command(
    plan: LaunchPlan, programs: Programs, environ: Mapping[str, str], api_key_file: Path | None
) -> Command:
    """The router's command. api_key_file: where `write_api_key` put it."""
    config = dataclasses.replace(plan.router, api_key_file=None if api_key_file is None else str(api_key_file))
    return Command(name="router", argv=(*programs.router, *to_argv(config)), environ=offline(environ))


def write_api_key(key: str, directory: Path) -> Path:
    """Writes the key to a file of mode 0600 in `directory`, which is the launcher's own (0700)."""
    path = directory / "api-key"
    path.touch(mode=0o600)
    path.write_bytes(key.encode(errors="surrogateescape"))
    return path


def download_command(
    model_id: str,
    revision: str,
    settings: HubSettings,
    programs: Programs,
    environ: Mapping[str, str],
    *,
    weights: bool,
    remote_code: bool,
) -> Command:
    """Fetches what the cache lacks of a model."""
    argv = [*programs.download, model_id, "--revision", revision, "--cache-dir", str(settings.cache)]
    argv += [] if weights else ["--no-weights"]
    argv += ["--remote-code"] if remote_code else []
    child_environ = {**_base(environ), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_ENDPOINT": settings.endpoint}
    if settings.token is not None:
        child_environ["HF_TOKEN"] = settings.token
    return Command(name="download", argv=tuple(argv), environ=child_environ)


def convert_command(model_dir: Path, out_dir: Path, programs: Programs, environ: Mapping[str, str]) -> Command:
    """Writes safetensors made from the PyTorch files of `model_dir` to `out_dir`."""
    argv = (*programs.convert, str(model_dir), str(out_dir), "--json-output")
    return Command(name="convert", argv=argv, environ=offline(environ))
