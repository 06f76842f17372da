"""PURE: flags + machine + model → `LaunchPlan`, what every child is told and why. Opens no file and asks no device.

Owns every resolved value and its reason. `checks.py` has the rules about flags alone, `limits.py` what fits the memory,
`child_configs.py` the writing down. Called by launch; tests call it with made-up machines.
"""

from dataclasses import dataclass

from tgi_router.config import RouterConfig
from tgi_shard.config import Dtype, ShardConfig

from .checks import input_limit, resolve_hostname
from .child_configs import Ambient, Decisions, ModelSource, rope, router_config, shard_config
from .errors import ArgumentValidation
from .facts import ModelFacts
from .flags import Flags
from .limits import Device, Limit, Resolved, fit
from .memory_fit import gib
from .resources import Machine

# Shown in rows of their own, whoever gave them.
_SHOWN_ELSEWHERE = (
    *("model_id", "num_shard", "dtype", "num_threads", "hostname", "port", "env", "plan"),
    *("max_total_tokens", "max_input_tokens", "max_input_length"),
    *("max_batch_prefill_tokens", "max_batch_total_tokens", "max_batch_size"),
)
_SECRET = ("api_key", "ngrok_authtoken")


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything the children are told."""

    shards: tuple[ShardConfig, ...]
    router: RouterConfig
    resolved: tuple[Resolved, ...]
    warnings: tuple[str, ...]


def make_plan(flags: Flags, source: ModelSource, facts: ModelFacts, machine: Machine, ambient: Ambient) -> LaunchPlan:
    """The plan. Raises ArgumentValidation with a sentence and the numbers when the model cannot be served like this."""
    _check_model(flags, source, facts)
    shards = num_shards(flags, machine.device_count)
    check_shardable(facts, shards.value)
    device = _device(flags, machine, shards.value)
    dtype, dtype_reason = _dtype(flags, facts, device.kind)
    limits = fit(flags, facts, device, dtype)
    threads = _threads(flags, ambient, machine, shards.value)
    hostname, hostname_reason, hostname_warning = resolve_hostname(flags)
    card = machine.gpus[0].card if machine.gpus else None
    decisions = Decisions(flags, source, ambient, device, limits, threads.value, hostname, card)
    resolved = (
        Resolved("model_id", source.id, source.origin),
        Resolved("model_dir", source.directory, f"commit {source.sha}" if source.sha else "local directory"),
        Resolved("device", device.kind, device.reason),
        shards.row("num_shard"),
        Resolved("dtype", dtype, dtype_reason),
        *_context_rows(flags, facts),
        *limits.table,
        threads.row("num_threads"),
        Resolved("hostname", hostname, hostname_reason),
        *_given_rows(flags),
    )
    return LaunchPlan(
        shards=tuple(shard_config(decisions, rank) for rank in range(device.world_size)),
        router=router_config(decisions),
        resolved=resolved,
        warnings=(*limits.warnings, *([hostname_warning] if hostname_warning else [])),
    )


def num_shards(flags: Flags, device_count: int | None) -> Limit:
    """The number of shards, by TGI's rules."""
    if flags.sharded:
        return _all_devices(flags, device_count)
    if flags.num_shard is not None:
        if flags.num_shard < 1:
            raise ArgumentValidation("Invalid argument: `num_shard` cannot be < 1")
        return Limit(flags.num_shard, flags.reason("num_shard"))
    if flags.sharded is None and device_count is not None:
        return Limit(device_count, "devices named in the environment")
    return Limit(1, "default")


def _all_devices(flags: Flags, device_count: int | None) -> Limit:
    if flags.num_shard is not None:
        if flags.num_shard <= 1:
            raise ArgumentValidation("Invalid argument: `sharded` is true but `num_shard` <= 1")
        return Limit(flags.num_shard, flags.reason("num_shard"))
    if device_count is None:
        raise ArgumentValidation(
            "`sharded` is true but the number of devices is unknown: give --num-shard, or set CUDA_VISIBLE_DEVICES"
        )
    if device_count <= 1:
        raise ArgumentValidation(
            f"not enough cuda devices: `sharded` is true but only found {device_count} CUDA devices"
        )
    return Limit(device_count, "visible devices, `sharded` is true")


