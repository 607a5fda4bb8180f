"""Batches: a tight and repeatable fit, and a packed batch gives the losses and gradients of its rows alone."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from ropewalk.config.run import parse_run
from ropewalk.data.packing import batches, best_fit, lay_out, pack


class FakeRows:
    """Rows in memory, with what `batches` asks of rows; row n is n+1 repeated."""

    pad = 0

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full(self.lengths[number], number + 1, np.int32)
        return ids, ids.copy()


def a_run(**keys: object) -> Any:
    return parse_run(json.dumps({"base_model": "x", "learning_rate": 0.1, "datasets": [{"path": "x"}], **keys}))


def test_best_fit_by_hand() -> None:
    # Room 10. 7 opens line 0, 6 line 1, 4 fits best into line 1 (room 4), 3 into line 0 (room 3), 2 opens line 2.
    assert best_fit(np.array([6, 3, 7, 2, 4], np.int32), 10).tolist() == [1, 0, 0, 2, 1]


def test_rows_of_like_length_are_fitted_as_they_come_where_that_needs_fewer_lines() -> None:
    # Longest first: 4+4, 3+3+3, 3. As they come: 4+3+3 twice.
    assert best_fit(np.array([4, 3, 3, 4, 3, 3], np.int32), 10).tolist() == [0, 0, 0, 1, 1, 1]


def test_packing_places_every_row_once_and_wastes_little() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 512, 20000).astype(np.int32)
    lines = pack(lengths, generator.permutation(20000), 1024, in_order=False, generator=generator)
    used = [int(lengths[line].sum()) for line in lines]
    assert sorted(int(row) for line in lines for row in line) == list(range(20000))
    assert max(used) <= 1024
    assert sum(used) / (1024 * len(lines)) > 0.995
    in_order = pack(lengths, np.arange(20000), 1024, in_order=True, generator=generator)
    assert [int(row) for line in in_order for row in line] == list(range(20000))


def test_a_million_rows_are_packed_in_seconds() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 2000, 1_000_000).astype(np.int32)
    started = time.process_time()
    pack(lengths, np.arange(1_000_000), 4096, in_order=False, generator=generator)
    assert time.process_time() - started < 10  # 2 seconds on an idle machine


def test_any_batch_can_be_made_again() -> None:
    rows, run = FakeRows([3, 9, 5, 8, 2, 7, 4, 6] * 8), a_run(sample_packing=True, sequence_len=16, micro_batch_size=2)
    whole = batches(rows, run, seed=5, epoch=1)
    again = batches(rows, run, seed=5, epoch=1)
    assert all(np.array_equal(whole[i].ids, again[i].ids) for i in reversed(range(len(whole))))
    others = [batches(rows, run, seed=5, epoch=2), batches(rows, run, seed=6, epoch=1)]
    assert all(any(not np.array_equal(whole[i].ids, other[i].ids) for i in range(3)) for other in others)
    assert sum(batch.tokens for batch in whole) == rows.lengths.sum()
    assert all(batch.ids.shape == (2, 16) for batch in whole[:-1])


def test_the_layout_of_a_packed_line() -> None:
    a, b = np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)
    batch = lay_out([[(a, a), (b, b)], [(b, b)]], pad=1, width=None)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 1, 1, 1], [8, 9, 1, 1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9, -100, -100, -100], [-100, 9] + [-100] * 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], list(range(8))]
    assert (batch.tokens, batch.trained) == (7, 4)


def test_unpacked_rows_are_padded_to_the_longest() -> None:
    rows, run = FakeRows([3, 9, 5, 8]), a_run(micro_batch_size=2, sequence_len=64)
    ordered = batches(rows, run, seed=0, epoch=0, shuffle=False)
    assert [batch.ids.shape for batch in ordered] == [(2, 16), (2, 8)]
    padded = batches(rows, a_run(micro_batch_size=2, sequence_len=64, pad_to_sequence_len=True), seed=0, epoch=0)
    assert padded[0].ids.shape == (2, 64)
    kept = batches(rows, a_run(micro_batch_size=1, sequence_len=64, curriculum_sampling=True), seed=0, epoch=0)
    assert [batch.tokens for batch in kept] == [3, 9, 5, 8]


def test_rows_of_like_length_share_a_batch() -> None:
    rows = FakeRows(list(range(1, 129)))
    run = a_run(micro_batch_size=4, sequence_len=256, group_by_length=True)
    whole = batches(rows, run, seed=0, epoch=0)
    spread = [int(np.ptp([len(set(line[line > 0])) and int((line > 0).sum()) for line in batch.ids])) for batch in whole]
    assert max(spread) <= 3
    assert sum(batch.tokens for batch in whole) == 128 * 129 // 2


def a_model(kind: str) -> Any:
    import torch
    import transformers as t

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    window = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    if kind == "llama":
        config = t.LlamaConfig(**sizes)
    elif kind == "qwen3_moe":
        config = t.Qwen3MoeConfig(**sizes, **experts)
    elif kind == "gemma3":
        config = t.Gemma3TextConfig(**sizes, **window, query_pre_attn_scalar=16)
    elif kind == "gemma4":
        more = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "enable_moe_block": True}
        config = t.Gemma4TextConfig(
            **sizes, **window, **more, hidden_size_per_layer_input=0, num_kv_shared_layers=0, global_head_dim=16
        )
    else:
        linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        config = t.Qwen3NextConfig(**sizes, **experts, **linear, layer_types=["linear_attention", "full_attention"])
    config._attn_implementation = "sdpa"
    return t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def summed_loss(model: Any, ids: Any, labels: Any, positions: Any) -> Any:
    import torch.nn.functional as F

    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def difference(kind: str) -> tuple[float, float]:
    """How far loss and gradients of a packed batch are from the sums over its rows alone, relatively."""
    import torch

    model = a_model(kind)
    generator = np.random.default_rng(1)
    rows = [
        (ids, np.where(np.arange(len(ids)) < 2, -100, ids)) for ids in (generator.integers(1, 97, n) for n in (9, 6, 11, 5, 7))
    ]

    def run(lines: list[Any], width: int | None) -> tuple[float, list[Any]]:
        model.zero_grad()
        batch = lay_out(lines, 0, width)
        loss = summed_loss(model, *(torch.from_numpy(a) for a in (batch.ids, batch.labels, batch.position_ids)))
        loss.backward()
        return float(loss.detach()), [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]

    packed_loss, packed = run([rows[:3], rows[3:]], 32)
    alone = [run([[row]], len(row[0])) for row in rows]
    sums = [sum(parts) for parts in zip(*(gradients for _, gradients in alone))]
    norm = lambda tensors: float(torch.stack([x.double().norm() for x in tensors]).norm())
    loss = sum(value for value, _ in alone)
    return abs(packed_loss - loss) / loss, norm([a - b for a, b in zip(packed, sums)]) / norm(sums)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma3", "gemma4"])
def test_a_packed_batch_gives_the_losses_and_gradients_of_its_rows_alone(kind: str) -> None:
    loss, gradients = difference(kind)
    assert loss < 1e-5
    assert gradients < 1e-5


def test_a_model_that_carries_state_along_needs_a_row_for_each_sample() -> None:
    from ropewalk.models.head import output_head

    loss, gradients = difference("qwen3_next")
    assert max(loss, gradients) > 1e-3  # positions alone do not keep its samples apart,
    assert output_head(a_model("qwen3_next")).isolation == "unpacked"  # which the head knows
