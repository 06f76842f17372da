"""Command R7B and Command A: Command R with sliding windows; the layers that see everything see no positions.

Follows transformers' models/cohere2 (configuration and names only).
"""

from dataclasses import replace

from . import cohere
from .hf_config import HfConfig, integer, windows
from .spec import DecoderSpec, with_windows

NAMES = cohere.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = cohere.parallel({**hf, "use_qk_norm": False}, 10_000.0)
    period = integer(hf, "sliding_window_pattern", 4)
    limits = windows({"sliding_window": 4096, **hf}, base.num_layers, lambda layer: (layer + 1) % period != 0)
    base = with_windows(base, limits)
    layers = (layer if layer.window is not None else replace(layer, position=None) for layer in base.layers)
    return replace(base, model_type="cohere2", layers=tuple(layers))
