"""StarCoder and SantaCoder: GPT-2 with matrices the usual way round and, mostly, one key head for all queries.

Follows transformers' models/gpt_bigcode (configuration and names only).
"""

from dataclasses import replace

from . import gpt2
from .hf_config import HfConfig, flag
from .names import Grouped
from .spec import DecoderSpec

NAMES = replace(gpt2.NAMES, qkv=Grouped("attn.c_attn"), transposed=False)


def spec(hf: HfConfig) -> DecoderSpec:
    base = gpt2.spec({"activation_function": "gelu_pytorch_tanh", **hf})
    kv_heads = 1 if flag(hf, "multi_query", True) else base.attention.heads
    return replace(base, model_type="gpt_bigcode", attention=replace(base.attention, kv_heads=kv_heads))