def check_shardable(facts: ModelFacts, world_size: int) -> None:
    """Raises ArgumentValidation unless the heads can be divided among `world_size` ranks."""
    if facts.num_heads % world_size:
        raise ArgumentValidation(
            f"`num_shard` is {world_size}, but it must divide the model's {facts.num_heads} attention heads"
        )
    kv = facts.num_kv_heads
    if kv and kv % world_size and world_size % kv:
        raise ArgumentValidation(
            f"`num_shard` is {world_size}, but it must divide the model's {kv} key/value heads or be a multiple of them"
        )


def _check_model(flags: Flags, source: ModelSource, facts: ModelFacts) -> None:
    if facts.quant_method is not None:
        raise ArgumentValidation(
            f"the checkpoint `{source.id}` is quantized with '{facts.quant_method}', and quantization is not built "
            "yet: serve the full-precision checkpoint"
        )
    positions, total, longest = facts.max_positions, flags.max_total_tokens, input_limit(flags)
    if positions is None or rope(flags) != (None, None):
        return
    if total is not None and total > positions:
        raise ArgumentValidation(
            f"`max_total_tokens` is {total}, but the model has {positions} positions: lower --max-total-tokens, or "
            "stretch them with --rope-scaling and --rope-factor"
        )
    if longest is not None and longest >= (total or positions):
        raise ArgumentValidation(f"`max_input_tokens`({longest}) must be < `max_total_tokens`({total or positions})")


def _device(flags: Flags, machine: Machine, world_size: int) -> Device:
    if not machine.gpus:
        memory = machine.memory
        where = " in the cgroup" if memory.limited_by == "cgroup" else ""
        reason = f"no usable GPU; {gib(memory.free)} of {gib(memory.limit)} free{where}"
        return Device("cpu", reason, memory.free, world_size)
    if world_size > len(machine.gpus):
        raise ArgumentValidation(
            f"`num_shard` is {world_size}, but only {len(machine.gpus)} CUDA devices are visible: lower --num-shard"
        )
    tightest = min(machine.gpus[:world_size], key=lambda gpu: gpu.free_bytes)
    free = int(tightest.free_bytes * flags.cuda_memory_fraction)
    reason = f"{tightest.name}, {gib(tightest.free_bytes)} of {gib(tightest.total_bytes)} free"
    return Device("cuda", reason, free, world_size)


def _dtype(flags: Flags, facts: ModelFacts, device: str) -> tuple[Dtype, str]:
    """The type the shard will choose, by the shard's own rule (start.py)."""
    if flags.dtype is not None:
        return flags.dtype, flags.reason("dtype")
    if device == "cpu":
        return "float32", "default on a CPU: exact"
    if facts.dtype == "bfloat16":
        return "bfloat16", "config.json"
    return "float16", "config.json" if facts.dtype == "float16" else "default on CUDA"


def _threads(flags: Flags, ambient: Ambient, machine: Machine, world_size: int) -> Limit:
    if flags.num_threads is not None:
        return Limit(flags.num_threads, flags.reason("num_threads"))
    if ambient.omp_num_threads is not None:
        return Limit(ambient.omp_num_threads, "environment OMP_NUM_THREADS")
    return Limit(max(1, machine.cores // world_size), f"{machine.cores} usable cores / {world_size} shard(s)")


def _context_rows(flags: Flags, facts: ModelFacts) -> list[Resolved]:
    if flags.max_total_tokens is not None:
        total = Resolved("max_total_tokens", str(flags.max_total_tokens), flags.reason("max_total_tokens"))
    elif facts.max_positions is not None:
        total = Resolved("max_total_tokens", str(facts.max_positions), "model max_position_embeddings")
    else:
        total = Resolved("max_total_tokens", "measured", "KV memory at warm-up")
    longest = input_limit(flags)
    if longest is None:
        value = str(int(total.value) - 1) if total.value.isdigit() else "measured"
        return [total, Resolved("max_input_tokens", value, "max_total_tokens - 1")]
    name = "max_input_tokens" if flags.max_input_tokens is not None else "max_input_length"
    return [total, Resolved("max_input_tokens", str(longest), flags.reason(name))]


def _given_rows(flags: Flags) -> list[Resolved]:
    """The port that is listened on, and every other value the user gave."""
    origin = "port" if flags.listen_port == flags.port else "aip_http_port"
    rows = [Resolved("port", str(flags.listen_port), flags.reason(origin))]
    for name in flags.__dataclass_fields__:
        if flags.given(name) and name not in _SHOWN_ELSEWHERE:
            value = "***" if name in _SECRET else getattr(flags, name)
            rows.append(Resolved(name, str(value), flags.reason(name)))
    return rows
