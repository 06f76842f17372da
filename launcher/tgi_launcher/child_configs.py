"""PURE: the decisions of the plan, written into the configurations of the children. Called by plan only."""

from dataclasses import dataclass
from typing import Any

from tgi_router.config import RouterConfig
from tgi_shard.config import ShardConfig

from .checks import input_limit
from .flags import Flags
from .limits import Device, Limits


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the model lies on this machine and what it is called."""

    directory: str
    id: str
    origin: str  # for the table: "flag --model-id", "embedded demo model", ...
    sha: str | None = None


@dataclass(frozen=True, slots=True)
class Ambient:
    """What else the environment said; read by launch, never here."""

    router_log_level: str = "INFO"
    shard_log_level: str = "INFO"
    omp_num_threads: int | None = None
    compute_type: str | None = None
    faults: str | None = None


@dataclass(frozen=True, slots=True)
class Decisions:
    """What the plan decided, beside what the flags say by themselves."""

    flags: Flags
    source: ModelSource
    ambient: Ambient
    device: Device
    limits: Limits
    threads: int
    hostname: str
    card: str | None  # name of the GPU, in TGI's spelling


def rope(flags: Flags) -> tuple[str | None, float | None]:
    """(scaling, factor), by TGI's rule: a factor alone means linear, a scaling alone the factor 1."""
    if flags.rope_scaling is None and flags.rope_factor is None:
        return None, None
    return flags.rope_scaling or "linear", 1.0 if flags.rope_factor is None else flags.rope_factor


def given(**values: Any) -> dict[str, Any]:
    """Those of `values` that are not None, so that the configuration's own default stands for the others."""
    return {name: value for name, value in values.items() if value is not None}


def shard_config(decisions: Decisions, rank: int) -> ShardConfig:
    """What the shard of `rank` is told."""
    flags, limits, on_cpu = decisions.flags, decisions.limits, decisions.device.kind == "cpu"
    rope_scaling, rope_factor = rope(flags)
    return ShardConfig(
        model_dir=decisions.source.directory,
        model_id=decisions.source.id,
        uds_path=flags.shard_uds_path,
        rank=rank,
        world_size=decisions.device.world_size,
        master_addr=flags.master_addr,
        master_port=flags.master_port,
        device="cpu" if on_cpu else "cuda",
        dtype=flags.dtype,
        trust_remote_code=flags.trust_remote_code,
        max_step_tokens=limits.step_tokens.value,
        max_rows=limits.rows.value,
        max_total_tokens=flags.max_total_tokens,
        max_kv_tokens=None if limits.kv_tokens is None else limits.kv_tokens.value,
        memory_fraction=flags.cuda_memory_fraction,
        num_threads=decisions.threads if on_cpu else flags.num_threads,
        rope_factor=rope_factor,
        log_level=decisions.ambient.shard_log_level,
        faults=decisions.ambient.faults,
        **given(
            rope_scaling=rope_scaling,
            watermark_gamma=flags.watermark_gamma,
            watermark_delta=flags.watermark_delta,
        ),
    )


def router_config(decisions: Decisions) -> RouterConfig:
    """What the router is told. The file with the API key is added when it is written (children.py)."""
    flags, source, limits = decisions.flags, decisions.source, decisions.limits
    compute_type = decisions.ambient.compute_type
    if compute_type is None and decisions.card is not None:
        compute_type = f"{decisions.device.world_size}-{decisions.card}"
    separate_metrics = flags.given("prometheus_port") and flags.prometheus_port != flags.listen_port
    asked_kv = flags.max_batch_total_tokens is not None and limits.kv_tokens is not None
    grace_s = float(flags.graceful_termination_timeout)
    return RouterConfig(
        model_dir=source.directory,
        model_id=source.id,
        model_sha=source.sha,
        tokenizer_config_path=flags.tokenizer_config_path,
        tool_call_parser=flags.tool_call_parser,
        reasoning_parser=flags.reasoning_parser,
        master_shard_uds_path=f"{flags.shard_uds_path}-0",
        hostname=decisions.hostname,
        port=flags.listen_port,
        prometheus_port=flags.prometheus_port if separate_metrics else 0,
        grpc_port=flags.grpc_port or 0,
        grpc_tls_cert=flags.grpc_tls_cert,
        grpc_tls_key=flags.grpc_tls_key,
        cors_allow_origin=flags.cors_allow_origin,
        open_path=flags.open_path,
        strict_params=flags.strict_params,
        aip_predict_route=flags.aip_predict_route,
        aip_health_route=flags.aip_health_route,
        payload_limit=flags.payload_limit,
        validation_workers=flags.validation_workers,
        max_concurrent_requests=flags.max_concurrent_requests,
        max_best_of=flags.max_best_of,
        max_stop_sequences=flags.max_stop_sequences,
        max_top_n_tokens=flags.max_top_n_tokens,
        max_client_batch_size=flags.max_client_batch_size,
        max_input_tokens=input_limit(flags),
        max_total_tokens=flags.max_total_tokens,
        max_batch_prefill_tokens=limits.step_tokens.value,
        max_batch_size=flags.max_batch_size,
        max_batch_total_tokens=limits.kv_tokens.value if asked_kv and limits.kv_tokens else None,
        disable_grammar_support=flags.disable_grammar_support,
        step_deadline_s=flags.step_deadline,
        # It must have told its clients and ended before the launcher's own patience does.
        graceful_termination_timeout_s=max(grace_s - 1.0, grace_s / 2),
        log_level=decisions.ambient.router_log_level,
        otlp_endpoint=flags.otlp_endpoint,
        otlp_service_name=flags.otlp_service_name,
        **given(compute_type=compute_type),
    )
