"""StarCoder2: Llama's attention with LayerNorms, a plain MLP, biases and a sliding window.

Follows transformers' models/starcoder2 (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, activation, flag, number, window
from .names import Concat
from .spec import DecoderSpec, LayerNorm, PlainMlp

NAMES = replace(llama.NAMES, gate_up=Concat(("mlp.c_fc",)), down="mlp.c_proj")


def spec(hf: HfConfig) -> DecoderSpec:
    bias = flag(hf, "use_bias", True)
    base = llama.spec({"tie_word_embeddings": True, **hf, "hidden_act": "silu", "attention_bias": bias})
    norm = LayerNorm(number(hf, "norm_epsilon", 1e-5))
    mlp = PlainMlp(base.layers[0].mlp.size, activation(hf, default="gelu_pytorch_tanh"), bias)
    return replace(
        base,
        model_type="starcoder2",
        norm=norm,
        layers=tuple(replace(layer, mlp=mlp, window=window(hf)) for layer in base.layers),
        output=replace(base.output, norm=norm),
    )
