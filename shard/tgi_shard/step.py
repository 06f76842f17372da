"""One step, as the engine hands it to the model. Host plan in, device tensors out; built by rows.py."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .attention.base import AttentionBatch


@dataclass(frozen=True, slots=True)
class StepInput:
    """What the model needs for one forward pass over T tokens of R requests. Token order: request after request."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, position of each token in its request
    attention: AttentionBatch
    attention_plan: Any  # the backend's own; AttentionBackend.plan
