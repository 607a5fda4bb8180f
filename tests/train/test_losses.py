"""Losses against numbers worked by hand, against plain autograd in float64, and by the identities that bugs in masks break."""

import math
from dataclasses import replace

import pytest
import torch

from ropewalk.errors import ConfigError
from ropewalk.train import policy_losses
from ropewalk.train.advantages import (
    ADVANTAGES,
    batch_whitened,
    group_centred,
    group_standardised,
    leave_one_out,
    less_kl,
    overlong_penalty,
    per_reward,
    varied,
)
from ropewalk.train.corrections import Correction, corrected
from ropewalk.train.policy_losses import (
    METHODS,
    Method,
    PolicyInput,
    Totals,
    kl_estimate,
    policy_loss,
)
from ropewalk.train.preference_losses import (
    Judged,
    Pairs,
    bradley_terry,
    cpo,
    dpo,
    kto,
    likelihood,
    log1mexp,
    mismatched_kl,
    orpo,
    process_rewards,
    simpo,
)
from ropewalk.train.samples import mean_by_sample, sum_by_sample, tokens_by_sample

LENGTHS, PROMPTS = (5, 2, 4, 7), (2, 3, 1, 2)  # answer and prompt tokens of four samples


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def batch(seed=0, stale=0.3, **more):
    """Four samples, prompt then answer, as one packed row of float64."""
    draw = torch.Generator().manual_seed(seed)
    spans = list(zip(PROMPTS, LENGTHS))
    mask = torch.cat([torch.tensor([False] * p + [True] * n) for p, n in spans])
    sample = torch.cat([torch.full((p + n,), i) for i, (p, n) in enumerate(spans)])
    logp = -torch.rand(len(mask), generator=draw, dtype=torch.float64) * 2 - 0.1
    drift = torch.randn(len(mask), generator=draw, dtype=torch.float64) * stale
    reference = logp + torch.randn(len(mask), generator=draw, dtype=torch.float64) * 0.2
    given = PolicyInput(
        logp.requires_grad_(), mask, sample, numbers(1.5, -0.5, -1.2, 0.2), logp.detach() + drift, None, reference.detach()
    )
    return replace(given, **more)


def count(given, longest=1):
    """A batch's part of the totals."""
    return Totals(
        int((tokens_by_sample(given.mask, given.sample, len(given.advantage)) > 0).sum()), int(given.mask.sum()), longest
    )


def value_and_gradient(given, method, totals=None):
    """The loss and its gradient to a fresh copy of the log-probabilities."""
    logp = given.logp.detach().clone().requires_grad_()
    given = replace(given, logp=logp)
    found = policy_loss(given, method, totals or count(given, 8))
    (gradient,) = torch.autograd.grad(found.loss, logp)
    return found.loss.detach(), gradient


