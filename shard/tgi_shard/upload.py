"""Host arrays to device tensors in one copy. Used by rows and the sampler for the few numbers each step needs.

On CPU a tensor shares the array's memory; on CUDA all arrays travel in one pinned buffer, so a step costs one transfer
whatever the number of arrays.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes; more than any dtype needs


def upload(arrays: list[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Tensors on `device` with the arrays' dtypes, shapes and contents, in order."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    offsets, size = [], 0
    for array in arrays:
        offsets.append(size)
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    staging = torch.empty(max(size, 1), dtype=torch.uint8, pin_memory=True)
    host = staging.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        host[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    # The caching host allocator keeps `staging` until the copy has run, although we drop it here.
    buffer = staging.to(device, non_blocking=True)
    return [
        buffer[offset : offset + array.nbytes].view(_torch_dtype(array.dtype)).view(array.shape)
        for array, offset in zip(arrays, offsets, strict=True)
    ]


def _torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
