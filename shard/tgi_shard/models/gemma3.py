"""Gemma 3 (text): Gemma 2 with head norms, five sliding layers to each full one, and a rope for each kind of layer.

Follows transformers' models/gemma3 (configuration and names only); `Gemma3ForConditionalGeneration` is not served.
"""

from dataclasses import replace

from . import gemma2
from .hf_config import HfConfig, integer, number, refuse, two_ropes, windows
from .spec import DecoderSpec, HeadNorm, OffsetRmsNorm, with_windows

NAMES = gemma2.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    refuse(hf, "use_bidirectional_attention", False)
    plain = {key: value for key, value in hf.items() if key not in ("rope_parameters", "rope_scaling")}
    # What Gemma 2 has and this leaves out unless asked for.
    base = gemma2.spec({"attn_logit_softcapping": None, "final_logit_softcapping": None, **plain})
    local_theta = number(hf, "rope_local_base_freq", 10_000.0)
    full, sliding = two_ropes(hf, base.attention.head_dim, 1_000_000.0, local_theta)
    period = integer(hf, "sliding_window_pattern", 6)
    limits = windows({"sliding_window": 4096, **hf}, base.num_layers, lambda layer: (layer + 1) % period != 0)
    base = with_windows(base, limits)
    layers = (replace(layer, position=full if layer.window is None else sliding) for layer in base.layers)
    attention = replace(base.attention, qk_norm=HeadNorm(OffsetRmsNorm(base.norm.eps)))
    return replace(base, model_type="gemma3_text", attention=attention, layers=tuple(layers))
