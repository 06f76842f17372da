"""PURE: limits that fit the memory of the device, each with its reason: step budget, rows, KV pool.

The estimate is `memory_fit.py`'s; what the user asked for is kept where it fits and never exceeded. Called by plan.
"""

from dataclasses import dataclass

from .errors import ArgumentValidation
from .facts import DTYPE_BYTES, ModelFacts
from .flags import Flags
from .memory_fit import Estimate, estimate, gib

CPU_STEP_TOKENS = 512
CUDA_STEP_TOKENS = 4096
MIN_STEP_TOKENS = 64
MAX_DEFAULT_ROWS = 256
MIN_KV_TOKENS = 256
CPU_KV_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Resolved:
    """One row of the table that is shown at start."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Device:
    """Where the ranks compute."""

    kind: str  # "cpu" | "cuda"
    reason: str
    free_bytes: int  # for one rank on cuda, for all of them together on cpu
    world_size: int

    @property
    def copies(self) -> int:
        """Ranks that share `free_bytes`."""
        return self.world_size if self.kind == "cpu" else 1


@dataclass(frozen=True, slots=True)
class Limit:
    """A number and why it is this one."""

    value: int
    reason: str

    def row(self, name: str) -> Resolved:
        return Resolved(name, str(self.value), self.reason)


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits. `kv_tokens` None: measured at warm-up."""

    step_tokens: Limit
    rows: Limit
    kv_tokens: Limit | None
    table: tuple[Resolved, ...]
    warnings: tuple[str, ...]


def fit(flags: Flags, facts: ModelFacts, device: Device, dtype: str) -> Limits:
    """The limits. Raises ArgumentValidation with the numbers when the model cannot run in this memory."""
    wanted = _wanted_step_tokens(flags, facts, device.kind)
    rows = _rows(flags, wanted.value)
    need = estimate(facts, dtype, device.world_size, device.kind, rows.value)
    left = device.free_bytes // device.copies - need.fixed
    if left <= 0:
        raise _weights_do_not_fit(facts, need, dtype, device)
    step, warnings = _reduced_step(flags, wanted, need, left, device)
    left -= step.value * need.step_per_token
    kv, kv_row, kv_warnings = _kv_pool(flags, facts, device, left // max(1, need.kv_per_token), rows.value)
    memory = Resolved(
        "memory",
        f"{gib(need.weights * device.copies)} weights",
        f"{gib(left * device.copies)} left, {need.kv_per_token * device.copies} bytes of KV per token",
    )
    table = (memory, step.row("max_batch_prefill_tokens"), kv_row, rows.row("max_batch_size"))
    return Limits(step, rows, kv, table, (*warnings, *kv_warnings))


def _wanted_step_tokens(flags: Flags, facts: ModelFacts, device: str) -> Limit:
    if flags.max_batch_prefill_tokens is not None:
        return Limit(flags.max_batch_prefill_tokens, flags.reason("max_batch_prefill_tokens"))
    limit = Limit(CUDA_STEP_TOKENS, "default; longer prompts are computed in chunks")
    if device == "cpu":
        limit = Limit(CPU_STEP_TOKENS, "default on a CPU: long prompts come in chunks, so streams do not stall")
    if facts.max_positions is not None and facts.max_positions < limit.value:
        limit = Limit(facts.max_positions, "model max_position_embeddings")
    if flags.max_batch_total_tokens is not None and flags.max_batch_total_tokens < limit.value:
        limit = Limit(flags.max_batch_total_tokens, "max_batch_total_tokens")
    return limit


def _rows(flags: Flags, step_tokens: int) -> Limit:
    if flags.max_batch_size is not None:
        return Limit(flags.max_batch_size, flags.reason("max_batch_size"))
    return min(
        Limit(flags.max_concurrent_requests, "max_concurrent_requests"),
        Limit(MAX_DEFAULT_ROWS, "default limit; raise with --max-batch-size"),
        Limit(step_tokens, "max_batch_prefill_tokens: a step has a token of each request"),
        key=lambda limit: limit.value,
    )


def _reduced_step(
    flags: Flags, wanted: Limit, need: Estimate, left: int, device: Device
) -> tuple[Limit, tuple[str, ...]]:
    """The step budget, halved until its activations and the least KV fit into `left`."""
    least_kv = (flags.max_total_tokens or MIN_KV_TOKENS) * need.kv_per_token
    smallest = min(wanted.value, MIN_STEP_TOKENS)
    if least_kv + smallest * need.step_per_token > left:
        holds = max(0, left - smallest * need.step_per_token) // max(1, need.kv_per_token)
        raise ArgumentValidation(
            f"`max_total_tokens` is {flags.max_total_tokens or 'unset'}, but beside the weights ({gib(need.weights)}) "
            f"there is memory for only {holds} tokens of KV cache ({device.reason}): lower --max-total-tokens"
        )
    tokens = wanted.value
    while tokens > smallest and least_kv + tokens * need.step_per_token > left:
        tokens = max(smallest, tokens // 2)
    if tokens == wanted.value:
        return wanted, ()
    warning = f"`max_batch_prefill_tokens` was reduced from {wanted.value} to {tokens} to fit {device.reason}"
    return Limit(tokens, f"memory; {wanted.value} ({wanted.reason}) would not fit"), (warning,)


def _kv_pool(
    flags: Flags, facts: ModelFacts, device: Device, affordable: int, rows: int
) -> tuple[Limit | None, Resolved, tuple[str, ...]]:
    """(limit, its row, warnings). affordable: tokens whose KV fits into what is left."""
    name = "max_batch_total_tokens"
    asked = flags.max_batch_total_tokens
    if asked is not None and asked <= affordable:
        limit = Limit(asked, flags.reason(name))
        return limit, limit.row(name), ()
    if device.kind == "cuda" and asked is None:
        return None, Resolved(name, f"about {affordable}", "memory, measured at warm-up"), ()
    if asked is not None:
        limit = Limit(affordable, f"memory; {asked} ({flags.reason(name)}) would not fit")
        return limit, limit.row(name), (f"`{name}` was reduced from {asked} to {affordable} to fit {device.reason}",)
    context = flags.max_total_tokens or facts.max_positions or 4096
    least = flags.max_total_tokens or MIN_KV_TOKENS
    share = Limit(max(least, int(affordable * CPU_KV_SHARE)), "half of the free memory")
    limit = min(Limit(rows * context, "every request at full length"), share, key=lambda limit: limit.value)
    return limit, limit.row(name), ()


def _weights_do_not_fit(facts: ModelFacts, need: Estimate, dtype: str, device: Device) -> ArgumentValidation:
    smaller = " --dtype bfloat16 halves them," if DTYPE_BYTES[dtype] == 4 else ""
    spread = " --num-shard spreads them over more GPUs," if device.kind == "cuda" else ""
    return ArgumentValidation(
        f"the model does not fit: {gib(need.fixed * device.copies)} are needed ({gib(need.weights * device.copies)} of "
        f"them for {facts.weights.num_parameters / 1e9:.2f} billion parameters in {dtype}), but only "
        f"{gib(device.free_bytes)} are free ({device.reason});{smaller}{spread} or serve a smaller model"
    )
