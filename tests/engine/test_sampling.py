"""Ids are drawn as often as they are likely, and whoever is beside a request changes nothing."""

from random import Random

import pytest
import torch

from ropewalk.engine.request import Sampling
from ropewalk.engine.sampling import choose, stream

WAYS = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_k=40, temperature=1.3),
    Sampling(top_p=0.9),
    Sampling(top_p=0.97, temperature=2.0),
    Sampling(min_p=0.1),
    Sampling(top_p=0.5, top_k=30, min_p=0.05),
]


def logits(rows, size, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 2


def expected(row, sampling):
    """The distribution, from its definition."""
    values, ids = (row.double() / sampling.temperature).sort(descending=True)
    values = values[: sampling.top_k or None]
    chances = values.softmax(-1)
    keep = (chances >= sampling.min_p * chances[0]) & (chances.cumsum(-1) - chances < sampling.top_p)
    found = torch.zeros(len(row), dtype=torch.float64)
    found[ids[: len(values)][keep]] = chances[keep]
    return found / found.sum()


@pytest.mark.parametrize("sampling", [way for way in WAYS if way.temperature])
def test_ids_are_drawn_as_often_as_they_are_likely(sampling):
    rows = 20_000
    row = logits(1, 150)
    found = choose(row.expand(rows, -1).contiguous(), [sampling] * rows, [Random(n) for n in range(rows)])[0]
    often = torch.bincount(torch.tensor(found), minlength=150) / rows
    wanted = expected(row[0], sampling)
    assert set(found) <= set(wanted.nonzero()[:, 0].tolist())
    spread = (wanted * (1 - wanted) / rows).sqrt()
    assert bool(((often - wanted).abs() <= 5 * spread + 1e-9).all())


def test_who_else_is_in_the_batch_changes_nothing():
    many = logits(len(WAYS) * 3, 2500)
    samplings = WAYS * 3
    told = [sampling.temperature or 1.0 for sampling in samplings]

    def drawn(rows):
        own = [samplings[row] for row in rows]
        return choose(
            many[rows], own, [stream(samplings[row], f"r{row}", 0) for row in rows], None, [told[row] for row in rows]
        )

    together = drawn(list(range(len(samplings))))
    alone = [drawn([row]) for row in range(len(samplings))]
    assert together == ([ids[0] for ids, _ in alone], [logs[0] for _, logs in alone])


def test_a_nucleus_longer_than_what_is_looked_at_first_is_found():
    flat = torch.zeros(1, 5000) + torch.linspace(0, 1e-3, 5000)
    found = {choose(flat, [Sampling(top_p=0.5)], [Random(n)])[0][0] for n in range(400)}
    assert min(found) >= 2498
    assert max(found) > 4900
    assert len(found) > 300


def test_what_has_no_weight_is_never_drawn():
    row = torch.full((1, 130), -torch.inf)
    row[0, [70, 129]] = 3.0
    assert {choose(row, [Sampling()], [Random(n)])[0][0] for n in range(60)} == {70, 129}


def test_log_probabilities_are_told_at_the_temperature_that_is_asked_for():
    row = logits(2, 100)
    forbidden = row.clone().masked_fill_(row > 0, -torch.inf)
    ids, logs = choose(forbidden, [Sampling(temperature=0.5), Sampling(top_k=2)], [Random(1), Random(2)], row, [0.5, 1.0])
    wanted = (row / torch.tensor([[0.5], [1.0]])).log_softmax(-1)
    assert logs == pytest.approx([float(wanted[n, id]) for n, id in enumerate(ids)], abs=1e-6)
