"""GPT-NeoX, Pythia, Dolly and RedPajama: LayerNorms, a plain MLP, a partial rope; q, k and v packed head by head.

Follows transformers' models/gpt_neox (configuration and names only).
"""

from .hf_config import HfConfig, RopeDefaults, activation, flag, integer, max_positions, number, rope
from .names import Concat, Grouped, Names
from .spec import Attention, DecoderSpec, Layer, LayerNorm, Output, PlainMlp, PreNorm, TwoNormParallel, inverse_root

NAMES = Names(
    embedding="gpt_neox.embed_in",
    head="embed_out",
    final_norm="gpt_neox.final_layer_norm",
    layer="gpt_neox.layers.{}.",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    qkv=Grouped("attention.query_key_value"),
    out="attention.dense",
    gate_up=Concat(("mlp.dense_h_to_4h",)),
    down="mlp.dense_4h_to_h",
    # Masks and frequencies that old checkpoints carry.
    ignorable=(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    optional_prefix="gpt_neox.",
)


def spec(hf: HfConfig) -> DecoderSpec:
    hidden, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    head_dim = hidden // heads
    defaults = RopeDefaults(number(hf, "rotary_emb_base", 10000.0), number(hf, "rotary_pct", 0.25))
    position = rope(hf, head_dim, defaults)
    bias = flag(hf, "attention_bias", True)
    norm = LayerNorm(number(hf, "layer_norm_eps", 1e-5))
    mlp = PlainMlp(integer(hf, "intermediate_size"), activation(hf, default="gelu"))
    return DecoderSpec(
        model_type="gpt_neox",
        hidden=hidden,
        vocab=integer(hf, "vocab_size"),
        max_positions=max_positions(hf, position.scaling),
        attention=Attention(heads, heads, head_dim, inverse_root(head_dim), qkv_bias=bias, out_bias=bias),
        norm=norm,
        layers=(Layer(mlp, position),) * integer(hf, "num_hidden_layers"),
        output=Output(flag(hf, "tie_word_embeddings", False), norm),
        residual=TwoNormParallel() if flag(hf, "use_parallel_residual", True) else PreNorm(),
    )