def by_the_book(given, name, longest=8):
    """Each method written out sample by sample and token by token, as its paper has it."""
    method = METHODS[name]
    total, tokens = numbers(0.0).sum(), int(given.mask.sum())
    for i, advantage in enumerate(given.advantage):
        mine = given.mask & (given.sample == i)
        logp, mu = given.logp[mine], given.behaviour[mine]
        ratio = (logp - mu).exp()
        if name == "gspo":
            s = (logp - mu).mean().exp()
            per_sample = torch.min(s * advantage, s.clamp(1 - 3e-4, 1 + 4e-4) * advantage)
            total = total - per_sample / len(given.advantage)
            continue
        terms = []
        for r, lp, m in zip(ratio, logp, mu):
            if name == "cispo":
                terms.append(-min(float(r.detach()), 5.0) * advantage * lp)
            elif name == "dppo":
                moved = float((lp.exp() - m.exp()).detach())
                masked = moved > 0.2 if advantage > 0 else moved < -0.2
                terms.append((0.0 if masked else -r * advantage) + 1e-3 * (lp - m) ** 2)
            else:
                clipped = r.clamp(1 - method.epsilon, 1 + method.epsilon_high)
                terms.append(-torch.min(r * advantage, clipped * advantage))
        summed = torch.stack([t if isinstance(t, torch.Tensor) else numbers(t)[0] for t in terms]).sum()
        if name == "grpo":
            total = total + summed / int(mine.sum()) / len(given.advantage)
        elif name == "dr_grpo":
            total = total + summed / (len(given.advantage) * longest)
        else:
            total = total + summed / tokens
    return total


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stale", [0.05, 0.6])
def test_every_method_is_what_its_paper_writes_in_value_and_gradient(name, stale):
    given = batch(seed=3, stale=stale)
    value, gradient = value_and_gradient(given, METHODS[name])
    book = by_the_book(given, name)
    (expected,) = torch.autograd.grad(book, given.logp)
    assert value == pytest.approx(float(book.detach()), abs=1e-12)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_grpo_of_two_tokens_by_hand():
    # ratios 1.5 and 0.5 (log 0.405465, -0.693147), A = 2: min(3, 1.2 * 2) = 2.4 and min(1, 0.8 * 2) = 1; mean 1.7
    logp = numbers(0.0, 0.0).log_softmax(0) + numbers(math.log(1.5), math.log(0.5))
    mu = numbers(0.5, 0.5).log()
    given = PolicyInput(logp, torch.tensor([True, True]), torch.tensor([0, 0]), numbers(2.0), mu)
    found = policy_loss(given, METHODS["grpo"], Totals(1, 2))
    assert float(found.loss) == pytest.approx(-1.7)
    assert float(found.clipped) == 0.5
    assert float(found.ratio) == pytest.approx(1.0)
    # dapo's upper bound is 1.28: min(3, 2.56) and 1, mean 1.78
    assert float(policy_loss(given, METHODS["dapo"], Totals(1, 2)).loss) == pytest.approx(-1.78)


def test_dual_clip_bounds_the_loss_of_a_bad_answer_that_became_likely():
    # A = -1, ratio 10: PPO would lose 10, a dual clip of 3 bounds it by 3 and takes the gradient away
    given = PolicyInput(numbers(math.log(10.0)), torch.tensor([True]), torch.tensor([0]), numbers(-1.0), numbers(0.0))
    plain = value_and_gradient(given, METHODS["dapo"], Totals(1, 1))
    dual = value_and_gradient(given, replace(METHODS["dapo"], dual_clip=3.0), Totals(1, 1))
    assert (float(plain[0]), float(plain[1])) == pytest.approx((10.0, 10.0))
    assert (float(dual[0]), float(dual[1])) == pytest.approx((3.0, 0.0))


@pytest.mark.parametrize(("one", "other"), [("gspo", "grpo"), ("cispo", "dapo")])
def test_at_ratio_one_two_methods_have_one_gradient(one, other):
    given = batch(behaviour=None)
    assert torch.allclose(value_and_gradient(given, METHODS[one])[1], value_and_gradient(given, METHODS[other])[1], atol=1e-14)


CASES = [
    *METHODS.values(),
    Method(beta=0.1, kl="k2", dual_clip=3.0),
    Method(correction=Correction("decoupled", "tis")),
    Method(correction=Correction("decoupled", "tis", "sequence")),
    Method(correction=Correction("decoupled", "icepop", keep=(0.8, 1.25), opsm=0.1)),
    Method(correction=Correction(keep=(0.8, 1.25))),
]


@pytest.mark.parametrize("method", CASES)
def test_tokens_that_are_masked_contribute_exactly_zero_whatever_stands_there(method):
    given = batch()
    value, gradient = value_and_gradient(given, method)
    assert torch.equal(gradient[~given.mask], torch.zeros(int((~given.mask).sum()), dtype=torch.float64))
    for poison in (1e6, float("nan"), float("-inf")):
        fields = {n: getattr(given, n).detach() for n in ("logp", "behaviour", "reference")}
        fields = {n: torch.where(given.mask, values, poison) for n, values in fields.items()}
        spoilt = replace(given, **fields, sample=torch.where(given.mask, given.sample, 99))
        other, gradient_then = value_and_gradient(spoilt, method)
        assert torch.equal(other, value)
        assert torch.equal(gradient_then, gradient)


