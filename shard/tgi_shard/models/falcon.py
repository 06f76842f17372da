"""Falcon in its three layouts: 7B (one key head), 40B, 180B and 11B (the "new decoder architecture"), and RW (ALiBi).

Follows transformers' models/falcon (configuration and names only). ALiBi slopes are rounded to bfloat16 as they were in
training; the biases themselves are not, because a rounded bias would depend on the position of the first token.
Configurations from before Falcon was in transformers ("RefinedWeb...") spell some fields differently.
"""

import torch

from ..layers.rotary import Rope
from .alibi import slopes
from .hf_config import PLAIN_ROPE, HfConfig, activation, flag, integer, number, positions, rope
from .names import Concat, Grouped, Names
from .spec import (
    Alibi,
    Attention,
    DecoderSpec,
    Layer,
    LayerNorm,
    Output,
    PlainMlp,
    PreNorm,
    Residual,
    SharedNormParallel,
    TwoNormParallel,
    inverse_root,
)


def spec(hf: HfConfig) -> DecoderSpec:
    hidden, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads", hf.get("n_head"))
    bias, head_dim = flag(hf, "bias", False), hidden // heads
    norm = LayerNorm(number(hf, "layer_norm_epsilon", 1e-5))
    scale = inverse_root(head_dim)
    if flag(hf, "alibi", False):
        # The bias is added before the scores are scaled.
        rounded = torch.tensor(slopes(heads)).bfloat16().tolist()
        position: Alibi | Rope = Alibi(tuple(slope * scale for slope in rounded))
    else:
        position = rope(hf, head_dim, PLAIN_ROPE)
    mlp = PlainMlp(integer(hf, "ffn_hidden_size", 4 * hidden), activation(hf, "activation", "gelu"), bias)
    return DecoderSpec(
        model_type="falcon",
        hidden=hidden,
        vocab=integer(hf, "vocab_size"),
        max_positions=positions({"n_positions": 2048, **hf}),
        attention=Attention(heads, _kv_heads(hf, heads), head_dim, scale, qkv_bias=bias, out_bias=bias),
        norm=norm,
        layers=(Layer(mlp, position),) * integer(hf, "num_hidden_layers", hf.get("n_layer")),
        output=Output(flag(hf, "tie_word_embeddings", True), norm),
        residual=_residual(hf),
    )


def NAMES(hf: HfConfig) -> Names:
    two_norms = isinstance(_residual(hf), TwoNormParallel)
    return Names(
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        layer="transformer.h.{}.",
        attention_norm="ln_attn" if two_norms else "input_layernorm",
        mlp_norm="ln_mlp" if two_norms else "post_attention_layernorm",
        qkv=Grouped("self_attention.query_key_value"),
        out="self_attention.dense",
        gate_up=Concat(("mlp.dense_h_to_4h",)),
        down="mlp.dense_4h_to_h",
        ignorable=(r"transformer\.h\.\d+\.self_attention\.rotary(_emb)?\.inv_freq",),
        optional_prefix="transformer.",
    )


def _is_new(hf: HfConfig) -> bool:
    return flag(hf, "new_decoder_architecture", hf.get("n_head_kv") is not None)


def _kv_heads(hf: HfConfig, heads: int) -> int:
    if _is_new(hf):
        return integer(hf, "num_kv_heads", integer(hf, "n_head_kv", heads))
    return 1 if flag(hf, "multi_query", True) else heads


def _residual(hf: HfConfig) -> Residual:
    if _is_new(hf):
        return TwoNormParallel() if integer(hf, "num_ln_in_parallel_attn", 2) == 2 else SharedNormParallel()
    return SharedNormParallel() if flag(hf, "parallel_attn", True) else PreNorm()
