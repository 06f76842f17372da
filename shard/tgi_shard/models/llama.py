"""Llama 1 to 3.3: RMS norms, a rope, grouped heads and a gated MLP; and everything else published in this layout.

Follows transformers' models/llama (configuration and names only).
"""

from .hf_config import PLAIN_ROPE, HfConfig, RopeDefaults, activation, flag, integer, max_positions, number, rope
from .names import Concat, Names
from .spec import Attention, DecoderSpec, GatedMlp, Layer, Output, RmsNorm, inverse_root

NAMES = Names(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    layer="model.layers.{}.",
    attention_norm="input_layernorm",
    qkv=Concat(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate_up=Concat(("mlp.gate_proj", "mlp.up_proj")),
    down="mlp.down_proj",
    # Old checkpoints carry the rotary frequencies, which follow from config.json.
    ignorable=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)


def spec(hf: HfConfig, rope_defaults: RopeDefaults = PLAIN_ROPE) -> DecoderSpec:
    heads = integer(hf, "num_attention_heads")
    head_dim = integer(hf, "head_dim", integer(hf, "hidden_size") // heads)
    position = rope(hf, head_dim, rope_defaults)
    attention_bias = flag(hf, "attention_bias", False)
    norm = RmsNorm(number(hf, "rms_norm_eps", 1e-6))
    mlp = GatedMlp(integer(hf, "intermediate_size"), activation(hf), flag(hf, "mlp_bias", False))
    return DecoderSpec(
        model_type="llama",
        hidden=integer(hf, "hidden_size"),
        vocab=integer(hf, "vocab_size"),
        max_positions=max_positions(hf, position.scaling),
        attention=Attention(
            heads=heads,
            kv_heads=integer(hf, "num_key_value_heads", heads),
            head_dim=head_dim,
            scale=inverse_root(head_dim),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
        ),
        norm=norm,
        layers=(Layer(mlp, position),) * integer(hf, "num_hidden_layers"),
        output=Output(flag(hf, "tie_word_embeddings", False), norm),
    )
