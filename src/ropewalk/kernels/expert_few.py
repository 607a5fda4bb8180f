"""The few rows of a decoding step, with all experts in one product: on a CPU a call costs more than what it computes.

The rows of each expert are filled up to the longest and lie beside each other [E, n, .], so that bmm takes every expert at once. Weights
are read either way, so that this pays as long as most experts have rows and all have few.
Legend: S routed rows, sorted by expert, E experts, n rows of an expert, filled up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropewalk.kernels.blocked import Turned
from ropewalk.kernels.expert_rows import Grouped, Route

ROWS = 64  # of one expert at most
NARROW = 128  # columns of a stack that costs next to nothing, such as a factor of LoRA
HIT = {2: 3, 4: 1}  # bytes of a number -> a product with all experts costs as much as one in so many of them, one by one
TURN = 16  # rows from which a product is better turned round; in 16 bits it always is


def pays(ids: Tensor, num_experts: int) -> bool:
    """Whether rows routed like this are few: ids [T, k]."""
    if ids.device.type != "cpu" or ids.numel() > ROWS * num_experts:
        return False
    counts = torch.bincount(ids.reshape(-1), minlength=num_experts)
    return counts.numel() == num_experts and int(counts.max()) <= ROWS


class Few(Grouped):
    """All rows, each expert's filled up to the longest's."""

    def __init__(self, way: Route, count: int) -> None:
        super().__init__(way.ends, count)
        ends = way.ends.long()
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        self._longest, self._ends = max(1, int(counts.max())), way.ends.tolist()
        self._hit = int((counts > 0).sum())
        begins = ends - counts
        filled = begins[:, None] + torch.arange(self._longest)
        self._from = filled.clamp_(max=max(0, count - 1)).reshape(-1)  # [E * n], the row of every place
        self._at = torch.arange(count) - begins[self.expert.long()]  # [S], the place of every row among its expert's
        self._filled: tuple[Tensor, Tensor] | None = None  # the rows that were last filled up, and the result

    def mm(self, a: Tensor, stack: Tensor | Turned, out: Tensor | None = None) -> Tensor:
        if isinstance(stack, Turned):
            return self._one_by_one(a, stack)
        wide = stack.shape[2] > NARROW and stack.shape[1] > NARROW
        if wide and self._hit * HIT.get(a.element_size(), 1) < stack.shape[0]:
            return self._one_by_one(a, stack)
        filled = self._fill(a)
        if wide and (a.element_size() == 2 or self._longest >= TURN):
            y = torch.bmm(stack.transpose(1, 2), filled.transpose(1, 2)).transpose(1, 2)
        else:
            y = torch.bmm(filled, stack)
        return y[self.expert.long(), self._at]

    def mm_add_(self, y: Tensor, a: Tensor, stack: Tensor, scale: float) -> None:
        y.add_(self.mm(a, stack), alpha=scale)

    def _fill(self, a: Tensor) -> Tensor:
        """a [S, i] -> [E, n, i]; what belongs to no row is anybody's."""
        if self._filled is None or self._filled[0] is not a:
            self._filled = a, a.index_select(0, self._from).view(-1, self._longest, a.shape[1])
        return self._filled[1]

    def _one_by_one(self, a: Tensor, stack: Tensor | Turned) -> Tensor:
        parts, begin = [], 0
        for expert, end in enumerate(self._ends):
            if end > begin:
                part = a[begin:end]
                parts.append(stack.mm(part, expert) if isinstance(stack, Turned) else torch.mm(part, stack[expert]))
            begin = end
        return torch.cat(parts)
