"""Phi-1, Phi-1.5 and Phi-2: one LayerNorm, attention and plain MLP side by side, biases everywhere.

Follows transformers' models/phi (configuration and names only).
"""

from .hf_config import HfConfig, RopeDefaults, activation, flag, integer, max_positions, number, rope
from .names import Concat, Names
from .spec import (
    Attention,
    DecoderSpec,
    HeadNorm,
    Layer,
    LayerNorm,
    Output,
    PlainMlp,
    SharedNormParallel,
    inverse_root,
)

NAMES = Names(
    embedding="model.embed_tokens",
    final_norm="model.final_layernorm",
    layer="model.layers.{}.",
    attention_norm="input_layernorm",
    qkv=Concat(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    out="self_attn.dense",
    gate_up=Concat(("mlp.fc1",)),
    down="mlp.fc2",
    ignorable=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)


def spec(hf: HfConfig) -> DecoderSpec:
    hidden, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    head_dim = integer(hf, "head_dim", hidden // heads)
    position = rope(hf, head_dim, RopeDefaults(partial=0.5))
    norm = LayerNorm(number(hf, "layer_norm_eps", 1e-5))
    mlp = PlainMlp(integer(hf, "intermediate_size"), activation(hf, default="gelu_new"))
    return DecoderSpec(
        model_type="phi",
        hidden=hidden,
        vocab=integer(hf, "vocab_size"),
        max_positions=max_positions(hf, position.scaling),
        attention=Attention(
            heads=heads,
            kv_heads=integer(hf, "num_key_value_heads", heads),
            head_dim=head_dim,
            scale=inverse_root(head_dim),
            qkv_bias=True,
            out_bias=True,
            qk_norm=HeadNorm(norm) if flag(hf, "qk_layernorm", False) else None,
        ),
        norm=norm,
        layers=(Layer(mlp, position),) * integer(hf, "num_hidden_layers"),
        output=Output(flag(hf, "tie_word_embeddings", False), norm, bias=True),
        residual=SharedNormParallel(),
    )
