"""GPT-J: one LayerNorm, attention and plain MLP side by side, a partial rope of neighbouring pairs.

Follows transformers' models/gptj (configuration and names only).
"""

from ..layers.rotary import Rope
from .hf_config import HfConfig, activation, flag, integer, number
from .names import Concat, Names
from .spec import Attention, DecoderSpec, Layer, LayerNorm, Output, PlainMlp, SharedNormParallel, inverse_root

NAMES = Names(
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}.",
    attention_norm="ln_1",
    qkv=Concat(("attn.q_proj", "attn.k_proj", "attn.v_proj")),
    out="attn.out_proj",
    gate_up=Concat(("mlp.fc_in",)),
    down="mlp.fc_out",
    ignorable=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
)


def spec(hf: HfConfig) -> DecoderSpec:
    hidden, heads = integer(hf, "n_embd"), integer(hf, "n_head")
    norm = LayerNorm(number(hf, "layer_norm_epsilon", 1e-5))
    mlp = PlainMlp(integer(hf, "n_inner", 4 * hidden), activation(hf, "activation_function", "gelu_new"))
    position = Rope(10000.0, integer(hf, "rotary_dim", 64), None, "neighbours")
    return DecoderSpec(
        model_type="gptj",
        hidden=hidden,
        vocab=integer(hf, "vocab_size"),
        max_positions=integer(hf, "n_positions", 2048),
        attention=Attention(heads, heads, hidden // heads, inverse_root(hidden // heads)),
        norm=norm,
        layers=(Layer(mlp, position),) * integer(hf, "n_layer"),
        output=Output(flag(hf, "tie_word_embeddings", False), norm, bias=True),
        residual=SharedNormParallel(),
    )
