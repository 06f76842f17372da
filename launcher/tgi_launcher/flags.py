"""Every flag of `text-generation-launcher`, once: name, type, default, help, section. Data only.

A flag's command-line name is its field's name with dashes, its environment variable the name in capitals; both follow
TGI 3.3.6. `cli.py` parses into `Flags`, `plan.py` reads it, and the reference page is generated from it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

QUANTIZE = (
    "awq",
    "compressed-tensors",
    "eetq",
    "exl2",
    "gptq",
    "marlin",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "fp8",
)
SECTIONS = (
    "Model",
    "Devices and processes",
    "Limits",
    "HTTP server",
    "Logs and traces",
    "Lifecycle",
    "Scheduling hints of TGI",
    "Not built yet (refused)",
)


class Kind(Enum):
    """How a value is spelled, after clap's types. The value: what the parser's sentence calls it."""

    STR = "text"
    USIZE = "whole number"
    U64 = "whole number (64 bits)"
    U32 = "whole number (32 bits)"
    U16 = "whole number (16 bits)"
    F32 = "number"
    BOOL = "true or false"
    SWITCH = "switch"
    LIST = "comma-separated whole numbers"
    REPEATED = "text, repeatable"


@dataclass(frozen=True, slots=True)
class Spec:
    """What is known about a flag besides its name, type and default."""

    help: str
    section: str
    kind: Kind
    choices: tuple[str, ...] = ()
    short: str | None = None
    has_env: bool = True


def _flag(
    section: str,
    help: str,
    kind: Kind = Kind.STR,
    default: Any = None,
    *,
    choices: tuple[str, ...] = (),
    short: str | None = None,
    has_env: bool = True,
    secret: bool = False,
) -> Any:
    spec = Spec(help, section, kind, choices, short, has_env)
    return field(default=default, metadata={"spec": spec}, repr=not secret)


_MODEL, _DEVICES, _LIMITS, _HTTP, _LOGS, _LIFE, _HINTS, _LATER = SECTIONS


@dataclass(frozen=True, slots=True)
class Flags:
    """The parsed command line and environment. None: not given. `sources` says where each given value came from."""

    model_id: str | None = _flag(_MODEL, "Hub id or local directory. Without it the embedded demo model is served.")
    revision: str | None = _flag(_MODEL, "Branch, tag, commit or refs/pr/N of the model on the Hub.")
    dtype: Literal["float16", "bfloat16", "float32"] | None = _flag(
        _MODEL,
        "Type of weights and KV cache. Unset: the checkpoint's on a GPU, float32 on a CPU.",
        choices=("float16", "bfloat16", "float32"),
    )
    trust_remote_code: bool = _flag(_MODEL, "Allow code from the model's repository to run.", Kind.SWITCH, False)
    rope_scaling: Literal["linear", "dynamic"] | None = _flag(
        _MODEL, "Replaces the model's rope scaling.", choices=("linear", "dynamic")
    )
    rope_factor: float | None = _flag(_MODEL, "Factor of the rope scaling; alone it means linear.", Kind.F32)
    tokenizer_config_path: str | None = _flag(_MODEL, "File that replaces tokenizer_config.json (chat template).")
    tool_call_parser: str = _flag(
        _MODEL, "Format of the model's tool calls; auto: found out from its chat template.", default="auto"
    )
    reasoning_parser: str = _flag(
        _MODEL, "Marks around the model's thoughts; auto: found out; none: not separated.", default="auto"
    )
    huggingface_hub_cache: str | None = _flag(_MODEL, "Cache directory of the Hub.")
    weights_cache_override: str | None = _flag(_MODEL, "Directory with the weight files, used instead of the cache.")
    watermark_gamma: float | None = _flag(_MODEL, "Share of the watermark's green list; 0.5 when unset.", Kind.F32)
    watermark_delta: float | None = _flag(_MODEL, "Bias of the watermark's green list; 2.0 when unset.", Kind.F32)

    sharded: bool | None = _flag(_DEVICES, "`--sharded true` uses every visible GPU.", Kind.BOOL)
    num_shard: int | None = _flag(_DEVICES, "Number of shard processes (tensor parallel).", Kind.USIZE)
    shard_uds_path: str = _flag(
        _DEVICES, "Prefix of the shards' Unix sockets; the rank is appended.", default="/tmp/text-generation-server"
    )
    master_addr: str = _flag(_DEVICES, "Rendezvous address of the shards.", default="localhost")
    master_port: int = _flag(_DEVICES, "Rendezvous port of the shards.", Kind.USIZE, 29500)
    num_threads: int | None = _flag(
        _DEVICES, "Compute threads of each shard on a CPU. Unset: usable cores divided by the shards.", Kind.USIZE
    )
    cuda_memory_fraction: float = _flag(_DEVICES, "Share of the free device memory to use.", Kind.F32, 1.0)
    disable_custom_kernels: bool = _flag(_DEVICES, "Accepted: there are no custom kernels yet.", Kind.SWITCH, False)
    cuda_graphs: tuple[int, ...] | None = _flag(
        _DEVICES,
        "Batch sizes for CUDA graphs. Accepted: steps run eagerly until graphs are built.",
        Kind.LIST,
    )

    max_input_tokens: int | None = _flag(_LIMITS, "Longest prompt, tokens. Unset: total - 1.", Kind.USIZE)
    max_input_length: int | None = _flag(_LIMITS, "Older name of --max-input-tokens.", Kind.USIZE)
    max_total_tokens: int | None = _flag(
        _LIMITS, "Longest prompt plus output, tokens. Unset: what model and memory allow.", Kind.USIZE
    )
    max_batch_prefill_tokens: int | None = _flag(
        _LIMITS, "Most tokens computed in one step. Unset: chosen for the device.", Kind.U32
    )
    max_batch_total_tokens: int | None = _flag(
        _LIMITS, "Most tokens in the KV cache. Unset: what memory allows.", Kind.U32
    )
    max_batch_size: int | None = _flag(_LIMITS, "Most requests computed at once.", Kind.USIZE)
    max_concurrent_requests: int = _flag(_LIMITS, "Most requests at once; more get 429.", Kind.USIZE, 128)
    max_client_batch_size: int = _flag(_LIMITS, "Most prompts in one /v1/completions request.", Kind.USIZE, 4)
    max_best_of: int = _flag(_LIMITS, "Largest `best_of` on TGI's routes; OpenAI's take `n` up to 128.", Kind.USIZE, 2)
    max_stop_sequences: int = _flag(_LIMITS, "Most `stop` sequences.", Kind.USIZE, 4)
    max_top_n_tokens: int = _flag(_LIMITS, "Largest `top_n_tokens`.", Kind.U32, 5)
    payload_limit: int = _flag(_LIMITS, "Largest request body, bytes.", Kind.USIZE, 2_000_000)
    disable_grammar_support: bool = _flag(_LIMITS, "Refuse every grammar.", Kind.SWITCH, False)
    enable_prefill_logprobs: bool = _flag(
        _LIMITS, "Accepted: log-probabilities of the prompt are always available.", Kind.SWITCH, False
    )

    hostname: str = _flag(_HTTP, "IP address to listen on.", default="0.0.0.0")
    port: int = _flag(_HTTP, "Port to listen on.", Kind.U16, 3000, short="p")
    prometheus_port: int = _flag(
        _HTTP, "Port for metrics alone, when given; /metrics is always on the main port too.", Kind.U16, 9000
    )
    grpc_port: int | None = _flag(_HTTP, "Port of the gRPC service. Unset: there is none.", Kind.U16)
    grpc_tls_cert: str | None = _flag(_HTTP, "PEM file with the gRPC service's certificate chain. Unset: no TLS.")
    grpc_tls_key: str | None = _flag(_HTTP, "PEM file with the private key of --grpc-tls-cert.")
    api_key: str | None = _flag(_HTTP, "Key that clients must send as a bearer token.", secret=True)
    open_path: tuple[str, ...] = _flag(
        _HTTP,
        "Path whose GET needs no API key, such as /metrics; below it too when it ends in /. Repeat for more.",
        Kind.REPEATED,
        (),
    )
    cors_allow_origin: tuple[str, ...] = _flag(_HTTP, "Origin allowed by CORS; repeat for more.", Kind.REPEATED, ())
    strict_params: bool = _flag(
        _HTTP,
        "Refuse requests with unknown fields, which are otherwise listed in `x-ignored-params`.",
        Kind.SWITCH,
        False,
    )
    aip_predict_route: str | None = _flag(_HTTP, "Vertex AI: one more path of POST /vertex.")
    aip_health_route: str | None = _flag(_HTTP, "Vertex AI: one more path of GET /health.")
    aip_http_port: int | None = _flag(
        _HTTP, "Vertex AI: port to listen on, unless --port stands on the command line.", Kind.U16
    )
    validation_workers: int = _flag(_HTTP, "Threads that tokenize.", Kind.USIZE, 2)

    json_output: bool = _flag(_LOGS, "Write logs as JSON lines.", Kind.SWITCH, False)
    otlp_endpoint: str | None = _flag(_LOGS, "OpenTelemetry collector to send traces to (OTLP over gRPC).")
    otlp_service_name: str = _flag(_LOGS, "service.name of the traces.", default="text-generation-inference.router")
    usage_stats: Literal["on", "off", "no-stack"] = _flag(
        _LOGS,
        "Accepted for compatibility: nothing is ever sent, whatever the value.",
        default="on",
        choices=("on", "off", "no-stack"),
    )
    plan: bool = _flag(
        _LOGS,
        "Show the resolved configuration without starting anything; status 1 when it cannot be served.",
        Kind.SWITCH,
        False,
        has_env=False,
    )
    env: bool = _flag(_LOGS, "Show the runtime environment, then go on.", Kind.SWITCH, False, short="e", has_env=False)

    graceful_termination_timeout: int = _flag(
        _LIFE, "Time for running requests to end after SIGTERM, seconds.", Kind.U64, 90, short="g"
    )
    step_deadline: float = _flag(_LIFE, "A shard silent for so long in a step is dead, seconds.", Kind.F32, 60.0)
    stall_timeout: float = _flag(
        _LIFE, "A shard or download without progress for so long is stopped, seconds.", Kind.F32, 300.0
    )
    restart_budget: int = _flag(
        _LIFE, "Restarts of the shard group within ten minutes before giving up.", Kind.USIZE, 3
    )

    waiting_served_ratio: float = _flag(
        _HINTS, "Accepted, no effect: requests are admitted at every step.", Kind.F32, 0.3
    )
    max_waiting_tokens: int = _flag(_HINTS, "Accepted, no effect: requests are admitted at every step.", Kind.USIZE, 20)

    quantize: str | None = _flag(_LATER, "Quantization of the weights.", choices=QUANTIZE)
    speculate: int | None = _flag(_LATER, "Number of speculated tokens.", Kind.USIZE)
    kv_cache_dtype: str | None = _flag(_LATER, "Type of the KV cache.", choices=("fp8_e4m3fn", "fp8_e5m2"))
    lora_adapters: str | None = _flag(_LATER, "Comma-separated LoRA adapters.")
    ngrok: bool = _flag(_LATER, "Tunnel through ngrok.", Kind.SWITCH, False)
    ngrok_authtoken: str | None = _flag(_LATER, "Token for --ngrok.", secret=True)
    ngrok_edge: str | None = _flag(_LATER, "Edge for --ngrok.")

    sources: Mapping[str, Literal["flag", "env"]] = field(default_factory=dict)

    def given(self, name: str) -> bool:
        """Whether the user said anything about `name`."""
        return name in self.sources

    @property
    def listen_port(self) -> int:
        """Vertex AI says its port in the environment of images that set PORT too, so only the command line beats it."""
        if self.aip_http_port is None or self.sources.get("port") == "flag":
            return self.port
        return self.aip_http_port

    def reason(self, name: str) -> str:
        """Where the value of `name` came from, for the table of resolved values."""
        source = self.sources.get(name)
        if source is None:
            return "default"
        return f"flag --{name.replace('_', '-')}" if source == "flag" else f"environment {name.upper()}"


def specs() -> dict[str, tuple[Spec, Any]]:
    """Field name → (spec, default), in declaration order."""
    return {f.name: (f.metadata["spec"], f.default) for f in dataclasses.fields(Flags) if f.name != "sources"}
