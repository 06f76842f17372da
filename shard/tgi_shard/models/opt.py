"""OPT and Galactica: learned positions (two rows further on), LayerNorms, a plain MLP.

Follows transformers' models/opt (configuration and names only). The 350M model norms after its residuals, has no final
norm, and a narrower embedding table.
"""

from .hf_config import HfConfig, activation, flag, integer
from .names import Concat, Names
from .spec import (
    Attention,
    BareLayerNorm,
    DecoderSpec,
    Input,
    Layer,
    LayerNorm,
    LearnedPositions,
    Norm,
    Output,
    PlainMlp,
    PostNorm,
    PreNorm,
    inverse_root,
)

EPS = 1e-5

NAMES = Names(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    final_norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{}.",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    qkv=Concat(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    out="self_attn.out_proj",
    gate_up=Concat(("fc1",)),
    down="fc2",
    optional_prefix="model.",
)


def spec(hf: HfConfig) -> DecoderSpec:
    hidden, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    bias, norm_first = flag(hf, "enable_bias", True), flag(hf, "do_layer_norm_before", True)
    norm: Norm = LayerNorm(EPS) if flag(hf, "layer_norm_elementwise_affine", True) else BareLayerNorm(EPS)
    has_final_norm = norm_first and not flag(hf, "_remove_final_layer_norm", False)
    width = integer(hf, "word_embed_proj_dim", hidden)
    mlp = PlainMlp(integer(hf, "ffn_dim"), activation(hf, "activation_function", "relu"), bias)
    return DecoderSpec(
        model_type="opt",
        hidden=hidden,
        vocab=integer(hf, "vocab_size"),
        max_positions=integer(hf, "max_position_embeddings", 2048),
        attention=Attention(heads, heads, hidden // heads, inverse_root(hidden // heads), qkv_bias=bias, out_bias=bias),
        norm=norm,
        layers=(Layer(mlp),) * integer(hf, "num_hidden_layers"),
        input=Input(width=None if width == hidden else width, positions=LearnedPositions(offset=2)),
        output=Output(flag(hf, "tie_word_embeddings", True), norm if has_final_norm else None),
        residual=PreNorm() if norm_first else PostNorm(),
    )
