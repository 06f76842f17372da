"""RouterConfig: everything the router process is told when it starts. Torch-free; the launcher imports it.

The launcher resolves, this holds: no field is read from the environment and none is guessed here.
"""

from dataclasses import dataclass

from tgi_proto.argv import flag


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Flags of `text-generation-router`. Limits left unset are taken from the shard's Info."""

    model_dir: str = flag("Local directory with config.json, tokenizer.json and the chat template.")
    model_id: str = flag("Name of the model in responses.")
    model_sha: str | None = flag("Commit of the model, for /info.", None)
    model_pipeline_tag: str | None = flag("The Hub's pipeline tag, for /info; decides `return_full_text` on `/`.", None)
    tokenizer_config_path: str | None = flag("Replaces the model's tokenizer_config.json (chat template).", None)
    master_shard_uds_path: str = flag("Unix socket of rank 0; rank r's ends in -r.", "/tmp/text-generation-server-0")

    hostname: str = flag("Address to listen on.", "0.0.0.0")
    port: int = flag("Port to listen on.", 3000)
    prometheus_port: int = flag("Port for metrics alone; 0 = only on the main port.", 0)
    grpc_port: int = flag("Port of the public gRPC service; 0 = none.", 0)
    grpc_tls_cert: str | None = flag("PEM file with the gRPC service's certificate chain. Unset: no TLS.", None)
    grpc_tls_key: str | None = flag("PEM file with its private key.", None)
    cors_allow_origin: tuple[str, ...] = flag("Origin allowed by CORS; repeat for more. None = any.", ())
    api_key_file: str | None = flag("File whose content is the API key that clients must send.", None)
    open_path: tuple[str, ...] = flag(
        "Path whose GET needs no API key, below it too when it ends in `/`; repeat for more.", ()
    )
    strict_params: bool = flag("Refuse a request body with unknown fields.", False)
    payload_limit: int = flag("Largest request body, bytes.", 2_000_000)
    compute_type: str = flag("Value of the x-compute-type response header.", "gpu+optimized")

    aip_predict_route: str | None = flag("One more path of POST /vertex, given by Vertex AI.", None)
    aip_health_route: str | None = flag("One more path of GET /health, given by Vertex AI.", None)

    validation_workers: int = flag("Threads that tokenize.", 2)
    max_concurrent_requests: int = flag("Requests admitted at once, running and queued; more get 429.", 128)
    max_best_of: int = flag("Largest `best_of` on TGI's routes; OpenAI's take `n` up to 128.", 2)
    max_stop_sequences: int = flag("Most `stop` sequences.", 4)
    max_top_n_tokens: int = flag("Largest `top_n_tokens`.", 5)
    max_client_batch_size: int = flag("Most prompts in one /v1/completions request.", 4)
    max_input_tokens: int | None = flag("Longest prompt, tokens. Unset: max_total_tokens - 1.", None)
    max_total_tokens: int | None = flag("Longest prompt plus output, tokens. Unset: what model and memory allow.", None)
    max_batch_prefill_tokens: int = flag("Most tokens computed in one step.", 4096)
    max_batch_size: int | None = flag("Most requests running at once. Unset: what the shard has rows for.", None)
    max_batch_total_tokens: int | None = flag("Most tokens with KV in memory. Unset: what was measured.", None)
    disable_grammar_support: bool = flag("Refuse every grammar.", False)
    tool_call_parser: str = flag("Format of the model's tool calls; auto = found out from its chat template.", "auto")
    reasoning_parser: str = flag("Marks around the model's thoughts; auto = found out; none = not separated.", "auto")

    step_deadline_s: float = flag("A shard that does not answer a step for so long is dead, seconds.", 60.0)
    graceful_termination_timeout_s: float = flag("Time for running requests to end after SIGTERM, seconds.", 90.0)
    log_level: str = flag("DEBUG, INFO, WARNING or ERROR.", "INFO")
    otlp_endpoint: str | None = flag("OpenTelemetry collector to send traces to (OTLP over gRPC).", None)
    otlp_service_name: str = flag("service.name of the traces.", "text-generation-inference.router")