def part(given, samples):
    """The rows of some samples alone, renumbered."""
    keep = torch.isin(given.sample, torch.tensor(samples))
    renumber = {old: new for new, old in enumerate(samples)}
    numbered = torch.tensor([renumber[int(s)] for s in given.sample[keep]])
    fields = {n: getattr(given, n)[keep] for n in ("logp", "mask", "behaviour", "reference")}
    return keep, replace(given, **fields, sample=numbered, advantage=given.advantage[list(samples)])


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("split", [((0, 1), (2, 3)), ((3,), (1,), (0, 2)), ((2,), (0,), (3,), (1,))])
def test_micro_batches_ranks_and_row_order_change_nothing(method, split):
    given = batch()
    value, gradient = value_and_gradient(given, method)
    parts = [part(given, samples) for samples in split]
    totals = [count(p, 8) for _, p in parts]
    whole = totals[0]
    for more in totals[1:]:
        whole = whole + more
    assert whole == count(given, 8)
    pieces = [value_and_gradient(p, method, whole) for _, p in parts]
    summed = torch.zeros_like(gradient)
    for (keep, _), (_, found) in zip(parts, pieces):
        summed[keep] += found
    assert float(sum(v for v, _ in pieces)) == pytest.approx(float(value), abs=1e-13)
    assert torch.allclose(summed, gradient, atol=1e-13)


@pytest.mark.parametrize("method", CASES)
def test_padding_changes_nothing(method):
    given = batch()
    pad = lambda x, v: torch.cat([x.detach(), torch.full((6,), v, dtype=x.dtype)])
    wider = replace(
        given,
        logp=pad(given.logp, -7.0),
        mask=pad(given.mask, False),
        sample=pad(given.sample, 0),
        behaviour=pad(given.behaviour, -1.0),
        reference=pad(given.reference, -2.0),
    )
    value, gradient = value_and_gradient(given, method)
    other, wide = value_and_gradient(wider, method)
    assert torch.allclose(value, other, atol=1e-14)
    assert torch.allclose(wide, torch.cat([gradient, torch.zeros(6, dtype=torch.float64)]), atol=1e-14)


def test_a_mask_that_is_not_applied_fails_these_identities(monkeypatch):
    # planted: the aggregation forgets the mask (tokens after the end, prompt tokens)
    def forgetful(per_token, mask, sample, samples, how, totals):
        return per_token.sum() / max(1, totals.tokens)

    monkeypatch.setattr(policy_losses, "_aggregate", forgetful)
    monkeypatch.setattr(policy_losses, "_quiet", lambda given: given)
    with pytest.raises(AssertionError):
        test_tokens_that_are_masked_contribute_exactly_zero_whatever_stands_there(METHODS["dapo"])
    with pytest.raises(AssertionError):
        test_padding_changes_nothing(METHODS["dapo"])


def test_a_mask_that_reaches_past_the_end_fails_the_books_gradient():
    # planted: a prompt token of sample 1 is trained too
    given = batch()
    wrong = given.mask.clone()
    wrong[PROMPTS[0] + LENGTHS[0]] = True
    _, right = value_and_gradient(given, METHODS["dapo"])
    _, planted = value_and_gradient(replace(given, mask=wrong), METHODS["dapo"])
    assert not torch.allclose(right, planted)
    assert torch.count_nonzero(planted[~given.mask]) == 1


def test_a_normaliser_per_micro_batch_fails_the_identity():
    # planted: token_mean over the micro-batch instead of the step
    given = batch()
    value, _ = value_and_gradient(given, METHODS["dapo"])
    local = [value_and_gradient(p, METHODS["dapo"])[0] for _, p in (part(given, (0, 1)), part(given, (2, 3)))]
    assert float(sum(local) / 2) != pytest.approx(float(value), abs=1e-6)


