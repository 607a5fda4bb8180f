"""The few rows of a decoding step, with all experts in one product: on a CPU a call costs more than what it computes.

The rows of each expert are filled up to the longest and lie beside each other [E, n, .], so that bmm takes every expert at once. Weights
are read either way, so that this pays as long as most experts have rows and all have few. Large experts are multiplied one by one all the
same, each with the rows that it really has; where no others are multiplied, nothing is filled up.
Legend: T tokens, k experts per token, E experts, n rows of an expert, filled up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropewalk.kernels.blocked import Turned
from ropewalk.kernels.expert_rows import Grouped, Route
from ropewalk.kernels.expert_scratch import Stored

ROWS = 64  # of one expert at most
NARROW = 128  # columns of a stack that costs next to nothing, such as a factor of LoRA
HIT = {2: 3, 4: 1}  # bytes of a number -> a product with all experts costs as much as one in so many of them, one by one
LARGE = 1 << 17  # weights of one expert in 32 bits that outweigh a call
TURN = 16  # rows from which a product is better turned round; in 16 bits it always is


def pays(ids: Tensor, num_experts: int) -> bool:
    """Whether rows routed like this are few: ids [T, k]."""
    if ids.device.type != "cpu" or ids.numel() > ROWS * num_experts:
        return False
    counts = torch.bincount(ids.reshape(-1), minlength=num_experts)
    return counts.numel() == num_experts and int(counts.max()) <= ROWS


def alone(stack: Tensor | Turned | Stored, dtype: torch.dtype) -> bool:
    """Whether rows of this dtype are always multiplied with this stack's experts one by one."""
    if not isinstance(stack, Tensor):
        return True
    wide = min(stack.shape[1:]) > NARROW and stack.shape[1:].numel() >= LARGE
    return wide and stack.dtype == dtype and dtype.itemsize == 4


def route_few(ids: Tensor, weights: Tensor, num_experts: int) -> Route:
    """ids [T, k] below E, weights [T, k] -> E * n rows, those that fill up being the first token's and weighing nothing."""
    k, weight = ids.shape[1], weights.detach().reshape(-1)
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    counts = torch.bincount(ordered, minlength=num_experts)
    longest = max(1, int(counts.max()))
    shift = torch.arange(num_experts) * longest - (counts.cumsum(0) - counts)
    place = torch.arange(ordered.numel()) + shift[ordered]
    token = order.new_zeros(num_experts * longest).index_copy_(0, place, order // k)
    row_weight = weight.new_zeros(num_experts * longest).index_copy_(0, place, weight[order])
    ends = torch.arange(1, num_experts + 1, dtype=torch.int32) * longest
    return Route(token, row_weight, order, place, ends, k, counts)


class Few(Grouped):
    """All rows, those of each expert filled up to the longest's, or none of them."""

    def __init__(self, way: Route) -> None:
        super().__init__(way.ends, way.token.numel())
        counts = torch.diff(way.ends, prepend=way.ends.new_zeros(1)) if way.counts is None else way.counts
        self._counts = counts.tolist()
        self._hit = sum(count > 0 for count in self._counts)
        longest = 0 if way.counts is None else self.count // len(self._counts)
        self._sizes = [size for count in self._counts for size in (count, max(longest - count, 0))]

    def mm(self, a: Tensor, stack: Tensor | Turned | Stored, out: Tensor | None = None) -> Tensor:
        if not isinstance(stack, Tensor) or alone(stack, a.dtype):
            return self._one_by_one(a, stack)
        apart = a.view(len(self._counts), -1, a.shape[1])
        if stack.dtype != a.dtype or min(stack.shape[1:]) <= NARROW:
            return torch.bmm(apart.to(stack.dtype), stack).flatten(0, 1)
        if self._hit * HIT.get(a.element_size(), 1) < len(self._counts):
            return self._one_by_one(a, stack)
        if a.element_size() == 2 or apart.shape[1] >= TURN:
            turned = torch.bmm(stack.transpose(1, 2), apart.transpose(1, 2))
            return turned.transpose(1, 2).reshape(-1, turned.shape[1])
        return torch.bmm(apart, stack).flatten(0, 1)

    def mm_lora(self, x: Tensor, stack: Tensor | Turned | Stored, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x @ stack + scale * x @ a @ b; in 16 bits the stack's product is added to the factors', all turned round."""
        short = x.element_size() == 2 and a.dtype == x.dtype and b.dtype == x.dtype
        if short and isinstance(stack, Tensor) and min(stack.shape[1:]) > NARROW and self._hit * HIT[2] >= len(self._counts):
            apart = x.view(len(self._counts), -1, x.shape[1]).transpose(1, 2)
            turned = torch.bmm(b.transpose(1, 2), torch.bmm(a.transpose(1, 2), apart))
            if scale != 1.0:
                turned.mul_(scale)
            turned.baddbmm_(stack.transpose(1, 2), apart)
            return turned.transpose(1, 2).reshape(-1, turned.shape[1])
        y = self.mm(x, stack)
        self.mm_add_(y, self.mm(x, a), b, scale)
        return y

    def mm_add_(self, y: Tensor, a: Tensor, stack: Tensor, scale: float) -> None:
        experts = len(self._counts)
        if stack.dtype == y.dtype:
            y.view(experts, -1, y.shape[1]).baddbmm_(a.view(experts, -1, a.shape[1]), stack, alpha=scale)
        else:
            y.add_(torch.bmm(a.view(experts, -1, a.shape[1]), stack).to(y.dtype).view(y.shape), alpha=scale)

    def _one_by_one(self, a: Tensor, stack: Tensor | Turned | Stored) -> Tensor:
        out = a.new_empty(len(a), stack.shape[2])  # what fills up is not read
        if isinstance(stack, Turned):
            stack.mm_each(a, self._sizes, out)
            return out
        for expert, (rows, found) in enumerate(zip(torch.split(a, self._sizes)[::2], torch.split(out, self._sizes)[::2])):
            if len(rows):
                torch.mm(rows, stack[expert], out=found)
        return out
