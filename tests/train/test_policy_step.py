"""What the keys of a run make of completions: advantages, what is learnt from at all, and a loss in which every number has arrived."""

from dataclasses import replace
from statistics import fmean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ropewalk.config.run import load_run
from ropewalk.train.corrections import Correction
from ropewalk.train.distributed import World
from ropewalk.train.policy_losses import METHODS, PolicyInput, policy_loss
from ropewalk.train.policy_step import PolicyStep
from ropewalk.train.report import Report
from ropewalk.train.standing import standings
from train.rewarded import fit

DAPO = METHODS["dapo"]


@pytest.fixture(scope="module")
def written(rewarding):
    """Four groups of four completions of a run that has taken one step, and what makes a step of them under other keys."""
    seen = []
    learns = PolicyStep.learn_from

    def watched(self, groups, found):
        seen.append((self, groups))
        return learns(self, groups, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyStep, "learn_from", watched)
        fit(rewarding(max_steps=1))
    ((policy, groups),) = seen
    draw = torch.Generator().manual_seed(0)

    def stale(episode):
        """As if an older policy had sampled it, so that ratios are not 1."""
        drift = (torch.randn(len(episode.ids), generator=draw) * 0.3).tolist()
        return replace(episode, logprobs=[p + d if t else 0.0 for p, d, t in zip(episode.logprobs, drift, episode.trained)])

    groups = [replace(group, episodes=[stale(one) for one in group.episodes]) for group in groups]
    pupil, template, device = policy.pupil, policy.template, policy.device

    def learnt(trl=None, groups=groups, weights=(1.0,), rl="grpo"):
        run = load_run(rewarding(trl, rl=rl))
        step = PolicyStep(pupil, run, template, device, World())
        step._agreed = True
        found = standings(groups, run, np.array(weights), World())
        advantage = step.learn_from(groups, found)
        loss = sum(float(part.detach()) for part in step.losses())
        return SimpleNamespace(step=step, found=found, advantage=advantage, loss=loss, sampled=samples(step))

    return SimpleNamespace(groups=groups, learnt=learnt, template=template)


def samples(step):
    """The numbers of those that are learnt from."""
    return sorted(number for lesson in step.lessons for number in lesson.batch.samples)


def scored(groups, *rows):
    """The groups with other scores: for each group those of its four completions, numbers or lists of several."""
    scores = [np.array(row, dtype=np.float64).reshape(4, -1) for row in rows]
    errors = [[""] * scores[0].shape[1]] * 4
    return [replace(group, scores=row, errors=errors) for group, row in zip(groups, scores)]


def by_method(step, method):
    """The loss of a step's lessons by a method that was put together here."""
    total = 0.0
    for lesson in step.lessons:
        with torch.no_grad():
            logp = step.pupil.policy_log_probs(lesson.batch, step.trl.temperature)
        given = PolicyInput(logp, lesson.mask, lesson.sample, lesson.advantage, lesson.behaviour, lesson.old, lesson.reference)
        total += float(policy_loss(given, method, step.totals).loss)
    return total


@pytest.mark.parametrize(
    ("trl", "method"),
    [
        ({"epsilon": 0.05, "epsilon_high": 0.1}, replace(DAPO, epsilon=0.05, epsilon_high=0.1)),
        ({"epsilon": 0.05}, replace(DAPO, epsilon=0.05, epsilon_high=0.05)),
        ({"loss_type": "cispo", "epsilon_high": 1.1}, replace(METHODS["cispo"], ratio_max=1.1)),
        ({"delta": 1.01}, replace(DAPO, dual_clip=1.01)),
        ({"importance_sampling_level": "sequence"}, replace(DAPO, ratio_level="sequence")),
        (
            {"correction_weight": "icepop", "correction_bounds": [0.9, 1.1]},
            replace(DAPO, correction=Correction(weight="icepop", low=0.9, high=1.1)),
        ),
        ({"correction_keep": [0.95, 1.05]}, replace(DAPO, correction=Correction(keep=(0.95, 1.05)))),
        ({"off_policy_mask_threshold": 0.05}, replace(DAPO, correction=Correction(opsm=0.05))),
        (
            {"correction": "decoupled", "correction_weight": "tis", "correction_bounds": [0.5, 1.1]},
            replace(DAPO, correction=Correction("decoupled", "tis", high=1.1)),
        ),
        (
            {"correction": "decoupled", "correction_weight": "tis", "correction_level": "sequence"},
            replace(DAPO, correction=Correction("decoupled", "tis", "sequence")),
        ),
        ({"beta": 0.5}, replace(DAPO, beta=0.5)),
        ({"beta": 0.5, "kl_estimator": "k2"}, replace(DAPO, beta=0.5, kl="k2")),
    ],
)
def test_every_number_of_the_loss_arrives_in_it(written, trl, method):
    found = written.learnt(trl)
    assert found.loss == pytest.approx(by_method(found.step, method), abs=1e-6)
    plain = replace(METHODS[trl.get("loss_type", "dapo")], correction=Correction(trl.get("correction", "bypass")))
    if trl.get("kl_estimator"):
        plain = replace(plain, beta=0.5)
    assert abs(found.loss - by_method(found.step, plain)) > 2e-5


