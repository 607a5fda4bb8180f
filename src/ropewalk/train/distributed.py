"""Several processes training one adapter: who am I, sums over all, gradients added up. One process needs none of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ropewalk.errors import TrainingStopped

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """This process's place among `size` of them."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """The one process that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all processes, in float64."""
        if self.size == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def gather(self, values: Sequence[Value]) -> list[Value]:
        """Everybody's values, in the order of their ranks."""
        if self.size == 1:
            return list(values)
        found: list[list[Value]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, list(values))
        return [value for part in found for value in part]

    def add_gradients(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = 64 << 20) -> None:
        """Replaces every gradient by its sum over all processes; a parameter that got none here counts as zeros."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        held = 0
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (held > bucket_bytes or bucket[0].dtype != parameter.grad.dtype):
                _reduce(bucket)
                bucket, held = [], 0
            bucket.append(parameter.grad)
            held += parameter.grad.nbytes
        if bucket:
            _reduce(bucket)

    def wait(self) -> None:
        """Returns when every process has arrived."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def _reduce(gradients: Sequence[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def join_world(device: torch.device, seconds: float = 1800) -> Iterator[World]:
    """Joins the processes that torchrun (or `ropewalk train --processes`) started; alone where none did.

    One that waits longer than `seconds` for another, or has lost the connection to it, ends with an error that says so.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    if size == 1:
        yield World()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except (dist.DistError, ValueError) as error:
        raise TrainingStopped(
            f"process {rank} of {size} lost another one before they met at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
            f"({_first_line(error)}); start it with torchrun or --processes, which set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise TrainingStopped(
            f"process {rank} of {size} lost another one, or waited longer than ddp_timeout for it ({_first_line(error)}); what that one "
            "said last is why, and the same command goes on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    """Whether it is about the connection to another process."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
