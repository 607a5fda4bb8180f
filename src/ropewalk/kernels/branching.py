"""Attention of rows in which several branches go on from one prompt: every branch sees the prompt and itself, and nothing sees more.

A row is cut into spans, each a prompt or a branch. Spans attend to themselves, those of like length together; then the branches of a
prompt attend to it all at once. Both parts are joined by their log-sum-exps, which is exact, and so is going back: the gradient of each
part is that of a softmax whose sum is known, so a kernel is handed the joined results in the place of its own. Sinks, which take weight
and give nothing, are one more part of that sum. No mask over the whole row is ever made. `plain` is the definition.
Legend: T tokens of a row, H query heads, K key-value heads, D size of a query and a key, V of a value, N spans taken together, L their
longest, M queries.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.kernels.flex import block_mask, compiled, cut_for

aten = torch.ops.aten
log = logging.getLogger("ropewalk.kernels")

APART = 256  # tokens from which on a span is taken by itself, so that no part of it is padding
LITTLE = 16  # tokens of a span that costs no more than the call for it
BLOCK = 256  # queries that are held against a window together, at least
ROWS = 32  # to a multiple of which the memory-efficient kernel wants log-sum-exps filled up
ALIGNED = 8  # rows of its bias begin at multiples of so many numbers


@dataclass(frozen=True)
class Piece:
    """A prompt of some tokens, which may be none, and behind it its branches, of so many tokens each."""

    prompt: int
    branches: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.branches)


@dataclass(frozen=True)
class _Rows:
    """Which tokens are taken: those from `begin` to `end`, or those of `index` [N, L], of which the `kept` [n] are not padding."""

    begin: int = 0
    end: int = 0
    index: Tensor | None = None
    kept: Tensor | None = None

    def of(self, rows: Tensor) -> Tensor:
        """rows [T, H, D] -> [N, H, L, D]."""
        if self.index is None:
            return rows[self.begin : self.end].transpose(0, 1).unsqueeze(0)
        return rows.index_select(0, self.index.flatten()).view(*self.index.shape, *rows.shape[1:]).transpose(1, 2)

    def put(self, rows: Tensor, found: Tensor, *, add: bool = False) -> None:
        """found [N, H, L, D] at its places in rows [T, H, D], which is changed."""
        found = found.transpose(1, 2).flatten(0, 1)
        if self.index is None:
            held = rows[self.begin : self.end]
            held.add_(found) if add else held.copy_(found)
            return
        places = self.index.flatten()
        if self.kept is not None:
            places, found = places[self.kept], found[self.kept]
        rows[places] = rows[places] + found if add else found

    def quiet(self, found: Tensor) -> Tensor:
        """found [N, H, L, D] with 0 where it is padding."""
        if self.index is None or self.kept is None:
            return found
        mask = torch.zeros(self.index.numel(), dtype=found.dtype, device=found.device).index_fill_(0, self.kept, 1)
        return found * mask.view(self.index.shape[0], 1, -1, 1)


@dataclass(frozen=True)
class _Part:
    """Queries held against keys: causally in spans of their own, or all against all but for a mask `seen` [M, L]."""

    queries: _Rows
    keys: _Rows
    causal: bool = False
    seen: Tensor | None = None
    joins: bool = False  # what these queries have found elsewhere


@dataclass(frozen=True)
class Branching:
    """The pieces of a row from left to right; what lies behind them belongs to the last branch."""

    pieces: tuple[Piece, ...]
    length: int  # T
    device: torch.device | str = "cpu"
    _parts: dict[int, list[_Part]] = field(default_factory=dict, repr=False, compare=False)
    _masks: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def parts(self, window: int) -> list[_Part]:
        """What is held against what where a query sees `window` keys, its own among them; 0: all before it."""
        if window not in self._parts:
            self._parts[window] = [*self._own(window), *self._prompts(window)]
        return self._parts[window]

    def spans(self) -> list[tuple[int, int, int]]:
        """Begin and end of every prompt and branch, and where its prompt begins, or where it does itself if it has none."""
        found, at = [], 0
        for piece in self.pieces:
            home = at
            for size in (piece.prompt, *piece.branches):
                if size:
                    found.append((at, at + size, home if piece.prompt else at))
                at += size
        assert at <= self.length, f"{at} tokens in a row of {self.length}"
        begin, _, home = found[-1]
        return [*found[:-1], (begin, self.length, home)]

    def seen(self, window: int) -> Tensor:
        """[T, T]: which token sees which, as it is defined."""
        place = torch.arange(self.length, device=self.device)
        return self._sees(window)(0, 0, place[:, None], place)  # type: ignore[no-any-return]

    def block_mask(self, window: int) -> Any:
        """The same for FlexAttention: by blocks, found from the spans."""
        if window not in self._masks:
            self._masks[window] = block_mask(self.spans(), self.length, window, self._sees(window), self.device)
        return self._masks[window]

    def _sees(self, window: int) -> Callable[..., Any]:
        spans = self.spans()
        sizes = torch.tensor([end - begin for begin, end, _ in spans])
        starts, homes = torch.tensor([begin for begin, _, _ in spans]), torch.tensor([home for _, _, home in spans])
        span, home = (torch.repeat_interleave(which, sizes).to(self.device) for which in (starts, homes))
        at = self.positions().to(self.device)

        def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
            seen = (query >= key) & ((span[query] == span[key]) | (home[query] == span[key]))
            return seen & (at[query] - at[key] < window) if window else seen

        return sees

    def positions(self) -> Tensor:
        """[T]: how far each token is from the beginning of its prompt; branches go on from its end."""
        ends = {begin: end for begin, end, home in self.spans() if begin == home}
        parts = []
        for begin, end, home in self.spans():
            first = 0 if begin == home else ends[home] - home
            parts.append(torch.arange(first, first + end - begin))
        return torch.cat(parts)

    def _own(self, window: int) -> list[_Part]:
        parts: list[_Part] = []
        short: list[tuple[int, int]] = []
        for begin, end, _ in self.spans():
            size = end - begin
            if window and size > window:
                parts += self._windowed(begin, end, window)
            elif size >= APART:
                rows = _Rows(begin, end)
                parts.append(_Part(rows, rows, causal=True))
            else:
                short.append((begin, end))
        for spans in _alike(short):
            rows = self._together(spans)
            parts.append(_Part(rows, rows, causal=True))
        return parts

    def _together(self, spans: Sequence[tuple[int, int]]) -> _Rows:
        if len(spans) == 1:
            return _Rows(*spans[0])
        begins, ends = torch.tensor(spans).T
        offsets = torch.arange(int((ends - begins).max()))
        index = begins[:, None] + offsets
        inside = index < ends[:, None]
        kept = None if bool(inside.all()) else torch.nonzero(inside.flatten()).squeeze(1).to(self.device)
        return _Rows(index=torch.minimum(index, ends[:, None] - 1).to(self.device), kept=kept)

    def _windowed(self, begin: int, end: int, window: int) -> list[_Part]:
        """A span that is longer than the window: some queries at a time, against the keys that any of them sees."""
        parts, step = [], max(BLOCK, window // 2)
        for first in range(begin, end, step):
            last = min(first + step, end)
            low = max(begin, first - window + 1)
            behind = torch.arange(first, last)[:, None] - torch.arange(low, last)
            parts.append(_Part(_Rows(first, last), _Rows(low, last), seen=((behind >= 0) & (behind < window)).to(self.device)))
        return parts

    def _prompts(self, window: int) -> list[_Part]:
        """The branches of each prompt against it."""
        parts, at = [], 0
        for number, piece in enumerate(self.pieces):
            prompt, end = at + piece.prompt, at + piece.length
            if number == len(self.pieces) - 1:
                end = self.length
            if piece.prompt:
                positions = torch.cat(
                    [torch.arange(size) for size in piece.branches[:-1]] or [torch.empty(0, dtype=torch.long)]
                )
                positions = torch.cat([positions, torch.arange(end - prompt - len(positions))]) + piece.prompt
                if not window or int(positions.max()) < window:
                    parts.append(_Part(_Rows(prompt, end), _Rows(at, prompt), joins=True))
                elif window > 1:
                    # Whoever sees the last id of the prompt sees something of it.
                    near = torch.nonzero(positions - (piece.prompt - 1) < window).squeeze(1)
                    low = max(0, piece.prompt + 1 - window)
                    seen = positions[near][:, None] - torch.arange(low, piece.prompt) < window
                    rows = _Rows(index=(near + prompt)[None].to(self.device))
                    parts.append(_Part(rows, _Rows(at + low, prompt), seen=seen.to(self.device), joins=True))
            at += piece.length
        return parts


def _alike(spans: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Spans in lists of like length, so that little is filled up; those that cost nothing are all alike."""
    found: list[list[tuple[int, int]]] = []
    longest = 0
    for begin, end in sorted(spans, key=lambda span: span[0] - span[1]):
        if not found or max(end - begin, LITTLE) * 5 < longest * 4:
            found.append([])
            longest = end - begin
        found[-1].append((begin, end))
    return found