def test_the_weight_is_one_where_the_sampler_is_the_policy():
    given = batch(stale=0.0)
    on_policy = value_and_gradient(replace(given, behaviour=None), METHODS["dapo"])
    for method in CASES[-4:]:
        found = value_and_gradient(given, replace(METHODS["dapo"], correction=method.correction))
        assert torch.allclose(found[1], on_policy[1], atol=1e-14)


def weights(how, logp, mu, lengths=(2, 2), advantage=(1.0, -1.0), old=None):
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = torch.ones(len(sample), dtype=torch.bool)
    return corrected(logp.log(), None if old is None else old.log(), mu.log(), mask, sample, numbers(*advantage), how)


def test_corrections_by_hand():
    # pi/mu: 4, 1 | 1/4, 1
    pi, mu = numbers(0.8, 0.5, 0.2, 0.5), numbers(0.2, 0.5, 0.8, 0.5)
    anchor, weight = weights(Correction(), pi, mu)
    assert torch.equal(anchor, mu.log())
    assert weight.tolist() == [1, 1, 1, 1]
    anchor, weight = weights(Correction("decoupled", "tis"), pi, mu)
    assert torch.allclose(anchor, pi.log())
    assert weight.tolist() == pytest.approx([2, 1, 0.25, 1])
    # products of a sample: 4 -> 2, 1/4
    assert weights(Correction("decoupled", "tis", "sequence"), pi, mu)[1].tolist() == pytest.approx([2, 2, 0.25, 0.25])
    # a rejected token has weight 0, not the least one that is kept
    assert weights(Correction("decoupled", "icepop"), pi, mu)[1].tolist() == pytest.approx([0, 1, 0, 1])
    assert weights(Correction("bypass", "icepop"), pi, mu)[1].tolist() == [0, 1, 0, 1]
    # geometric means: 2 and 1/2
    assert weights(Correction(keep=(0.9, 2.1)), pi, mu)[1].tolist() == [1, 1, 0, 0]
    # mean log mu/pi: -0.69 (and A > 0), 0.69 with A < 0
    assert weights(Correction(opsm=0.5), pi, mu)[1].tolist() == [1, 1, 0, 0]
    assert weights(Correction(opsm=0.5), pi, mu, advantage=(1.0, 1.0))[1].tolist() == [1, 1, 1, 1]
    # decoupled: the weight is old/mu, the anchor is old, whatever pi is now
    old = numbers(0.4, 0.5, 0.8, 0.5)
    anchor, weight = weights(Correction("decoupled", "tis", high=3.0), pi, mu, old=old)
    assert torch.equal(anchor, old.log())
    assert weight.tolist() == pytest.approx([2, 1, 1, 1])


def test_truncation_in_bypass_would_count_twice_and_is_refused():
    with pytest.raises(ConfigError, match="count the sampler's difference twice; write mode: decoupled"):
        Correction("bypass", "tis")


def test_weighted_by_old_over_mu_the_gradient_is_the_exact_one_of_a_softmax_policy():
    # every action of a table of four once, weighted by mu's probability: sum mu (pi/mu) A grad log pi = grad of sum pi A
    logits = numbers(0.3, -0.2, 0.9, 0.0).requires_grad_()
    mu, advantage = numbers(0.4, 0.3, 0.2, 0.1), numbers(1.0, -2.0, 0.5, 3.0)
    (exact,) = torch.autograd.grad((logits.softmax(0) * advantage).sum(), logits)
    for method in (Method(clip="none"), Method(clip="none", correction=Correction("decoupled", "tis", high=100.0))):
        logp = logits.log_softmax(0)
        given = PolicyInput(logp, torch.ones(4, dtype=torch.bool), torch.arange(4), advantage * mu, mu.log())
        (found,) = torch.autograd.grad(-policy_loss(given, method, Totals(4, 1)).loss, logits)
        assert torch.allclose(found, exact, atol=1e-12)


