"""One launch from parsed flags to exit status: checks, model, plan, children, supervision, clean-up. Called by cli.

The order is the order of cost: what needs no model is checked first, what needs no loading second, and processes start
only when the plan stands.
"""

import asyncio
import contextlib
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tgi_demo

from . import children, console, gpu, preflight, resources
from .checks import check_flags
from .child_configs import Ambient, ModelSource
from .children import Programs, installed_programs
from .console import Console, LogLevels
from .env_report import report
from .errors import ArgumentValidation
from .explain import Evidence
from .facts import read_model
from .fetch import Fetcher
from .flags import Flags
from .guard import Guard, remove
from .limits import Resolved
from .plan import LaunchPlan, make_plan, num_shards
from .process import Exited, Record
from .resources import Machine
from .signals import Signals
from .supervisor import Settings, Signalled, Supervisor, peak_rss_bytes, reachable

_log = logging.getLogger("tgi_launcher")


@dataclass(frozen=True, slots=True)
class Launch:
    """What every part of one launch needs."""

    flags: Flags
    environ: Mapping[str, str]
    programs: Programs
    console: Console
    levels: LogLevels
    begun_s: float


def run(flags: Flags, environ: Mapping[str, str], programs: Programs | None = None) -> int:
    """Exit status of a launch that ended in an orderly way; raises LauncherError otherwise."""
    out = console.Console(sys.stdout, json_output=flags.json_output, color=console.wants_color(sys.stdout, environ))
    levels = console.parse_log_level(environ.get("LOG_LEVEL"))
    console.setup(out, levels.launcher)
    launch = Launch(flags, environ, programs or installed_programs(), out, levels, resources.process_start_s())
    if levels.not_understood:
        _log.warning("LOG_LEVEL: %s not understood; known are debug, info, warn, error", list(levels.not_understood))
    for notice in check_flags(flags, environ):
        _log.warning("%s", notice)
    machine = survey(environ)
    if flags.env:
        _log.info("%s", report(machine, environ))
    world_size = num_shards(flags, machine.device_count).value
    preflight.check_files(flags)
    preflight.check_ports(flags)
    launch = dataclasses.replace(launch, flags=_with_master_port(flags, world_size))
    for warning in preflight.machine_warnings(world_size, "cuda" if machine.gpus else "cpu"):
        _log.warning("%s", warning)
    return asyncio.run(_run(launch, machine, world_size))


def _with_master_port(flags: Flags, world_size: int) -> Flags:
    port = preflight.master_port(flags, world_size)
    if port != flags.master_port:
        _log.info("Port %d is taken, so the shards meet at %d (--master-port)", flags.master_port, port)
    return dataclasses.replace(flags, master_port=port)


def survey(environ: Mapping[str, str]) -> Machine:
    """What this machine offers to the children."""
    gpus = gpu.query()
    visible = gpu.visible(gpus, environ)
    usable = visible if visible and gpu.torch_has_cuda() else ()
    if visible and not usable:
        _log.warning("%d GPU(s) found, but the installed torch was built without CUDA: using the CPU", len(visible))
    return Machine(resources.memory(), resources.usable_cores(), usable, gpu.device_count(environ, gpus))


async def _run(launch: Launch, machine: Machine, world_size: int) -> int:
    """Everything that has to be cleaned up again."""
    queue: asyncio.Queue[Record | Exited | Signalled] = asyncio.Queue()
    with contextlib.ExitStack() as stack:
        lock = preflight.SocketLock(launch.flags.shard_uds_path, world_size)
        stack.callback(lock.release)
        guard = Guard()
        stack.callback(guard.done)
        guard.watch_path(lock.path)
        runtime_dir = Path(stack.enter_context(_private_directory(guard)))
        signals = Signals(lambda number: queue.put_nowait(Signalled(number)))
        signals.install()
        stack.enter_context(signals.terminal(sys.stdout))
        source = await _find_model(launch, guard, queue, runtime_dir)
        if source is None:
            return 0  # a signal came first
        facts = read_model(Path(source.directory))
        plan = make_plan(launch.flags, source, facts, machine, _ambient(launch))
        _show_plan(launch, plan)
        if launch.flags.plan:
            return 0
        supervisor = Supervisor(
            _settings(launch, plan, runtime_dir, guard), launch.console, guard, queue, _evidence_of(machine, plan)
        )
        signals.on_second = supervisor.kill_all
        return await supervisor.run()