def branching(
    query: Tensor, key: Tensor, value: Tensor, row: Branching, scale: float, window: int = 0, sinks: Tensor | None = None
) -> Tensor:
    """query [T, H, D], key [T, K, D], value [T, K, V], sinks [H] -> [T, H, V]."""
    if query.device.type == "cuda" and query.dtype != torch.float64 and compiles():
        kind = _Kind(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2], value.shape[2], sinks is not None)
        if _runs(kind):
            return flex(query, key, value, row, scale, window, sinks)
    found: Tensor = _Branching.apply(query, key, value, sinks, row.parts(window), scale)  # type: ignore[no-untyped-call]
    return found


def plain(
    query: Tensor, key: Tensor, value: Tensor, row: Branching, scale: float, window: int = 0, sinks: Tensor | None = None
) -> Tensor:
    """The same through one mask over the whole row and autograd: the twin that tests compare with."""
    q, k, v = _heads(query[None].transpose(1, 2), key[None].transpose(1, 2), value[None].transpose(1, 2))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~row.seen(window), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return (torch.softmax(scores, dim=-1)[..., : row.length] @ v)[0].transpose(0, 1)


def flex(
    query: Tensor, key: Tensor, value: Tensor, row: Branching, scale: float, window: int = 0, sinks: Tensor | None = None
) -> Tensor:
    """The same by FlexAttention, which skips blocks of keys that none of a block of queries sees."""
    q, k, v = (rows.transpose(0, 1).unsqueeze(0) for rows in (query, key, value))
    how: dict[str, Any] = {"block_mask": row.block_mask(window), "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    how["kernel_options"] = cut_for(query.device, query.dtype, max(query.shape[-1], value.shape[-1]))
    attention = compiled(query.device.type)
    if sinks is None:
        out: Tensor = attention(q, k, v, **how)
        return out[0].transpose(0, 1)
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = attention(q, k, v, return_aux=AuxRequest(lse=True), **how)
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype).view(1, -1, 1))  # of the weight that is not the sink's
    return (out * share.unsqueeze(-1).to(out.dtype))[0].transpose(0, 1)


