"""Attention of some queries to some keys that also tells how much weight the keys have, so that pieces can be joined afterwards.

    attend(query [P, K, M, D], keys [P, K, N, D], values [P, K, N, V]) -> result [P, K, M, V] and log-sum-exp [P, K, M], both float32

`plain` is the definition. Legend: P pieces, of which each has its own keys (1 but for `Alive`), K key-value heads, M queries, N keys,
D size of a query and a key, V of a value.
Which kernel runs is said by `way`: each is one call of torch that returns log-sum-exps, for the devices, types and shapes that it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ropewalk.kernels.flex import compiled, cut_for

aten = torch.ops.aten


@dataclass(frozen=True)
class Causal:
    """Each of the last `new` keys has queries, G of them, group by group; they see it, and what lies before it in the window."""

    new: int
    window: int = 0  # how many keys are seen, the query's own among them; 0: all before it

    def mask(self, queries: int, keys: int, device: torch.device | str) -> Tensor:
        """[M, N], where a query sees a key."""
        return _band(self.new, keys, self.window).to(device).repeat(queries // self.new, 1)


class Alive:
    """Which keys of every piece there are [P, N]: all of a piece's queries see them."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask[:, None, None]  # [P, 1, 1, N]
        self._biases: dict[torch.dtype, Tensor] = {}

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores [P, 1, 1, N]; made once for all layers."""
        if dtype not in self._biases:
            self._biases[dtype] = _bias(self.mask, dtype)
        return self._biases[dtype]


@functools.lru_cache(maxsize=16)
def _band(new: int, keys: int, window: int) -> Tensor:
    seen = torch.ones(new, keys, dtype=torch.bool).tril(keys - new)
    return seen.triu(keys - new - window + 1) if window else seen


Seen = Tensor | Causal | Alive | None  # [M, N], which query sees which key; None: every one sees all
Way = Literal["plain", "flash on cpu", "flash", "efficient", "flex"]
LARGE = (
    1 << 22
)  # scores beyond which it is worth filling up narrower values for the sake of a kernel that does not keep the scores
HEAD = 256  # the largest head of FlashAttention
SPAN = 256  # queries that are held against a window together, at least
PIECE = 1 << 20  # bytes of a head's keys and values that a core keeps at hand while all queries are held against them
PIECED = range(
    33, 1025
)  # queries: the kernel takes 32 at a time, and the results of very many cost more to join than keys to read
KEPT = 1 << 18  # numbers of a bias that is made once for all layers
ALIGNED = 8  # rows of a bias begin at multiples of so many numbers


def attend(
    query: Tensor, keys: Tensor, values: Tensor, seen: Seen, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every query sees at least one key."""
    if isinstance(seen, Causal):
        spans = _spans(seen, keys.shape[2])
        if len(spans) > 1:
            return _in_spans(query, keys, values, seen, spans, scale, softcap)
    chosen = way(query, keys, values, seen, softcap)
    if isinstance(seen, Causal) and chosen != "flash on cpu":
        seen = seen.mask(query.shape[2], keys.shape[2], query.device)
    if isinstance(seen, Alive) and chosen in ("plain", "flex"):
        seen = seen.mask
    return WAYS[chosen](query, keys, values, seen, scale, softcap)


