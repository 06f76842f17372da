"""MPT: ALiBi, LayerNorms without bias, a plain MLP without biases, and clipped q, k and v in some.

Follows transformers' models/mpt (configuration and names only).
"""

import math

from ..errors import StartError
from .hf_config import HfConfig, flag, integer, nullable_number, number, refuse
from .names import Concat, Names, Packed
from .spec import Alibi, Attention, DecoderSpec, Layer, LayerNorm, Output, PlainMlp, inverse_root

NAMES = Names(
    embedding="transformer.wte",
    final_norm="transformer.norm_f",
    layer="transformer.blocks.{}.",
    attention_norm="norm_1",
    mlp_norm="norm_2",
    qkv=Packed("attn.Wqkv"),
    out="attn.out_proj",
    gate_up=Concat(("ffn.up_proj",)),
    down="ffn.down_proj",
)


def spec(hf: HfConfig) -> DecoderSpec:
    config = hf.get("attn_config") or {}
    if not isinstance(config, dict):
        raise StartError(f"config.json: `attn_config` is {config!r}, expected an object.")
    for name, allowed in (
        ("alibi", True),
        ("qk_ln", False),
        ("attn_type", "multihead_attention"),
        ("prefix_lm", False),
    ):
        refuse(config, name, allowed)
    refuse(hf, "no_bias", True)
    refuse(hf, "expansion_ratio", 4)
    hidden, heads = integer(hf, "d_model"), integer(hf, "n_heads")
    norm = LayerNorm(number(hf, "layer_norm_epsilon", 1e-5), bias=False)
    layer = Layer(PlainMlp(4 * hidden, "gelu", bias=False), Alibi(_slopes(heads, number(config, "alibi_bias_max", 8))))
    return DecoderSpec(
        model_type="mpt",
        hidden=hidden,
        vocab=integer(hf, "vocab_size"),
        max_positions=integer(hf, "max_seq_len", 2048),
        attention=Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            scale=number(config, "softmax_scale", inverse_root(hidden // heads)),
            qkv_clip=nullable_number(config, "clip_qkv"),
        ),
        norm=norm,
        layers=(layer,) * integer(hf, "n_layers"),
        output=Output(flag(hf, "tie_word_embeddings", True), norm),
    )


def _slopes(heads: int, bias_max: float) -> tuple[float, ...]:
    """Those of the next power of two; when there are fewer heads, every second first, then the ones between."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-bias_max * i / power) for i in range(1, power + 1)]
    return tuple(slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads])