@functools.cache
def compiles() -> bool:
    """Whether FlexAttention can be compiled for a GPU here."""
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class _Kind:
    """What FlexAttention is compiled for anew."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    size: int
    wide: int
    sinks: bool


@functools.cache
def _runs(kind: _Kind) -> bool:
    """Whether FlexAttention runs for such layers, forwards and backwards: tried once, over a short row.

    A layer for which it does not is computed by spans; the others of its model keep it. The first pass of a model that is taught to read
    such rows (train/branching.py) comes by here without gradients, so that no hook of a pass sees what is tried.
    """
    row = Branching((Piece(96, (64, 70)), Piece(0, (90,))), 320, kind.device)
    make = functools.partial(torch.zeros, dtype=kind.dtype, device=kind.device, requires_grad=True)
    shapes = (kind.heads, kind.size), (kind.kv_heads, kind.size), (kind.kv_heads, kind.wide)
    q, k, v = (make(row.length, *shape) for shape in shapes)
    sinks = make(kind.heads) if kind.sinks else None
    try:
        with torch.enable_grad():
            out = flex(q, k, v, row, 1.0, 0, sinks)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip()[:500]}"
        log.warning("heads of %d are attended to by spans, as FlexAttention does not run for them: %s", kind.size, reason)
        return False
    return True


class _Branching(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, parts: list[_Part], scale: float
    ) -> Tensor:
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        lse: Tensor | None = None
        for part in parts:
            q, k, v = _heads(part.queries.of(query), part.keys.of(key), part.keys.of(value))
            found, sums = _forward(q, k, v, part, scale)
            sums = sums.unsqueeze(-1)
            if lse is None:
                lse = sums.new_empty((*query.shape[:2], 1))
            if part.joins:
                before, other = part.queries.of(out), part.queries.of(lse)
                total = torch.logaddexp(other, sums)
                found = (before * (other - total).exp() + found * (sums - total).exp()).to(out.dtype)
                sums = total
            part.queries.put(out, found)
            part.queries.put(lse, sums)
        if sinks is not None:
            assert lse is not None
            total = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
            out = (out * (lse - total).exp()).to(out.dtype)
            lse = total
        ctx.save_for_backward(query, key, value, out, lse, sinks)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, sinks = ctx.saved_tensors
        # Where spans attend to themselves, and whole, every token is met once; the blocks of windows meet keys again.
        again = any(part.seen is not None and not part.joins for part in ctx.parts)
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(rows) if again else torch.empty_like(rows) for rows in (key, value))
        for part in ctx.parts:
            q, k, v = _heads(part.queries.of(query), part.keys.of(key), part.keys.of(value))
            d_out = part.queries.quiet(part.queries.of(upstream))
            sums = part.queries.of(lse).squeeze(-1)
            d_q, d_k, d_v = _backward(d_out, q, k, v, part.queries.of(out), sums, part, ctx.scale)
            add = part.joins or part.seen is not None
            part.queries.put(d_query, d_q, add=part.joins)
            part.keys.put(d_key, _folded(d_k, key.shape[1]), add=add)
            part.keys.put(d_value, _folded(d_v, key.shape[1]), add=add)
        d_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # d score = p (d p - <d out, out>), and a sink's value is 0
            weight = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp()
            d_sinks = -(weight * (upstream * out).sum(-1, keepdim=True)).sum((0, 2)).to(sinks.dtype)
        return d_query, d_key, d_value, d_sinks, None, None


def _heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values for every query head: [N, K, L, D] -> [N, H, L, D]."""
    groups = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(groups, 1) if groups > 1 else k, v.repeat_interleave(groups, 1) if groups > 1 else v


