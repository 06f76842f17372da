"""The registry of attention backends and the choice among them. Called once, by models/__init__.py, when a model loads.

To add a backend: a file with a class that satisfies `base.AttentionBackend`, and one line in `BACKENDS`.
"""

import importlib
import logging
from collections.abc import Sequence

import torch

from ..errors import StartError
from .base import AttentionBackend, AttentionBatch, AttentionSpec

__all__ = ["BACKENDS", "AttentionBackend", "AttentionBatch", "AttentionSpec", "choose", "create"]

logger = logging.getLogger(__name__)

# name -> module and class, fastest first. A module here imports nothing heavy; its class may, when it is constructed.
BACKENDS = {
    "flash-attn": "flash_attn:FlashAttention",
    "triton": "triton:TritonAttention",
    "cpu": "cpu:CpuAttention",
    "reference": "reference:ReferenceAttention",
}


def create(name: str) -> AttentionBackend:
    """The backend of that name. KeyError for a name that is not registered."""
    module, _, cls = BACKENDS[name].partition(":")
    backend: AttentionBackend = getattr(importlib.import_module(f".{module}", __name__), cls)()
    return backend


def choose(
    name: str | None, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype, block_size: int
) -> AttentionBackend:
    """The backend called `name`, or without a name the first that has no objection to any of `specs`.

    Why the others were refused is logged. Raises StartError when the one asked for cannot serve the model.
    """
    if name is not None and name not in BACKENDS:
        raise StartError(f"`--attention` is {name!r}; this server has {', '.join(BACKENDS)}.")
    for candidate in [name] if name else BACKENDS:
        backend = create(candidate)
        objections = _objections(backend, specs, device, dtype, block_size)
        if not objections:
            logger.info("Attention backend: %s", candidate)
            return backend
        if name:
            raise StartError(f"`--attention {name}` cannot serve this model: {'; '.join(objections)}.")
        logger.info("Attention backend %s is not used: %s", candidate, "; ".join(objections))
    raise StartError("No attention backend can serve this model; the log says why each was refused.")


def _objections(
    backend: AttentionBackend, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype, block_size: int
) -> list[str]:
    """Objections to any of the specs, without repetitions, in order."""
    found: dict[str, None] = {}
    for spec in dict.fromkeys(specs):
        found.update(dict.fromkeys(backend.objections(spec, device, dtype, block_size)))
    return list(found)
