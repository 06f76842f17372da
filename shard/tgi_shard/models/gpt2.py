"""GPT-2: learned positions, LayerNorms, a plain MLP; matrices are stored transposed.

Follows transformers' models/gpt2 (configuration and names only).
"""

from .hf_config import HfConfig, activation, flag, integer, number, refuse
from .names import Concat, Names, Packed
from .spec import (
    Attention,
    DecoderSpec,
    Input,
    Layer,
    LayerNorm,
    LearnedPositions,
    Output,
    PlainMlp,
    inverse_root,
)

NAMES = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}.",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=Packed("attn.c_attn"),
    out="attn.c_proj",
    gate_up=Concat(("mlp.c_fc",)),
    down="mlp.c_proj",
    # The causal mask, which old checkpoints carry.
    ignorable=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    optional_prefix="transformer.",
    transposed=True,
)


def spec(hf: HfConfig) -> DecoderSpec:
    refuse(hf, "scale_attn_by_inverse_layer_idx", False)
    refuse(hf, "add_cross_attention", False)
    hidden, heads = integer(hf, "n_embd"), integer(hf, "n_head")
    norm = LayerNorm(number(hf, "layer_norm_epsilon", 1e-5))
    mlp = PlainMlp(integer(hf, "n_inner", 4 * hidden), activation(hf, "activation_function", "gelu_new"))
    scale = inverse_root(hidden // heads) if flag(hf, "scale_attn_weights", True) else 1.0
    return DecoderSpec(
        model_type="gpt2",
        hidden=hidden,
        vocab=integer(hf, "vocab_size"),
        max_positions=integer(hf, "n_positions", 1024),
        attention=Attention(heads, heads, hidden // heads, scale, qkv_bias=True, out_bias=True),
        norm=norm,
        layers=(Layer(mlp),) * integer(hf, "n_layer"),
        input=Input(positions=LearnedPositions()),
        output=Output(flag(hf, "tie_word_embeddings", True), norm),
    )
