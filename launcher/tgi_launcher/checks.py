"""Rules about flags that need neither the model nor the machine, checked before anything is downloaded. PURE.

`check_flags` raises on what is wrong or not built yet and returns sentences about what is accepted without effect.
Sentences that TGI prints too are TGI's. Called by launch, before `plan`.
"""

import ipaddress
import re
from collections.abc import Mapping

from .errors import ArgumentValidation
from .flags import Flags

_NOT_BUILT = {
    "quantize": "quantization is not built yet: serve the full-precision checkpoint",
    "kv_cache_dtype": "a KV cache type of its own is not built yet: the cache has the type of --dtype",
    "ngrok": "tunnels through ngrok are not built: run ngrok beside the server",
}
_HINTS = {
    "waiting_served_ratio": "requests are admitted at every step",
    "max_waiting_tokens": "requests are admitted at every step",
    "cuda_graphs": "steps run eagerly until CUDA graphs are built; results are the same",
    "disable_custom_kernels": "there are no custom kernels to disable",
    "ngrok_authtoken": "ngrok is not used",
    "ngrok_edge": "ngrok is not used",
}
_POSITIVE = (
    *("validation_workers", "max_batch_size", "max_total_tokens", "max_input_tokens", "max_input_length"),
    *("max_batch_prefill_tokens", "max_concurrent_requests", "max_client_batch_size", "max_best_of"),
    *("payload_limit", "num_threads", "step_deadline", "stall_timeout", "grpc_port"),
)
_MAX_THREADS = 4096  # beyond it, thread pools crash in native code
# Variables that TGI's processes and its SageMaker image read beside the flags, and why they change nothing here.
_ENVIRONMENT_HINTS = {
    "ATTENTION": "the attention backend is chosen by the device; results are the same",
    "PREFIX_CACHING": "the prefix cache is always on; results are the same",
    "PREFILL_CHUNKING": "prompts are always computed in chunks",
    "USE_FLASH_ATTENTION": "the attention backend is chosen by the device; results are the same",
    "TGI_WIGGLE_ROOM": "memory is measured, not estimated from a table; use --cuda-memory-fraction",
    "ROCM_USE_FLASH_ATTN_V2_TRITON": "AMD devices are not supported",
    "EXLLAMA_VERSION": "quantization is not built yet",
    "DISABLE_EXLLAMA": "quantization is not built yet",
    "USE_CUTLASS_W8A8": "quantization is not built yet",
    "HF_MODEL_ID": "set MODEL_ID",
    "HF_MODEL_REVISION": "set REVISION",
    "HF_MODEL_QUANTIZE": "quantization is not built yet",
    "HF_MODEL_TRUST_REMOTE_CODE": "set TRUST_REMOTE_CODE",
    "SM_NUM_GPUS": "set NUM_SHARD",
}


def refuse_unbuilt(flags: Flags) -> None:
    """Raises ArgumentValidation for an option whose silent absence would change results or be relied upon."""
    for name, sentence in _NOT_BUILT.items():
        value = getattr(flags, name)
        if value not in (None, False):
            raise ArgumentValidation(f"`{name}` is {value!r}, but {sentence}")
    if flags.speculate:
        raise ArgumentValidation(
            f"`speculate` is {flags.speculate}, but speculation is not built yet: leave it unset or give 0"
        )
    if flags.lora_adapters:
        raise ArgumentValidation(
            f"`lora_adapters` is '{flags.lora_adapters}', but adapters are not built yet: merge them into the model"
        )


def check_flags(flags: Flags, environ: Mapping[str, str]) -> list[str]:
    """Raises ArgumentValidation when flags are wrong by themselves; returns notices about those without effect."""
    refuse_unbuilt(flags)
    _check_limits(flags)
    _check_ranges(flags)
    _check_grpc(flags)
    notices = [f"`{name}` has no effect: {why}" for name, why in _HINTS.items() if flags.given(name)]
    notices += [f"`{name}` has no effect: {why}" for name, why in _ENVIRONMENT_HINTS.items() if name in environ]
    if flags.trust_remote_code:
        notices.append(f"`trust_remote_code` is set: code that came with the model `{flags.model_id}` may run")
    return notices


def input_limit(flags: Flags) -> int | None:
    """The longest prompt, by either of its two names."""
    return flags.max_input_length if flags.max_input_tokens is None else flags.max_input_tokens