def test_advantages_by_hand():
    # groups 7: rewards 1, 0, 0, 1 (mean 1/2, std sqrt(1/3)); 3: 2, 4 (mean 3, std sqrt 2), the samples of both mixed
    rewards, group = numbers(1, 2, 0, 0, 4, 1), torch.tensor([7, 3, 7, 7, 3, 7])
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    assert group_standardised(rewards, group).tolist() == pytest.approx([a, -b, -a, -a, b, a])
    assert group_centred(rewards, group).tolist() == pytest.approx([0.5, -1, -0.5, -0.5, 1, 0.5])
    # of the others: 1 - 1/3, 2 - 4, 0 - 2/3, ...
    assert leave_one_out(rewards, group).tolist() == pytest.approx([2 / 3, -2, -2 / 3, -2 / 3, 2, 2 / 3])
    white = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert torch.allclose(batch_whitened(rewards, group), white)
    centred = numbers(0.5, -1, -0.5, -0.5, 1, 0.5)
    assert torch.allclose(ADVANTAGES["group_mean_batch"](rewards, group), centred / (centred.std() + 1e-4))
    assert varied(numbers(1, 2, 1, 1, 2, 1), group).tolist() == [False] * 6
    assert varied(rewards.where(group == 7, 2.0), group).tolist() == [True, False, True, True, False, True]
    assert less_kl(numbers(1.0), numbers(0.5), 0.1).tolist() == pytest.approx([0.95])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_do_not_depend_on_order_and_are_zero_where_all_rewards_are_equal(name):
    rewards, group = numbers(1, 2, 0, 0, 4, 1), torch.tensor([7, 3, 7, 7, 3, 7])
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    function = ADVANTAGES[name]
    assert torch.allclose(function(rewards, group)[order], function(rewards[order], group[order]))
    assert torch.equal(function(torch.ones_like(rewards), group), torch.zeros_like(rewards))
    assert function(numbers(3.0), torch.tensor([0])).tolist() == [0.0]