def _folded(gradient: Tensor, heads: int) -> Tensor:
    """[N, H, L, D] -> [N, K, L, D]."""
    return gradient if gradient.shape[1] == heads else gradient.reshape(len(gradient), heads, -1, *gradient.shape[2:]).sum(2)


def _in_tiles(q: Tensor, v: Tensor) -> bool:
    """Whether torch's kernel for the CPU, which never holds all scores, takes these; narrower values are filled up for it."""
    return q.device.type == "cpu" and v.shape[-1] <= q.shape[-1]


def _in_blocks(q: Tensor, v: Tensor) -> bool:
    """Whether torch's memory-efficient kernel for a GPU takes these, of whatever size: rows of whole 16 bytes."""
    whole = all(rows.shape[-1] * rows.element_size() % 16 == 0 for rows in (q, v))
    return q.device.type == "cuda" and q.dtype != torch.float64 and whole


def _filled(values: Tensor, size: int) -> Tensor:
    return values if values.shape[-1] == size else F.pad(values, (0, size - values.shape[-1]))


def _forward(q: Tensor, k: Tensor, v: Tensor, part: _Part, scale: float) -> tuple[Tensor, Tensor]:
    """[N, H, M, V], and log-sum-exps [N, H, M]."""
    if _in_tiles(q, v):
        kernel, size = aten._scaled_dot_product_flash_attention_for_cpu, q.shape[-1]
        out, lse = kernel(q, k, _filled(v, size), 0.0, part.causal, attn_mask=_bias(part, q.dtype), scale=scale)
        return out[..., : v.shape[-1]], lse
    if _in_blocks(q, v):
        kernel = aten._scaled_dot_product_efficient_attention
        out, lse, *_ = kernel(q, k, v, _aligned(_bias(part, q.dtype), q), True, 0.0, part.causal, scale=scale)
        return out, lse[..., : q.shape[-2]]
    scores = _scores(q, k, part, scale)
    lse = torch.logsumexp(scores, dim=-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: _Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if _in_tiles(q, v):
        kernel, size = aten._scaled_dot_product_flash_attention_for_cpu_backward, q.shape[-1]
        filled, bias = (_filled(values, size) for values in (d_out, v, out)), _bias(part, q.dtype)
        d_out, wide, out = filled
        d_q, d_k, d_v = kernel(d_out, q, k, wide, out, lse, 0.0, part.causal, attn_mask=bias, scale=scale)
        return d_q, d_k, d_v[..., : v.shape[-1]]
    if _in_blocks(q, v):
        kernel, bias = aten._scaled_dot_product_efficient_attention_backward, _aligned(_bias(part, q.dtype), q)
        lse = F.pad(lse, (0, -lse.shape[-1] % ROWS), value=float("inf")).contiguous()
        drawn = torch.zeros((), dtype=torch.long, device=q.device)  # the state of a dropout that there is not
        wanted = [True, True, True, False]
        d_q, d_k, d_v, _ = kernel(d_out, q, k, v, bias, out, lse, drawn, drawn, 0.0, wanted, part.causal, scale=scale)
        return d_q, d_k, d_v
    p = (_scores(q, k, part, scale) - lse.unsqueeze(-1)).exp()
    d_p = (d_out @ v.transpose(-1, -2)).to(p.dtype)
    d_scores = p * (d_p - (d_out * out).to(p.dtype).sum(-1, keepdim=True)) * scale
    d_scores = d_scores.to(q.dtype)
    return d_scores @ k, d_scores.transpose(-1, -2) @ q, p.to(d_out.dtype).transpose(-1, -2) @ d_out


def _scores(q: Tensor, k: Tensor, part: _Part, scale: float) -> Tensor:
    """[N, H, M, L], float32 or wider."""
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if part.causal else part.seen
    return scores if seen is None else scores.masked_fill(~seen, float("-inf"))


def _bias(part: _Part, dtype: torch.dtype) -> Tensor | None:
    if part.seen is None:
        return None
    return torch.zeros(part.seen.shape, dtype=dtype, device=part.seen.device).masked_fill_(~part.seen, float("-inf"))[
        None, None
    ]


def _aligned(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """As the memory-efficient kernel wants it: [N, H, M, L], a view of rows that begin at whole multiples."""
    if bias is None:
        return None
    count = bias.shape[-1]
    return F.pad(bias, (0, -count % ALIGNED))[..., :count].expand(*q.shape[:3], -1)