def _spans(seen: Causal, keys: int) -> list[tuple[int, int]]:
    """Queries that are computed together: where the window is narrow, few enough that most of what they are held against is seen."""
    if not seen.window:
        return [(0, seen.new)]
    step = max(SPAN, seen.window // 2)
    return [(begin, min(begin + step, seen.new)) for begin in range(0, seen.new, step)]


def _in_spans(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Causal,
    spans: list[tuple[int, int]],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    grouped = _grouped(query, seen.new)  # [1, K, G, new, D]
    outs, lses = [], []
    for begin, end in spans:
        last = keys.shape[2] - seen.new + end
        first = max(0, last - (end - begin) - seen.window + 1)
        part = grouped[:, :, :, begin:end].flatten(2, 3)
        held = keys[:, :, first:last], values[:, :, first:last]
        out, lse = attend(part, *held, Causal(end - begin, seen.window), scale, softcap)
        outs.append(_grouped(out, end - begin))
        lses.append(lse.reshape(*lse.shape[:2], -1, end - begin))
    return torch.cat(outs, dim=3).flatten(2, 3), torch.cat(lses, dim=3).flatten(2, 3)


def _grouped(rows: Tensor, new: int) -> Tensor:
    """[1, K, G*T, D] -> [1, K, G, T, D]."""
    return rows.reshape(*rows.shape[:2], -1, new, rows.shape[-1])


def way(query: Tensor, keys: Tensor, values: Tensor, seen: Seen, softcap: float | None) -> Way:
    """The kernel for these."""
    size, wide = query.shape[-1], values.shape[-1]
    if query.device.type == "cpu":
        scores = query.shape[:3].numel() * keys.shape[2]
        return "flash on cpu" if softcap is None and (size == wide or (wide < size and scores >= LARGE)) else "plain"
    if query.device.type != "cuda" or query.dtype == torch.float64:
        return "plain"
    if softcap is not None:
        return "flex"
    if seen is None and size == wide and size <= HEAD and size % ALIGNED == 0 and query.dtype.itemsize == 2:
        return "flash"
    return "efficient" if size % ALIGNED == 0 and wide % ALIGNED == 0 else "plain"


def plain(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As it is defined."""
    scores = torch.matmul(query, keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul((scores - lse.unsqueeze(-1)).exp().to(values.dtype), values).float(), lse


def flash_on_cpu(
    query: Tensor, keys: Tensor, values: Tensor, seen: Seen, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Tile by tile, in torch's kernel for the CPU, which wants values as wide as keys."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    wide = values.shape[-1]
    if seen is None and (pieces := _pieces(query, keys)) > 1:
        return _piece_by_piece(query, keys, values, pieces, scale)
    if wide < query.shape[-1]:
        values = F.pad(values, (0, query.shape[-1] - wide))
    if isinstance(seen, Causal) and seen.new == keys.shape[2] >= SPAN and not seen.window:
        # Group by group the kernel knows what is causal, and leaves out what nobody sees.
        groups = [kernel(q, keys, values, 0.0, True, scale=scale) for q in _grouped(query, seen.new).unbind(2)]
        out, lse = (torch.stack(parts, dim=2).flatten(2, 3) for parts in zip(*groups))
    else:
        if isinstance(seen, Causal):
            made = _kept_causal if query.shape[2] * keys.shape[2] <= KEPT else _causal
            bias: Tensor | None = made(seen, query.shape[2], keys.shape[2], query.dtype)
        elif isinstance(seen, Alive):
            bias = seen.bias(query.dtype)
        else:
            bias = None if seen is None else _bias(seen, query.dtype)[None, None]
        out, lse = kernel(query, keys, values, 0.0, False, attn_mask=bias, scale=scale)
    return out[..., :wide].float(), lse


def _causal(seen: Causal, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores [1, 1, M, N] on a CPU."""
    return _bias(seen.mask(queries, keys, "cpu"), dtype)[None, None]


_kept_causal = functools.lru_cache(maxsize=8)(_causal)  # of a question, for every layer


def _pieces(query: Tensor, keys: Tensor) -> int:
    """In how many pieces the keys are better read than from one end to the other for every 32 queries; in 16 bits it makes no difference."""
    if len(keys) > 1 or query.shape[2] not in PIECED or query.element_size() != 4:
        return 1
    bytes_of_head = 2 * keys.shape[2] * keys.shape[3] * keys.element_size()
    return bytes_of_head // PIECE if bytes_of_head >= 4 * PIECE else 1


def _piece_by_piece(query: Tensor, keys: Tensor, values: Tensor, pieces: int, scale: float) -> tuple[Tensor, Tensor]:
    """What `flash_on_cpu` computes where every query sees every key [1, K, N, D]."""
    size = keys.shape[2] // pieces
    own_keys, own_values = (
        held[0, :, : size * pieces].reshape(held.shape[1], pieces, size, -1).transpose(0, 1) for held in (keys, values)
    )
    out, lse = flash_on_cpu(query.expand(pieces, -1, -1, -1), own_keys, own_values, None, scale, None)
    if rest := keys.shape[2] - size * pieces:
        last = flash_on_cpu(query, keys[:, :, -rest:], values[:, :, -rest:], None, scale, None)
        out, lse = torch.cat([out, last[0]]), torch.cat([lse, last[1]])
    most = lse.amax(0, keepdim=True)
    weights = (lse - most).exp_()
    total = weights.sum(0, keepdim=True)
    return (out * weights.div_(total).unsqueeze(-1)).sum(0, keepdim=True), total.log_().add_(most)


def flash(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """FlashAttention, 16 bits, nothing masked."""
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, False, False, scale=scale)
    return out.float(), lse


def efficient(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | Alive | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Memory-efficient attention: any mask, float32 too, values of another width."""
    bias = None
    if seen is not None:
        bias = seen.bias(query.dtype) if isinstance(seen, Alive) else _bias(seen, query.dtype)
        count = bias.shape[-1]
        bias = F.pad(bias, (0, -count % ALIGNED))[..., :count].expand(*query.shape[:3], -1)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, keys, values, bias, True, 0.0, False, scale=scale)
    return out.float(), lse[:, :, : query.shape[2]]


def flex(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """FlexAttention: compiled for this softcap, whatever the lengths."""
    cut = cut_for(query.device, query.dtype, max(query.shape[-1], values.shape[-1]))
    how: dict[str, Any] = {"score_mod": _scores(seen, softcap), "scale": scale, "return_aux": _lse(), "kernel_options": cut}
    out, aux = compiled(query.device.type)(query, keys, values, **how)
    return out.float(), aux.lse.float()


def _scores(seen: Tensor | None, softcap: float | None) -> Callable[..., Tensor] | None:
    if seen is None and softcap is None:
        return None

    def change(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        if seen is None:
            return score
        there = seen[row, column] if seen.dim() == 2 else seen[batch, 0, 0, column]
        return torch.where(there, score, -float("inf"))

    return change


def _lse() -> Any:
    from torch.nn.attention.flex_attention import AuxRequest

    return AuxRequest(lse=True)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


WAYS: dict[Way, Callable[..., tuple[Tensor, Tensor]]] = {
    "plain": plain,
    "flash on cpu": flash_on_cpu,
    "flash": flash,
    "efficient": efficient,
    "flex": flex,
}
