"""OLMo 3: OLMo 2 with a sliding window on three of four layers, and a rope for each kind of layer.

Follows transformers' models/olmo3 (configuration and names only).
"""

from dataclasses import replace

from . import olmo2
from .hf_config import HfConfig, max_positions, number, two_ropes, windows
from .spec import DecoderSpec, with_windows

NAMES = olmo2.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = olmo2.spec({key: value for key, value in hf.items() if key not in ("rope_parameters", "rope_scaling")})
    full, sliding = two_ropes(hf, base.attention.head_dim, 500_000.0, number(hf, "rope_theta", 500_000.0))
    limits = windows({"sliding_window": 4096, **hf}, base.num_layers, lambda layer: (layer + 1) % 4 != 0)
    base = with_windows(base, limits)
    layers = (replace(layer, position=full if layer.window is None else sliding) for layer in base.layers)
    return replace(base, model_type="olmo3", layers=tuple(layers), max_positions=max_positions(hf, full.scaling))