@contextlib.contextmanager
def _private_directory(guard: Guard) -> Iterator[str]:
    """A directory of mode 0700 that is gone when the launcher is."""
    path = tempfile.mkdtemp(prefix="text-generation-launcher-")
    guard.watch_path(path)
    try:
        yield path
    finally:
        remove(path)


async def _find_model(
    launch: Launch, guard: Guard, queue: "asyncio.Queue[Record | Exited | Signalled]", runtime_dir: Path
) -> ModelSource | None:
    """The model on this machine, fetched and converted when need be; None when a signal came first."""
    if launch.flags.model_id is None:
        directory = tgi_demo.model_path()
        _log.info("No --model-id given: serving the embedded demo model %s from %s", tgi_demo.MODEL_ID, directory)
        if not (directory / "config.json").is_file():
            raise ArgumentValidation(f"the demo model is not installed ({directory} is incomplete): give --model-id")
        return ModelSource(str(directory), tgi_demo.MODEL_ID, "embedded demo model")
    fetcher = Fetcher(launch.flags, launch.environ, launch.programs, launch.console, guard, queue, runtime_dir)
    return await fetcher.model()


def _ambient(launch: Launch) -> Ambient:
    threads = launch.environ.get("OMP_NUM_THREADS", "")
    return Ambient(
        router_log_level=launch.levels.router,
        shard_log_level=launch.levels.shard,
        omp_num_threads=int(threads) if threads.isdigit() and int(threads) > 0 else None,
        compute_type=launch.environ.get("COMPUTE_TYPE") or None,
        faults=launch.environ.get("TGI_FAULTS") or None,
    )


def _settings(launch: Launch, plan: LaunchPlan, runtime_dir: Path, guard: Guard) -> Settings:
    flags = launch.flags
    key_file = None if flags.api_key is None else children.write_api_key(flags.api_key, runtime_dir)
    for rank in range(len(plan.shards)):
        guard.watch_path(f"{flags.shard_uds_path}-{rank}")
    return Settings(
        shards=children.shard_commands(plan, launch.programs, launch.environ),
        router=children.router_command(plan, launch.programs, launch.environ, key_file),
        uds_path=flags.shard_uds_path,
        stall_timeout_s=flags.stall_timeout,
        grace_s=float(flags.graceful_termination_timeout),
        restart_budget=flags.restart_budget,
        begun_s=launch.begun_s,
        curl=lambda address: curl_line(address, with_key=flags.api_key is not None),
    )


def curl_line(address: str, *, with_key: bool) -> str:
    """A request to try."""
    key = ' -H "Authorization: Bearer $API_KEY"' if with_key else ""
    body = '{"inputs": "if __name__ ==", "parameters": {"max_new_tokens": 40}}'
    return f"curl {reachable(address)}/generate -H 'Content-Type: application/json'{key} -d '{body}'"


def _evidence_of(machine: Machine, plan: LaunchPlan) -> Callable[[], Evidence]:
    """A function that gathers what the machine knows when somebody dies."""
    kills_before = machine.memory.oom_kills

    def gather() -> Evidence:
        nonlocal kills_before
        memory = resources.memory()
        kills, kills_before = memory.oom_kills - kills_before, memory.oom_kills
        return Evidence(
            oom_kills=kills,
            memory_limit=memory.limit,
            memory_limited_by=memory.limited_by,
            peak_rss=peak_rss_bytes(),
            shm_bytes=resources.shm_bytes(),
            cpu_flags=resources.cpu_flags(),
            device=plan.shards[0].device,
        )

    return gather


def table(rows: tuple[Resolved, ...]) -> str:
    """The resolved configuration as aligned columns: name, value, reason."""
    names = max(len(row.name) for row in rows)
    values = min(40, max(len(row.value) for row in rows))
    return "\n".join(f"  {row.name:<{names}}  {row.value:<{values}}  {row.reason}" for row in rows)


def _show_plan(launch: Launch, plan: LaunchPlan) -> None:
    for warning in plan.warnings:
        _log.warning("%s", warning)
    if launch.flags.json_output:
        resolved = {row.name: {"value": row.value, "reason": row.reason} for row in plan.resolved}
        _log.info("Resolved configuration", extra={"configuration": resolved})
    else:
        _log.info("Resolved configuration:\n%s", table(plan.resolved))
