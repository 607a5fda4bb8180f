"""FlexAttention as the kernels here call it: compiled whole, with blocks that fit the device, and masks made from spans.

What torch chooses by itself for heads of 512 needs more shared memory than an H100 has, and for heads of 256 more than the 99 KB of
SM86, SM89 and SM120. The cuts below were compiled from torch's own templates by Triton 3.6 for SM80, SM86, SM90 and SM120: that is where
the bytes beside them come from.
Legend: T tokens, M blocks of queries, N blocks of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 128  # tokens of a block of a mask
GRAPHS = 64  # that one function may be compiled to: by kind of layer, with and without gradients and windows, for a block and for more
KB = 1024
SHARED = {
    (8, 0): 163 * KB,
    (8, 7): 163 * KB,
    (9, 0): 227 * KB,
    (10, 0): 227 * KB,
    (10, 3): 227 * KB,
}  # for one program, 99 KB elsewhere

Cut = dict[str, Any]


def _forward(queries: int, keys: int, stages: int, warps: int) -> Cut:
    return {"fwd_BLOCK_M": queries, "fwd_BLOCK_N": keys, "fwd_num_stages": stages, "fwd_num_warps": warps}


def _backward(block: int, stages: int, warps: int) -> Cut:
    blocks = {f"bwd_BLOCK_{name}": block for name in ("M1", "N1", "M2", "N2")}
    return blocks | {"bwd_num_stages": stages, "bwd_num_warps": warps}


WIDE = {  # heads of up to 512
    163 * KB: _forward(64, 32, 2, 8) | _backward(16, 1, 8),  # 133 KB on SM80, 193 on SM90; 64
    99 * KB: _forward(32, 16, 2, 4) | _backward(16, 1, 8),  # 65; 64
}
HALF = {99 * KB: _forward(64, 32, 2, 4) | _backward(32, 2, 4)}  # of up to 256: 69; 69. Larger devices run torch's own
EXACT = {99 * KB: _forward(16, 16, 1, 4) | _backward(16, 1, 8)}  # the same in float32; of 512 they need 163 KB


def cut_for(device: torch.device, dtype: torch.dtype, size: int) -> Cut:
    """What a head of this size is cut into; nothing where torch's own choice fits."""
    if device.type != "cuda":
        return {}
    shared = SHARED.get(torch.cuda.get_device_capability(device), 99 * KB)
    return cut_by(shared, dtype, size) | {
        "FORCE_USE_FLEX_ATTENTION": True
    }  # short rows too: another kernel has limits of its own


def cut_by(shared: int, dtype: torch.dtype, size: int) -> Cut:
    """The same by the bytes of shared memory that a program may take."""
    if size <= 128 or (size <= 256 and shared > 99 * KB):
        return {}
    known = EXACT if dtype.itemsize == 4 else HALF if size <= 256 else WIDE
    return known[max(least for least in known if least <= shared)]


@functools.cache
def compiled(device: str) -> Callable[..., Any]:
    """The function, which on a GPU is compiled whole or raises: uncompiled it would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    called: Callable[..., Any] = flex_attention
    return called if device == "cpu" else whole(called, dynamic=True)


def whole(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiled for as many kinds of calls as there are here; one too many is an error."""
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    return torch.compile(function, fullgraph=True, **options)


def block_mask(
    spans: Sequence[tuple[int, int, int]], length: int, window: int, sees: Callable[..., Any], device: torch.device | str
) -> Any:
    """torch's mask by blocks for spans as of Branching.spans; `sees` is asked within the blocks of which a part is seen."""
    from torch.nn.attention.flex_attention import BlockMask

    some, all_of_it = seen_blocks(spans, length, window)
    partly, fully = _ordered(some & ~all_of_it), _ordered(all_of_it)
    made = BlockMask.from_kv_blocks(*partly, *fully, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length))
    return made.to(str(device))


def seen_blocks(spans: Sequence[tuple[int, int, int]], length: int, window: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[M, N] each: the blocks of which some query sees some key, and those of which every query sees every key."""
    count = -(-length // BLOCK)
    some, pairs = np.zeros((count, count), bool), np.zeros((count, count), np.int64)
    ends = {begin: end for begin, end, home in spans if begin == home}
    for begin, end, home in spans:
        held = [(begin, end, 0)]
        if home != begin:  # behind the prompt as if nothing lay between
            held.append((home, ends[home], begin - ends[home]))
        rows, first, last = _cut(begin, end)
        for key_begin, key_end, between in held:
            columns, low, high = _cut(key_begin, key_end)
            nearest = first[:, None] - high - between
            furthest = last[:, None] - low - between
            within = nearest < window if window else True
            some[rows, columns] |= (furthest >= 0) & within
            whole = (nearest >= 0) & (furthest < window if window else True)
            pairs[rows, columns] += whole * ((last - first + 1)[:, None] * (high - low + 1))
    return some, pairs == BLOCK * BLOCK


def _cut(begin: int, end: int) -> tuple[slice, NDArray[np.int64], NDArray[np.int64]]:
    """The blocks that tokens from begin to end lie in, and the first and the last of them in each."""
    blocks = slice(begin // BLOCK, (end - 1) // BLOCK + 1)
    starts = np.arange(blocks.start, blocks.stop, dtype=np.int64) * BLOCK
    return blocks, np.maximum(starts, begin), np.minimum(starts + BLOCK, end) - 1


def _ordered(blocks: NDArray[np.bool_]) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, N] -> how many of each row [1, 1, M], and which [1, 1, M, N], the others behind them."""
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(blocks.sum(1).astype(np.int32))[None, None], torch.from_numpy(order)[None, None]
