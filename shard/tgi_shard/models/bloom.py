"""BLOOM and BLOOMZ: ALiBi, a norm after the embedding, LayerNorms, a plain MLP; q, k and v packed head by head.

Follows transformers' models/bloom (configuration and names only).
"""

from .alibi import slopes
from .hf_config import HfConfig, flag, integer, number, refuse
from .names import Concat, Grouped, Names
from .spec import Alibi, Attention, DecoderSpec, Input, Layer, LayerNorm, Output, PlainMlp, inverse_root

NAMES = Names(
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}.",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    qkv=Grouped("self_attention.query_key_value"),
    out="self_attention.dense",
    gate_up=Concat(("mlp.dense_h_to_4h",)),
    down="mlp.dense_4h_to_h",
    optional_prefix="transformer.",
)


def spec(hf: HfConfig) -> DecoderSpec:
    refuse(hf, "apply_residual_connection_post_layernorm", False)
    hidden = integer(hf, "hidden_size", hf.get("n_embed"))
    heads = integer(hf, "n_head", hf.get("num_attention_heads"))
    norm = LayerNorm(number(hf, "layer_norm_epsilon", 1e-5))
    layer = Layer(PlainMlp(4 * hidden, "gelu_tanh"), Alibi(slopes(heads)))
    return DecoderSpec(
        model_type="bloom",
        hidden=hidden,
        vocab=integer(hf, "vocab_size"),
        max_positions=integer(hf, "seq_length", 2048),  # trained with; ALiBi itself has no limit
        attention=Attention(heads, heads, hidden // heads, inverse_root(hidden // heads), qkv_bias=True, out_bias=True),
        norm=norm,
        layers=(layer,) * integer(hf, "n_layer", hf.get("num_hidden_layers")),
        input=Input(norm=norm),
        output=Output(flag(hf, "tie_word_embeddings", True), norm),
    )
