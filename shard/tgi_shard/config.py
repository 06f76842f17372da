"""ShardConfig: everything one shard process is told when it starts. Torch-free; the launcher imports it."""

from dataclasses import dataclass
from typing import Literal

from tgi_proto.argv import flag

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """Flags of `text-generation-server serve`."""

    model_dir: str = flag("Local directory with config.json and *.safetensors.")
    model_id: str = flag("Name of the model in log lines.")
    uds_path: str = flag("Prefix of the Unix socket; the rank is appended.", "/tmp/text-generation-server")
    rank: int = flag("This process' rank in the tensor-parallel group.", 0)
    world_size: int = flag("Processes in the group.", 1)
    master_addr: str = flag("Rendezvous address of the group.", "localhost")
    master_port: int = flag("Rendezvous port of the group.", 29500)
    device: Literal["auto", "cpu", "cuda"] = flag("Where to compute; auto = cuda when there is one.", "auto")
    dtype: Dtype | None = flag("Type of weights and KV. Unset: the checkpoint's on cuda, float32 on cpu.", None)
    trust_remote_code: bool = flag("Allow code from the model's repository to run.", False)

    block_size: int = flag("Token slots per KV block.", 16)
    max_step_tokens: int = flag("Most tokens in one step.", 4096)
    max_rows: int = flag("Most live requests.", 128)
    max_total_tokens: int | None = flag("Longest context of a request, tokens. Unset: the model's.", None)
    max_kv_tokens: int | None = flag("Most tokens in the KV pool. Unset: what memory allows.", None)
    memory_fraction: float = flag("Share of the free device memory that may be used.", 1.0)
    max_steps_in_flight: int = flag("Steps the router may send before it has an answer.", 2)
    attention: str | None = flag("Attention backend. Unset: the first without objections.", None)
    num_threads: int | None = flag("Compute threads on CPU. Unset: the usable cores divided by the ranks.", None)

    rope_scaling: Literal["linear", "dynamic"] | None = flag("Replaces the model's rope scaling.", None)
    rope_factor: float | None = flag("Factor of --rope-scaling.", None)
    watermark_gamma: float = flag("Share of the vocabulary on the watermark's green list.", 0.5)
    watermark_delta: float = flag("Added to the logits of the green list.", 2.0)

    log_level: str = flag("DEBUG, INFO, WARNING or ERROR.", "INFO")
    faults: str | None = flag("Fault points to arm, for tests; see tgi_shard/faults.py.", None)
