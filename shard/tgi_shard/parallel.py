"""The tensor-parallel group: collectives, and the only file that imports torch.distributed.

One `Parallel` is made at start and passed to constructors. A group of one does nothing and imports nothing.
"""

import logging
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .errors import StartError

logger = logging.getLogger(__name__)

# How long ranks wait for each other to appear, and how long a collective may take. A rank that hangs inside a step is
# found by the router's step deadline much earlier; one that dies closes its connection, which ends the collective.
JOIN_TIMEOUT_S = 600.0
COLLECTIVE_TIMEOUT_S = 3600.0


class Parallel:
    """This process' place in its group. Every rank makes the same calls in the same order."""

    def __init__(
        self, rank: int = 0, world_size: int = 1, device: torch.device | None = None, group: Any = None
    ) -> None:
        """Use `single` or `connect`."""
        self.rank = rank
        self.world_size = world_size
        self._device = device or torch.device("cpu")
        self._distributed = group  # the torch.distributed module once connected, None in a group of one

    @classmethod
    def single(cls) -> "Parallel":
        return cls()

    @classmethod
    def connect(
        cls,
        rank: int,
        world_size: int,
        address: str,
        port: int,
        device: torch.device,
        timeout_s: float = JOIN_TIMEOUT_S,
    ) -> "Parallel":
        """Joins the group that meets at address:port (rank 0 listens there): gloo on CPU, NCCL on CUDA.

        Raises StartError naming the rank that did not come within `timeout_s`.
        """
        if world_size == 1:
            return cls.single()
        import torch.distributed as distributed

        store = _meet(rank, world_size, address, port, timeout_s)
        cuda = device.type == "cuda"
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=device if cuda else None,
        )
        logger.info("Rank %d joined a group of %d over %s", rank, world_size, distributed.get_backend())
        return cls(rank, world_size, device, distributed)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place; returns x."""
        if self._distributed is not None:
            self._distributed.all_reduce(x)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, in place; returns x."""
        if self._distributed is not None:
            self._distributed.broadcast(x, src=0)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """`[..., n]` of every rank → `[..., world_size * n]` in rank order."""
        if self._distributed is None:
            return x
        parts = x.new_empty((self.world_size * x.shape[0], *x.shape[1:]))
        # torch 2.13 has renamed it; 2.11 and 2.12 know the old name only.
        gather = getattr(self._distributed, "all_gather_single", self._distributed.all_gather_into_tensor)
        gather(parts, x.contiguous())
        return parts.view(self.world_size, *x.shape).movedim(0, -2).flatten(-2)

    def min_int(self, value: int) -> int:
        """The smallest `value` over the ranks."""
        if self._distributed is None:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self._device)
        self._distributed.all_reduce(tensor, op=self._distributed.ReduceOp.MIN)
        return int(tensor.item())

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.min_int(0)

    def close(self) -> None:
        """Leaves the group. The other ranks' next collective fails."""
        if self._distributed is not None:
            self._distributed.destroy_process_group()
            self._distributed = None


def _meet(rank: int, world_size: int, address: str, port: int, timeout_s: float) -> Any:
    """The group's key-value store, once every rank has signed in there."""
    import torch.distributed as distributed

    timeout = timedelta(seconds=timeout_s)
    where = f"{address}:{port}"
    try:
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            address, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False
        )
    except RuntimeError as error:
        raise StartError(_store_problem(rank, where, error)) from error
    store.set(f"rank{rank}", "here")
    for other in range(world_size):
        try:
            store.wait([f"rank{other}"], timeout)
        except RuntimeError as error:
            raise StartError(
                f"Rank {other} of {world_size} did not join the group at {where} within {timeout_s:.0f} s; "
                "its own log says why."
            ) from error
    return distributed.PrefixStore("group", store)  # type: ignore[attr-defined]


def _store_problem(rank: int, where: str, error: Exception) -> str:
    reason = str(error).splitlines()[0]
    if rank == 0:
        return f"Rank 0 cannot listen on {where} (`--master-addr`, `--master-port`): {reason}"
    return f"Rank {rank} cannot reach rank 0 at {where} (`--master-addr`, `--master-port`): {reason}"
