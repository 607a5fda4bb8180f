from __future__ import annotations

import pytest

from ropewalk.compare.judging import (
    Judgement,
    Lineage,
    Model,
    admission,
    effective_votes,
    flip_rate,
    kinship,
    position_bias,
    preferences,
)


def calls(pairs: list[tuple[float, float]], judge: str = "j") -> list[Judgement]:
    return [Judgement(f"p{i}", judge, first, s) for i, pair in enumerate(pairs) for first, s in zip((True, False), pair)]


def test_a_prompt_is_the_mean_of_both_orders_and_then_of_judges() -> None:
    # judge j: (1 + 0.5)/2 = .75; judge k: 0; mean .375; asked in one order only: left out
    made = [*calls([(1, 0.5)]), *calls([(0, 0)], "k"), Judgement("p9", "j", True, 1)]
    assert preferences(made) == {"p0": 0.375}


def test_flips_are_of_decided_prompts() -> None:
    # of three decided both ways one flips; a tie is no flip
    assert flip_rate(calls([(1, 1), (0, 0), (1, 0), (1, 0.5)])) == pytest.approx(1 / 3)
    assert flip_rate([]) == 0.0


def test_what_being_first_is_worth() -> None:
    always = position_bias(calls([(1, 0)] * 50))
    fair = position_bias(calls([(1, 1), (0, 0)] * 25))
    assert always is not None
    assert fair is not None
    assert always.effect == 1.0
    assert always.low > 0.8
    assert fair.low < 0 < fair.high


def test_a_judge_must_side_with_people_more_than_length_does() -> None:
    labels = {f"p{i}": float(i % 2) for i in range(60)}
    lengths = {f"p{i}": (10, 20) if i % 3 else (20, 10) for i in range(60)}
    good = calls([(float(i % 2),) * 2 for i in range(60)])
    long = calls([(float(i % 3 > 0),) * 2 for i in range(60)])
    first = calls([(1, 0)] * 60)
    assert admission("j", good, labels, lengths).admitted
    assert not admission("j", long, labels, lengths).admitted
    assert "swapping" in admission("j", first, labels, lengths).sentence
    assert not admission("j", calls([(0.5, 0.5)] * 60), {}, {}).admitted


def test_without_fifty_labels_a_judge_is_uncalibrated() -> None:
    found = admission("j", calls([(1, 1), (0, 0)] * 5), {"p0": 1.0}, {"p0": (1, 2)})
    assert (found.admitted, found.calibrated) == (True, False)


def test_kin_may_not_judge() -> None:
    lineage = Lineage(Model("r16", "qwen"), (Model("gpt-x", "gpt"),), (Model("rm-7b", "llama"),))
    assert "reward" in (kinship(Model("rm-7b", "llama"), [lineage]) or "")
    assert "wrote training data" in (kinship(Model("gpt-x", "gpt"), [lineage]) or "")
    assert "family qwen" in (kinship(Model("big", "qwen"), [lineage]) or "")
    assert "itself" in (kinship(Model("r16", "qwen"), [lineage]) or "")
    assert kinship(Model("other", "mistral"), [lineage]) is None


def test_judges_that_agree_on_everything_are_one_vote() -> None:
    same = {f"p{i}": float(i % 2) for i in range(20)}
    apart = {f"p{i}": float(i // 2 % 2) for i in range(20)}
    assert effective_votes({"a": same, "b": same, "c": same}) == pytest.approx(1.0)
    assert effective_votes({"a": same, "b": apart}) == pytest.approx(2.0)  # they correlate 0 on every four prompts
    assert effective_votes({"a": same}) == 1.0