@pytest.mark.parametrize("rl", ["grpo", "gdpo"])
@pytest.mark.parametrize("equal", [0.1, 0.2, 0.7])
def test_a_group_of_equal_rewards_is_neither_learnt_from_nor_counted_whatever_rounding_leaves(written, rl, equal):
    groups = scored(written.groups, [equal] * 4, [0, 1, 0, 0], [equal] * 4, [equal, equal, equal, 0])
    found = written.learnt(groups=groups, rl=rl)
    assert found.sampled == [4, 5, 6, 7, 12, 13, 14, 15]
    assert found.advantage[[0, 1, 2, 3, 8, 9, 10, 11]].tolist() == [0.0] * 8
    told = Report(["late"], written.template, World()).step(groups, found.found, found.advantage, 1)
    assert told["varied"] == 0.5


def test_where_the_whole_batch_is_compared_equal_groups_teach_and_a_batch_of_equal_rewards_does_not(written):
    trl = {"loss_type": "reinforce++"}
    found = written.learnt(trl, scored(written.groups, [0.7] * 4, [0.7] * 4, [0.1] * 4, [0.1] * 4))
    assert found.sampled == list(range(16))
    assert found.advantage[:8].tolist() == pytest.approx(
        [15**0.5 / 4] * 8, rel=1e-3
    )  # +-0.3 over a spread of 0.3 * 4 / sqrt(15)
    assert written.learnt(trl, scored(written.groups, *[[0.7] * 4] * 4)).sampled == []


def test_gdpo_standardises_each_reward_by_itself_and_what_long_completions_cost_as_one_more(written):
    first, second = (
        [[0, 1, 1, 0], [2, 2, 2, 2], [0, 0, 0, 1], [1, 2, 3, 4]],
        [[0, 0, 9, 0], [1, 5, 1, 1], [7, 7, 7, 7], [3, 3, 0, 0]],
    )
    groups = scored(written.groups, *([list(pair) for pair in zip(*rows)] for rows in zip(first, second)))
    lengths = [[one.sampled for one in group.episodes] for group in groups]
    costs = [[min(0.0, (4 - n) / 4) for n in row] for row in lengths]  # free up to 4 tokens of 8, then down to -1
    plain, dear = (written.learnt(trl, groups, (1.0, 0.5), "gdpo") for trl in ({}, {"overlong_tokens": 4}))
    for found, columns in ((plain, [(first, 1.0), (second, 0.5)]), (dear, [(first, 1.0), (second, 0.5), (costs, 1.0)])):
        total = [
            sum(weight * (rows[g][s] - fmean(rows[g])) / (stdev(rows[g]) + 1e-4) for rows, weight in columns)
            for g in range(4)
            for s in range(4)
        ]
        expected = [(one - fmean(total)) / (stdev(total) + 1e-4) for one in total]
        assert found.advantage.tolist() == pytest.approx(expected, abs=1e-9)
        assert found.step.lessons
        assert np.isfinite(found.loss)


def test_what_long_completions_cost_is_taken_off_the_reward(written):
    plain, dear = written.learnt(), written.learnt({"overlong_tokens": 4})
    lengths = np.array([one.sampled for group in written.groups for one in group.episodes])
    assert dear.found.total - plain.found.total == pytest.approx(np.minimum(0.0, (4 - lengths) / 4))
    assert dear.found.mean < plain.found.mean


def test_nothing_is_learnt_from_completions_that_were_cut_off(written):
    cut = [2, 7, 8]
    number = iter(range(16))
    groups = [
        replace(group, episodes=[replace(one, ended=next(number) not in cut) for one in group.episodes])
        for group in scored(written.groups, *[[0, 1, 0, 1]] * 4)
    ]
    whole, masked = written.learnt({}, groups), written.learnt({"mask_truncated_completions": True}, groups)
    assert whole.sampled == list(range(16))
    assert masked.sampled == [n for n in range(16) if n not in cut]
    assert masked.advantage.tolist() == whole.advantage.tolist()  # what they were worth still counts for the others
    lost = sum(one.sampled for group in groups for one in group.episodes if not one.ended)
    assert (whole.step.totals.samples - masked.step.totals.samples, whole.step.totals.tokens - masked.step.totals.tokens) == (
        3,
        lost,
    )


def test_the_divergence_from_the_base_is_off_the_reward_of_reinforce_and_in_the_loss_where_rewards_stay_apart(written):
    trl = {"loss_type": "reinforce++", "beta": 0.5}
    together, apart = written.learnt(trl), written.learnt(trl, rl="gdpo")
    assert together.advantage.tolist() != written.learnt({"loss_type": "reinforce++"}).advantage.tolist()
    assert together.loss == pytest.approx(by_method(together.step, METHODS["reinforce++"]), abs=1e-6)
    assert apart.advantage.tolist() == written.learnt({}, rl="gdpo").advantage.tolist()
    assert apart.loss == pytest.approx(by_method(apart.step, replace(METHODS["reinforce++"], beta=0.5)), abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_are_divided_by_what_scale_rewards_says(written, scale):
    rewards = [[0.0, 1, 0, 0], [0, 2, 4, 6], [1, 1, 1, 0], [3, 3, 3, 1]]
    found = written.learnt({"scale_rewards": scale}, scored(written.groups, *rewards))
    every = stdev(reward for row in rewards for reward in row)
    expected = [
        (reward - fmean(row)) / {"group": stdev(row) + 1e-4, "batch": every + 1e-4, "none": 1.0}[scale]
        for row in rewards
        for reward in row
    ]
    assert found.advantage.tolist() == pytest.approx(expected)
