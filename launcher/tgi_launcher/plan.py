"""PURE: flags + machine + model → `LaunchPlan`, what every child is told and why. Opens no file and asks no device.

Owns every resolved value and the reason for it. `checks.py` has the rules about flags alone, `memory_fit.py` the
estimate. Called by launch; tests call it with made-up machines.
"""

from dataclasses import dataclass

from tgi_router.config import RouterConfig
from tgi_shard.config import Dtype, ShardConfig

from .checks import input_limit, resolve_hostname
from .errors import ArgumentValidation
from .facts import DTYPE_BYTES, ModelFacts
from .flags import Flags
from .memory_fit import Estimate, estimate, gib
from .resources import Machine

CPU_STEP_TOKENS = 512
CUDA_STEP_TOKENS = 4096
MIN_STEP_TOKENS = 64
MAX_DEFAULT_ROWS = 256
MIN_KV_TOKENS = 256
CPU_KV_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the model lies on this machine and what it is called."""

    directory: str
    id: str
    origin: str  # for the table: "flag --model-id", "embedded demo model", ...
    sha: str | None = None


@dataclass(frozen=True, slots=True)
class Ambient:
    """What else the environment said; read by cli and launch, never here."""

    router_log_level: str = "INFO"
    shard_log_level: str = "INFO"
    omp_num_threads: int | None = None
    compute_type: str | None = None
    faults: str | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """One row of the table that is shown at start."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything the children are told."""

    shards: tuple[ShardConfig, ...]
    router: RouterConfig
    resolved: tuple[Resolved, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Device:
    kind: str  # "cpu" | "cuda"
    reason: str
    free_bytes: int  # for one rank on cuda, for all of them on cpu


@dataclass(frozen=True, slots=True)
class _Fit:
    """Limits that fit the memory."""

    step_tokens: Resolved
    kv_tokens: Resolved
    max_kv_tokens: int | None
    rows: Resolved
    memory: Resolved


def num_shards(flags: Flags, device_count: int | None) -> tuple[int, str]:
    """(number of shards, reason), by TGI's rules."""
    if flags.sharded:
        if flags.num_shard is not None:
            if flags.num_shard <= 1:
                raise ArgumentValidation("Invalid argument: `sharded` is true but `num_shard` <= 1")
            return flags.num_shard, flags.reason("num_shard")
        if device_count is None:
            raise ArgumentValidation(
                "`sharded` is true but the number of devices is unknown: give --num-shard, or set CUDA_VISIBLE_DEVICES"
            )
        if device_count <= 1:
            raise ArgumentValidation(
                f"not enough cuda devices: `sharded` is true but only found {device_count} CUDA devices"
            )
        return device_count, "visible devices, `sharded` is true"
    if flags.num_shard is not None:
        if flags.num_shard < 1:
            raise ArgumentValidation("Invalid argument: `num_shard` cannot be < 1")
        return flags.num_shard, flags.reason("num_shard")
    if flags.sharded is None and device_count is not None:
        return device_count, "devices named in the environment"
    return 1, "default"


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


def _device(flags: Flags, machine: Machine, world_size: int) -> _Device:
    if not machine.gpus:
        memory = machine.memory
        return _Device("cpu", f"no usable GPU; {gib(memory.free)} of {gib(memory.limit)} free", memory.free)
    if world_size > len(machine.gpus):
        raise ArgumentValidation(
            f"`num_shard` is {world_size}, but only {len(machine.gpus)} CUDA devices are visible: lower --num-shard"
        )
    used = machine.gpus[:world_size]
    tightest = min(used, key=lambda gpu: gpu.free_bytes)
    free = int(tightest.free_bytes * flags.cuda_memory_fraction)
    return _Device("cuda", f"{tightest.name}, {gib(tightest.free_bytes)} of {gib(tightest.total_bytes)} free", free)


def _dtype(flags: Flags, facts: ModelFacts, device: str) -> tuple[Dtype, str]:
    if flags.dtype is not None:
        return flags.dtype, flags.reason("dtype")
    if device == "cpu":
        return "float32", "default on a CPU: exact"
    match facts.weights.dtype:
        case "float16":
            return "float16", "the checkpoint's"
        case "float32":
            return "float32", "the checkpoint's"
        case _:
            return "bfloat16", "the checkpoint's"


def _rows(flags: Flags, step_tokens: int) -> Resolved:
    if flags.max_batch_size is not None:
        return Resolved("max_batch_size", str(flags.max_batch_size), flags.reason("max_batch_size"))
    limits = {
        "max_concurrent_requests": flags.max_concurrent_requests,
        "default limit; raise with --max-batch-size": MAX_DEFAULT_ROWS,
        "max_batch_prefill_tokens: a step has a token of each": step_tokens,
    }
    reason = min(limits, key=lambda name: limits[name])
    return Resolved("max_batch_size", str(limits[reason]), reason)


def _wanted_step_tokens(flags: Flags, facts: ModelFacts, device: str) -> tuple[int, str]:
    if flags.max_batch_prefill_tokens is not None:
        return flags.max_batch_prefill_tokens, flags.reason("max_batch_prefill_tokens")
    tokens, reason = (
        (CPU_STEP_TOKENS, "default on a CPU: longer prompts are computed in chunks so that streams do not stall")
        if device == "cpu"
        else (CUDA_STEP_TOKENS, "default; longer prompts are computed in chunks")
    )
    if facts.max_positions is not None and facts.max_positions < tokens:
        tokens, reason = facts.max_positions, "model max_position_embeddings"
    if flags.max_batch_total_tokens is not None and flags.max_batch_total_tokens < tokens:
        tokens, reason = flags.max_batch_total_tokens, "max_batch_total_tokens"
    return tokens, reason


def _refuse_weights(facts: ModelFacts, need: Estimate, dtype: str, copies: int, device: _Device) -> ArgumentValidation:
    smaller = " --dtype bfloat16 halves them," if DTYPE_BYTES[dtype] == 4 else ""
    spread = " --num-shard spreads them over more GPUs," if device.kind == "cuda" else ""
    return ArgumentValidation(
        f"the model does not fit: {gib(need.fixed * copies)} are needed ({gib(need.weights * copies)} of them for "
        f"{facts.weights.num_parameters / 1e9:.2f} billion parameters in {dtype}), but only {gib(device.free_bytes)} "
        f"are free ({device.reason});{smaller}{spread} or serve a smaller model"
    )


def _fit(flags: Flags, facts: ModelFacts, device: _Device, dtype: str, world_size: int) -> tuple[_Fit, list[str]]:
    """Step budget, rows and KV pool within the device's free memory. Raises ArgumentValidation when nothing fits."""
    warnings: list[str] = []
    copies = world_size if device.kind == "cpu" else 1
    step, step_reason = _wanted_step_tokens(flags, facts, device.kind)
    rows = _rows(flags, step)
    need = estimate(facts, dtype, world_size, device.kind, int(rows.value))
    left = device.free_bytes // copies - need.fixed
    if left <= 0:
        raise _refuse_weights(facts, need, dtype, copies, device)
    least_kv = (flags.max_total_tokens or MIN_KV_TOKENS) * need.kv_per_token
    if least_kv + min(step, MIN_STEP_TOKENS) * need.step_per_token > left:
        holds = max(0, left - MIN_STEP_TOKENS * need.step_per_token) // max(1, need.kv_per_token)
        raise ArgumentValidation(
            f"`max_total_tokens` is {flags.max_total_tokens or 'unset'}, but beside the weights ({gib(need.weights)}) "
            f"there is memory for only {holds} tokens of KV cache ({device.reason}): lower --max-total-tokens"
        )
    asked = step
    while step > MIN_STEP_TOKENS and least_kv + step * need.step_per_token > left:
        step = max(MIN_STEP_TOKENS, step // 2)
    if step < asked:
        step_reason = f"memory: {asked} ({step_reason}) would not fit"
        warnings.append(f"`max_batch_prefill_tokens` was reduced from {asked} to {step} to fit {device.reason}")
    left -= step * need.step_per_token
    kv, max_kv_tokens = _kv_pool(flags, facts, device, need, left, int(rows.value))
    memory = Resolved(
        "memory",
        f"{gib(need.weights * copies)} weights",
        f"{device.reason}; {gib(left * copies)} left for {need.kv_per_token * copies} bytes of KV per token",
    )
    fitted = Resolved("max_batch_prefill_tokens", str(step), step_reason)
    return _Fit(fitted, kv, max_kv_tokens, rows, memory), warnings


def _kv_pool(
    flags: Flags, facts: ModelFacts, device: _Device, need: Estimate, left: int, rows: int
) -> tuple[Resolved, int | None]:
    name = "max_batch_total_tokens"
    if flags.max_batch_total_tokens is not None:
        return Resolved(name, str(flags.max_batch_total_tokens), flags.reason(name)), flags.max_batch_total_tokens
    if device.kind == "cuda":
        about = left // max(1, need.kv_per_token)
        return Resolved(name, f"about {about}", "memory, measured at warm-up"), None
    context = flags.max_total_tokens or facts.max_positions or 4096
    useful, affordable = rows * context, int(left * CPU_KV_SHARE) // max(1, need.kv_per_token)
    if useful <= affordable:
        return Resolved(name, str(useful), "every request at full length"), useful
    return Resolved(name, str(affordable), "half of the free memory"), max(affordable, MIN_KV_TOKENS)


def _threads(flags: Flags, ambient: Ambient, machine: Machine, world_size: int) -> tuple[int, str]:
    if flags.num_threads is not None:
        return flags.num_threads, flags.reason("num_threads")
    if ambient.omp_num_threads is not None:
        return ambient.omp_num_threads, "environment OMP_NUM_THREADS"
    return max(1, machine.cores // world_size), f"{machine.cores} usable cores / {world_size} shard(s)"


def _rope(flags: Flags) -> tuple[str | None, float | None]:
    if flags.rope_scaling is None and flags.rope_factor is None:
        return None, None
    return flags.rope_scaling or "linear", 1.0 if flags.rope_factor is None else flags.rope_factor


def _context_rows(flags: Flags, facts: ModelFacts) -> list[Resolved]:
    if flags.max_total_tokens is not None:
        total = Resolved("max_total_tokens", str(flags.max_total_tokens), flags.reason("max_total_tokens"))
    elif facts.max_positions is not None:
        total = Resolved(
            "max_total_tokens", str(facts.max_positions), "model max_position_embeddings; less if memory is short"
        )
    else:
        total = Resolved("max_total_tokens", "measured", "KV memory at warm-up")
    longest = input_limit(flags)
    if longest is None:
        value = str(int(total.value) - 1) if total.value.isdigit() else "measured"
        return [total, Resolved("max_input_tokens", value, "max_total_tokens - 1")]
    name = "max_input_tokens" if flags.max_input_tokens is not None else "max_input_length"
    return [total, Resolved("max_input_tokens", str(longest), flags.reason(name))]


def make_plan(flags: Flags, source: ModelSource, facts: ModelFacts, machine: Machine, ambient: Ambient) -> LaunchPlan:
    """The plan. Raises ArgumentValidation with a sentence and the numbers when the model cannot be served like this."""
    if facts.quant_method is not None:
        raise ArgumentValidation(
            f"the checkpoint `{source.id}` is quantized with '{facts.quant_method}', and quantization is not built "
            "yet: serve the full-precision checkpoint"
        )
    world_size, shards_reason = num_shards(flags, machine.device_count)
    check_shardable(facts, world_size)
    device = _device(flags, machine, world_size)
    dtype, dtype_reason = _dtype(flags, facts, device.kind)
    fit, warnings = _fit(flags, facts, device, dtype, world_size)
    hostname, hostname_reason, hostname_warning = resolve_hostname(flags)
    if hostname_warning:
        warnings.append(hostname_warning)
    if flags.max_total_tokens and facts.max_positions and flags.max_total_tokens > facts.max_positions:
        warnings.append(
            f"`max_total_tokens` is {flags.max_total_tokens}, beyond the model's {facts.max_positions} positions"
        )
    threads, threads_reason = _threads(flags, ambient, machine, world_size)
    shards = _shard_configs(flags, source, ambient, device, fit, world_size, threads)
    router = _router_config(flags, source, machine, ambient, device, fit, world_size, hostname)
    resolved = (
        Resolved("model_id", source.id, source.origin),
        Resolved("model_dir", source.directory, f"commit {source.sha}" if source.sha else "local directory"),
        Resolved("device", device.kind, device.reason),
        Resolved("num_shard", str(world_size), shards_reason),
        Resolved("dtype", dtype, dtype_reason),
        fit.memory,
        *_context_rows(flags, facts),
        fit.step_tokens,
        fit.kv_tokens,
        fit.rows,
        Resolved("num_threads", str(threads), threads_reason),
        Resolved("hostname", hostname, hostname_reason),
        *_given_rows(flags),
    )
    return LaunchPlan(shards, router, resolved, tuple(warnings))


_SHOWN_ELSEWHERE = (
    "model_id",
    "num_shard",
    "dtype",
    "max_total_tokens",
    "max_input_tokens",
    "max_input_length",
    "max_batch_prefill_tokens",
    "max_batch_total_tokens",
    "max_batch_size",
    "num_threads",
    "hostname",
    "env",
)


def _given_rows(flags: Flags) -> list[Resolved]:
    """The port, and every other value the user gave."""
    rows = []
    for name in flags.__dataclass_fields__:
        if name == "port" or (flags.given(name) and name not in _SHOWN_ELSEWHERE):
            value = "***" if name in ("api_key", "ngrok_authtoken") else getattr(flags, name)
            rows.append(Resolved(name, str(value), flags.reason(name)))
    return rows


def _shard_configs(
    flags: Flags, source: ModelSource, ambient: Ambient, device: _Device, fit: _Fit, world_size: int, threads: int
) -> tuple[ShardConfig, ...]:
    rope_scaling, rope_factor = _rope(flags)
    watermark = {
        name: value for name in ("watermark_gamma", "watermark_delta") if (value := getattr(flags, name)) is not None
    }
    return tuple(
        ShardConfig(
            model_dir=source.directory,
            model_id=source.id,
            uds_path=flags.shard_uds_path,
            rank=rank,
            world_size=world_size,
            master_addr=flags.master_addr,
            master_port=flags.master_port,
            device="cuda" if device.kind == "cuda" else "cpu",
            dtype=flags.dtype,
            trust_remote_code=flags.trust_remote_code,
            max_step_tokens=int(fit.step_tokens.value),
            max_rows=int(fit.rows.value),
            max_total_tokens=flags.max_total_tokens,
            max_kv_tokens=fit.max_kv_tokens,
            memory_fraction=flags.cuda_memory_fraction,
            num_threads=threads if device.kind == "cpu" else flags.num_threads,
            rope_scaling="dynamic" if rope_scaling == "dynamic" else "linear" if rope_scaling else None,
            rope_factor=rope_factor,
            log_level=ambient.shard_log_level,
            otlp_service_name=flags.otlp_service_name,
            faults=ambient.faults,
            **watermark,
        )
        for rank in range(world_size)
    )


def _router_config(
    flags: Flags,
    source: ModelSource,
    machine: Machine,
    ambient: Ambient,
    device: _Device,
    fit: _Fit,
    world_size: int,
    hostname: str,
) -> RouterConfig:
    compute_type = ambient.compute_type
    if compute_type is None and device.kind == "cuda":
        compute_type = f"{world_size}-{machine.gpus[0].card}"
    separate_metrics = flags.given("prometheus_port") and flags.prometheus_port != flags.port
    return RouterConfig(
        model_dir=source.directory,
        model_id=source.id,
        model_sha=source.sha,
        tokenizer_config_path=flags.tokenizer_config_path,
        master_shard_uds_path=f"{flags.shard_uds_path}-0",
        hostname=hostname,
        port=flags.port,
        prometheus_port=flags.prometheus_port if separate_metrics else 0,
        cors_allow_origin=flags.cors_allow_origin,
        payload_limit=flags.payload_limit,
        **({} if compute_type is None else {"compute_type": compute_type}),
        validation_workers=flags.validation_workers,
        max_concurrent_requests=flags.max_concurrent_requests,
        max_best_of=flags.max_best_of,
        max_stop_sequences=flags.max_stop_sequences,
        max_top_n_tokens=flags.max_top_n_tokens,
        max_client_batch_size=flags.max_client_batch_size,
        max_input_tokens=input_limit(flags),
        max_total_tokens=flags.max_total_tokens,
        max_batch_prefill_tokens=int(fit.step_tokens.value),
        max_batch_size=flags.max_batch_size,
        max_batch_total_tokens=flags.max_batch_total_tokens,
        disable_grammar_support=flags.disable_grammar_support,
        step_deadline_s=flags.step_deadline,
        graceful_termination_timeout_s=float(flags.graceful_termination_timeout),
        log_level=ambient.router_log_level,
        otlp_service_name=flags.otlp_service_name,
    )
