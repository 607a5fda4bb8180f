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


def _reduce(gradients: Sequence[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def join_world(device: torch.device, minutes: float = 30) -> Iterator[World]:
    """Joins the processes that torchrun (or `ropewalk train --processes`) started; alone where none did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
