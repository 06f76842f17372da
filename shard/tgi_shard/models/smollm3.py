"""SmolLM3: Llama in which some layers (every fourth, usually) see no positions.

Follows transformers' models/smollm3 (configuration and names only).
"""

from dataclasses import replace

from ..errors import StartError
from . import llama
from .hf_config import HfConfig, RopeDefaults, flag, integer, windows
from .spec import DecoderSpec, with_windows

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({"tie_word_embeddings": True, **hf}, RopeDefaults(theta=2e6))
    period = integer(hf, "no_rope_layer_interval", 4)
    rotated = hf.get("no_rope_layers") or [int((i + 1) % period != 0) for i in range(base.num_layers)]
    if len(rotated) != base.num_layers or not {0, 1}.issuperset(rotated):
        raise StartError(f"config.json: `no_rope_layers` must hold {base.num_layers} numbers, 0 (no rope) or 1.")
    layers = (layer if has else replace(layer, position=None) for layer, has in zip(base.layers, rotated, strict=True))
    base = replace(base, model_type="smollm3", layers=tuple(layers))
    if not flag(hf, "use_sliding_window", False):
        return base
    return with_windows(base, windows(hf, base.num_layers, lambda layer: not rotated[layer]))
