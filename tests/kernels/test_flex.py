"""Masks by blocks against torch's own, made of every two tokens; cuts that fit; and nothing that falls back to all scores in silence."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from ropewalk.kernels import branching as module
from ropewalk.kernels.branching import Branching, Piece, branching, plain
from ropewalk.kernels.flex import GRAPHS, KB, SHARED, cut_by, whole

ROWS = [
    Branching((Piece(300, (5, 140, 3)), Piece(0, (260,)), Piece(1, (1, 1)), Piece(0, (1, 130))), 900),
    Branching((Piece(256, (128, 128)), Piece(0, (128, 20))), 700),
    Branching((Piece(130, tuple([7] * 30)),), 340),
    Branching((Piece(0, (700,)),), 700),
    Branching((Piece(3, (2, 4)),), 9),
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
@pytest.mark.parametrize("window", [0, 1, 128, 200, 600])
def test_a_mask_from_spans_is_the_one_that_asks_for_every_two_tokens(row, window):
    found, truth = row.block_mask(window), create_block_mask(row._sees(window), None, None, row.length, row.length, "cpu")
    assert found.seq_lengths == truth.seq_lengths
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, expected = (getattr(mask, f"{name}_num_blocks") for mask in (found, truth))
        assert counts.dtype == expected.dtype
        assert torch.equal(counts, expected)
        mine, theirs = (getattr(mask, f"{name}_indices") for mask in (found, truth))
        assert mine.shape == theirs.shape
        for line, count in enumerate(counts.flatten().tolist()):
            assert torch.equal(mine[0, 0, line, :count], theirs[0, 0, line, :count])


def test_a_mask_of_16_thousand_tokens_never_holds_two_of_them_against_each_other():
    """128 x 128 blocks; every two tokens would be 268 million."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numbers = max([self.numbers, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))])
            return out

    row = Branching((Piece(4000, (6000, 6384)),), 16384)
    with Largest() as watch:
        row.block_mask(1024)
    assert watch.numbers <= 129 * 128


def needed(cut: dict[str, int], size: int, itemsize: int, sm90: bool) -> int:
    """Bytes that a forward takes: queries, and so many stages of keys and values, of which SM80 and its kin hold one less."""
    stages = cut["fwd_num_stages"] if sm90 else max(1, cut["fwd_num_stages"] - 1)
    return (cut["fwd_BLOCK_M"] + stages * 2 * cut["fwd_BLOCK_N"]) * size * itemsize


@pytest.mark.parametrize("shared", sorted({99 * KB, *SHARED.values()}))
@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_cut_fits_the_shared_memory_where_torchs_own_choice_does_not(shared, size, dtype):
    cut = cut_by(shared, dtype, size)
    if size == 256 and shared > 99 * KB:
        assert cut == {}
        return
    if size == 512 and dtype == torch.float32 and shared == 99 * KB:
        assert needed(cut, size, 4, sm90=False) > shared - 5 * KB  # none fits, and such layers go by spans
        return
    assert needed(cut, size, dtype.itemsize, sm90=shared > 200 * KB) <= shared - 5 * KB
    assert cut["bwd_BLOCK_M1"] * 4 * size * dtype.itemsize <= shared
    # torch's (64, 32, 3) for 512 in 16 bits on an H100: (64 + 3 * 2 * 32) * 512 * 2 = 262,144 bytes of 232,448
    assert needed({"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 3}, 512, 2, sm90=True) == 262144 > 227 * KB
    assert cut_by(shared, dtype, 128) == {}


def test_one_kind_too_many_is_an_error_and_nothing_uncompiled():
    """torch would compile 8 kinds, and hold all scores from there on without a word."""

    def shifted(x, by):
        return x + len(by)

    with torch._dynamo.config.patch(recompile_limit=8):
        compiled = whole(shifted, backend="eager")
        assert torch._dynamo.config.recompile_limit == GRAPHS
        for number in range(1, 11):
            assert compiled(torch.zeros(1), "x" * number).item() == number
    with torch._dynamo.config.patch(recompile_limit=10), pytest.raises(Exception, match=r"fullgraph|recompile"):
        compiled(torch.zeros(1), "x" * 11)
    torch._dynamo.reset()


def test_a_kind_of_layer_that_does_not_compile_is_told_of_once_and_the_others_keep_theirs(monkeypatch, caplog):
    def attention(query, key, value, row, scale, window=0, sinks=None):
        if query.shape[2] == 16:
            raise RuntimeError("out of resource: shared memory")
        return plain(query, key, value, row, scale, window, sinks)

    monkeypatch.setattr(module, "flex", attention)
    module._runs.cache_clear()
    cpu = torch.device("cpu")
    kinds = [module._Kind(cpu, torch.float32, 2, 1, size, size, sinks) for size, sinks in ((8, False), (16, False), (8, True))]
    for _ in range(2):
        with torch.no_grad():
            assert [module._runs(kind) for kind in kinds] == [True, False, True]
    assert [record.getMessage().count("out of resource: shared memory") for record in caplog.records] == [1]
    module._runs.cache_clear()


class Efficient:
    """torch's memory-efficient kernels for a GPU by their definition: log-sum-exps filled up to whole 32 rows, and what they ask for."""

    @staticmethod
    def scores(q, k, bias, causal, scale):
        scores = (q @ k.transpose(-1, -2)) * scale
        if bias is not None:
            assert bias.shape == scores.shape
            assert bias.stride(-1) == 1
            assert bias.stride(-2) % 8 == 0
            scores = scores + bias
        return scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), float("-inf")) if causal else scores

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, keeps, dropout, causal, scale):
        scores = self.scores(q, k, bias, causal, scale)
        lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, -q.shape[2] % 32), value=float("inf"))
        return scores.softmax(-1) @ v, lse, None, None

    def _scaled_dot_product_efficient_attention_backward(
        self, d_out, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, scale
    ):
        assert lse.shape[-1] % 32 == 0
        assert lse.is_contiguous()
        p = (self.scores(q, k, bias, causal, scale) - lse[..., : q.shape[2], None]).exp()
        d = p * (d_out @ v.transpose(-1, -2) - (d_out * out).sum(-1, keepdim=True)) * scale
        return d @ k, d.transpose(-1, -2) @ q, p.transpose(-1, -2) @ d_out, None


@pytest.mark.parametrize("window", [0, 40])
def test_by_spans_on_a_gpu_nothing_holds_all_scores(window, monkeypatch):
    monkeypatch.setattr(module, "aten", Efficient())
    monkeypatch.setattr(module, "_in_tiles", lambda q, v: False)
    monkeypatch.setattr(module, "_in_blocks", lambda q, v: True)
    monkeypatch.setattr(module, "_scores", None)
    row = ROWS[2]
    draw = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(row.length, heads, 8, generator=draw, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2, 4)
    )
    found = [torch.autograd.grad(f(q, k, v, row, 0.3, window), (q, k, v), upstream.detach()) for f in (branching, plain)]
    for mine, truth in zip(*found):
        assert torch.allclose(mine, truth, atol=1e-10)