def _check_limits(flags: Flags) -> None:
    if flags.max_input_tokens is not None and flags.max_input_length is not None:
        raise ArgumentValidation(
            f"Both `max_input_tokens` ({flags.max_input_tokens}) and `max_input_length` ({flags.max_input_length}) are "
            "set. Please define only `max_input_tokens` as `max_input_length is deprecated for naming consistency."
        )
    longest, total = input_limit(flags), flags.max_total_tokens
    if longest is not None and total is not None and longest >= total:
        raise ArgumentValidation(f"`max_input_tokens`({longest}) must be < `max_total_tokens`({total})")
    pool = flags.max_batch_total_tokens
    if pool is not None:
        if total is not None and total > pool:
            raise ArgumentValidation(
                f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {pool}"
            )
        prefill = flags.max_batch_prefill_tokens
        if prefill is not None and prefill > pool:
            raise ArgumentValidation(
                f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {prefill} and {pool}"
            )


def _check_ranges(flags: Flags) -> None:
    for name in _POSITIVE:
        value = getattr(flags, name)
        if value is not None and value <= 0:
            raise ArgumentValidation(f"`{name}` must be > 0")
    if flags.model_id == "":
        raise ArgumentValidation("`model_id` is empty: give a Hub id or a directory, or leave it out for the demo")
    if flags.otlp_endpoint == "":
        raise ArgumentValidation("`otlp_endpoint` is empty: give http://host:4317, or leave it out to send no traces")
    if flags.api_key == "":
        raise ArgumentValidation("`api_key` is empty: give a key, or leave it out to serve without one")
    if not 0 < flags.cuda_memory_fraction <= 1:
        raise ArgumentValidation(f"`cuda_memory_fraction` must be in (0, 1]. Given: {flags.cuda_memory_fraction}")
    if flags.watermark_gamma is not None and not 0 < flags.watermark_gamma < 1:
        raise ArgumentValidation(f"`watermark_gamma` must be in (0, 1). Given: {flags.watermark_gamma}")
    for name in ("aip_predict_route", "aip_health_route"):
        route = getattr(flags, name)
        if route is not None and not re.fullmatch(r"/[^{}\s]*", route):
            raise ArgumentValidation(f"`{name}` must be a path that begins with '/'. Given: '{route}'")
    for path in flags.open_path:
        if not path.startswith("/"):
            raise ArgumentValidation(f"`open_path` must be a path that begins with '/'. Given: '{path}'")
    if flags.num_threads is not None and flags.num_threads > _MAX_THREADS:
        raise ArgumentValidation(f"`num_threads` must be <= {_MAX_THREADS}. Given: {flags.num_threads}")
    if flags.rope_factor is not None and flags.rope_factor <= 0:
        raise ArgumentValidation(f"`rope_factor` must be > 0. Given: {flags.rope_factor}")


def _check_grpc(flags: Flags) -> None:
    taken = {"port": flags.listen_port}
    if flags.given("prometheus_port"):
        taken["prometheus_port"] = flags.prometheus_port
    for name, port in taken.items():
        if flags.grpc_port == port:
            raise ArgumentValidation(f"`grpc_port` and `{name}` are both {port}: choose another with --grpc-port")
    for name, other in (("grpc_tls_cert", "grpc_tls_key"), ("grpc_tls_key", "grpc_tls_cert")):
        if getattr(flags, name) is None:
            continue
        for needed in (other, "grpc_port"):
            if getattr(flags, needed) is None:
                raise ArgumentValidation(f"`{name}` needs `{needed}`: give --{needed.replace('_', '-')} too")


def resolve_hostname(flags: Flags) -> tuple[str, str, str | None]:
    """(IP address, reason, warning). docker and some shells export HOSTNAME, so a name is not an error."""
    if flags.hostname == "localhost":
        return "127.0.0.1", f"{flags.reason('hostname')}=localhost", None
    try:
        return str(ipaddress.ip_address(flags.hostname)), flags.reason("hostname"), None
    except ValueError:
        warning = f"Invalid hostname, defaulting to 0.0.0.0 (`hostname` is '{flags.hostname}', not an IP address)"
        return "0.0.0.0", f"{flags.reason('hostname')} is not an IP address", warning