def test_rewards_over_the_spread_of_the_batch_by_hand():
    # The batch (1, 0, 3, 1) has mean 1.25 and squares 0.0625 + 1.5625 + 3.0625 + 0.0625 = 4.75; sqrt(4.75 / 3) = 1.25831.
    found = ADVANTAGES["group_mean_batch_std"](numbers(1, 0, 3, 1), torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == pytest.approx([0.5 / 1.25841, -0.5 / 1.25841, 1 / 1.25841, -1 / 1.25841], abs=1e-5)


def test_separately_normalised_rewards_weigh_alike_whatever_their_spread():
    # Rewards (100, 0, 100, 0) and (0, 1, 1, 0) in one group of four. Each has mean-free values of one size, so both standardise to
    # +-0.866: sums (0, 0, 1.732, -1.732); their standard deviation is sqrt(2 * 3 / 3) = sqrt(2), so +-1.2247.
    rewards, group = torch.stack([numbers(100, 0, 100, 0), numbers(0, 1, 1, 0)], dim=1), torch.zeros(4, dtype=torch.long)
    assert per_reward(rewards, numbers(1, 1), group).tolist() == pytest.approx([0, 0, 1.2247, -1.2247], abs=5e-4)
    # Twice the second: (-0.866, 0.866, 2.598, -2.598); squares add up to 15, so the standard deviation is sqrt(5).
    assert per_reward(rewards, numbers(1, 2), group).tolist() == pytest.approx([-0.387, 0.387, 1.162, -1.162], abs=1e-3)
    together = group_standardised(rewards.sum(1), group)
    assert together[0] > 0.8  # added up before, the second is drowned
    assert together[1] < -0.8


def test_a_reward_that_does_not_apply_is_left_out_and_where_none_does_there_is_no_advantage():
    # The first is of samples 0 and 1 alone, +-0.707; the second of 0, 1 and 3: 0, 1, 2 are -1, 0, 1. Sums -0.293, -0.707, 1.
    none = float("nan")
    rewards = torch.stack([numbers(1, 0, none, none), numbers(0, 1, none, 2)], dim=1)
    found = per_reward(rewards, numbers(1, 1), torch.zeros(4, dtype=torch.long))
    total = numbers(math.sqrt(0.5) - 1, -math.sqrt(0.5), 1)
    assert found[[0, 1, 3]].tolist() == pytest.approx((total / total.std()).tolist(), abs=1e-3)
    assert float(found[2]) == 0.0


@pytest.mark.parametrize("equal", [0.1, 0.2, 0.7, -1e6 / 3])
def test_groups_are_told_to_be_equal_by_their_rewards_and_not_by_what_rounding_leaves_of_them(equal):
    rewards, group = numbers(*[equal] * 6, 0, 1), torch.tensor([0] * 6 + [1] * 2)
    assert varied(rewards, group).tolist() == [False] * 6 + [True] * 2
    assert varied(rewards[:6] + 1e-4 * torch.arange(6) / 6, group[:6]).all()
    assert varied(rewards[:0], group[:0]).tolist() == []


def test_a_long_answer_is_punished_little_by_little():
    # longest 10, soft 4: up to 6 free, 8 half way
    assert overlong_penalty(torch.tensor([3, 6, 8, 10, 15]), 10, 4).tolist() == [0, 0, -0.5, -1, -1]


def test_estimates_of_kl_by_hand():
    # pi 1/2, reference 1/4: k1 = ln 2, so that k2 = ln(2)^2 / 2, k3 = 1/2 + ln 2 - 1
    pi, reference = numbers(0.5).log(), numbers(0.25).log()
    two = math.log(2)
    assert [float(kl_estimate(pi, reference, kind)) for kind in ("k2", "k3")] == pytest.approx([two**2 / 2, two - 0.5])


def test_the_kl_term_is_added_with_its_weight():
    given = batch()
    plain, with_kl = (value_and_gradient(given, Method(beta=beta)) for beta in (0.0, 0.3))
    k3 = kl_estimate(given.logp.detach(), given.reference, "k3")[given.mask].sum() / int(given.mask.sum())
    assert float(with_kl[0] - plain[0]) == pytest.approx(0.3 * float(k3))
    assert float(policy_loss(given, Method(), count(given)).kl) == pytest.approx(float(k3))


def pairs(**more):
    # log pi: -2 and -3 over 2 and 3 tokens; reference: -2.5 and -2
    values = {"chosen": -2.0, "rejected": -3.0, "chosen_tokens": 2, "rejected_tokens": 3}
    values |= {"reference_chosen": -2.5, "reference_rejected": -2.0} | more
    return Pairs(**{name: numbers(value) for name, value in values.items()})


def s(x):
    return 1 / (1 + math.exp(-x))


def test_preference_losses_by_hand():
    # h = (-2 + 2.5) - (-3 + 2) = 1.5; beta 0.4: 0.6
    found = dpo(pairs(), 0.4)
    assert float(found.loss) == pytest.approx(-math.log(s(0.6)))
    assert (float(found.chosen_reward), float(found.rejected_reward)) == pytest.approx((0.2, -0.4))
    smooth = -0.9 * math.log(s(0.6)) - 0.1 * math.log(s(-0.6))
    assert float(dpo(pairs(), 0.4, smoothing=0.1).loss) == pytest.approx(smooth)
    robust = (-0.9 * math.log(s(0.6)) + 0.1 * math.log(s(-0.6))) / 0.8
    assert float(dpo(pairs(), 0.4, "robust", 0.1).loss) == pytest.approx(robust)
    assert float(dpo(pairs(), 0.4, "hinge").loss) == pytest.approx(0.4)
    # per token: 0.25 and -1/3; 1 / (2 * 0.4) = 1.25
    assert float(dpo(pairs(), 0.4, "ipo").loss) == pytest.approx((0.25 + 1 / 3 - 1.25) ** 2)
    # means of a token: -1 and -1: no margin
    assert float(simpo(pairs(), 2.0, 0.5).loss) == pytest.approx(-math.log(s(-0.5)))
    assert float(simpo(pairs(rejected=-6.0), 2.0, 0.5, 1.0).loss) == pytest.approx(-math.log(s(1.5)) + 1.0)
    assert float(cpo(pairs(), 0.4).loss) == pytest.approx(-math.log(s(0.4)) + 1.0)
    assert float(likelihood(pairs())) == pytest.approx(1.0)
    odds = (-1 - -2) - (math.log(1 - math.exp(-1)) - math.log(1 - math.exp(-2)))
    assert float(orpo(pairs(rejected=-6.0), 0.1).loss) == pytest.approx(1 - 0.1 * math.log(s(odds)))


def test_an_answer_is_wanted_or_not_by_hand():
    # against the reference 1 and -2, KL 0.5, beta 0.2: s(0.1), s(0.2 * 2.5)
    judged = Judged(numbers(-1, -4), numbers(-2, -2), torch.tensor([True, False]), numbers(0.5)[0])
    found = kto(judged, 0.2, 1.0, 2.0)
    assert found.loss.tolist() == pytest.approx([1 - s(0.1), 2 * (1 - s(0.5))])
    assert found.reward.tolist() == pytest.approx([0.2, -0.4])
    assert float(mismatched_kl(numbers(-1, -1), numbers(-2, -1.5))) == pytest.approx(0.75)
    assert float(mismatched_kl(numbers(-3), numbers(-2))) == 0.0


def test_scores_of_answers_and_steps_by_hand():
    assert bradley_terry(numbers(2.0), numbers(0.5)).tolist() == pytest.approx([-math.log(s(1.5))])
    assert bradley_terry(numbers(2.0), numbers(0.5), numbers(1.0), 0.01).tolist() == pytest.approx(
        [-math.log(s(0.5)) + 0.01 * 2.5**2]
    )
    assert process_rewards(numbers(0.7, 0.7), torch.tensor([1, 0])).tolist() == pytest.approx(
        [-math.log(s(0.7)), -math.log(s(-0.7))]
    )


LOSSES = {
    "dpo": lambda p: dpo(p, 0.1).loss,
    "robust": lambda p: dpo(p, 0.1, "robust", 0.2).loss,
    "hinge": lambda p: dpo(p, 0.1, "hinge").loss,
    "ipo": lambda p: dpo(p, 0.1, "ipo").loss,
    "orpo": lambda p: orpo(p, 0.1).loss,
    "simpo": lambda p: simpo(p, 2.0, 0.5).loss,
    "cpo": lambda p: cpo(p, 0.1).loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_against_the_gradient_raises_the_chosen_answer_over_the_other(name):
    given = pairs()
    chosen, rejected = given.chosen.requires_grad_(), given.rejected.requires_grad_()
    up, down = torch.autograd.grad(LOSSES[name](given).sum(), (chosen, rejected))
    assert float(up) < 0 < float(down)


def test_odds_are_finite_even_where_an_answer_is_certain():
    assert log1mexp(numbers(-1e-8, -1.0, -50.0)).tolist() == pytest.approx(
        [math.log(1e-8), math.log(1 - math.exp(-1)), -math.exp(-50.0)]
    )
    certain = pairs(chosen=0.0).chosen.requires_grad_()
    found = orpo(replace(pairs(), chosen=certain), 0.1).loss
    (gradient,) = torch.autograd.grad(found.sum(), certain)
    assert math.isfinite(float(found.detach()))
    assert math.isfinite(float(gradient))


def test_sums_of_packed_tokens_leave_out_what_is_masked():
    values, mask = numbers(1, 2, 4, float("nan"), 8), torch.tensor([True, True, False, False, True])
    sample = torch.tensor([0, 0, 0, 1, 2])
    assert sum_by_sample(values, mask, sample, 3).tolist() == [3, 0, 8]
    assert mean_by_sample(values, mask, sample, 3).tolist() == [1.5, 0, 8]
