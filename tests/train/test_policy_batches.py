"""Policy micro-batches: the same log-probs and gradients however the samples of a step are laid out."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ropewalk.config.run import parse_run
from ropewalk.kernels.branching import Branching, Piece, plain
from ropewalk.models.experts import NAME, register_experts
from ropewalk.models.head import output_head
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.models.recompute import recompute
from ropewalk.models.routing import Routing
from ropewalk.models.tiny import tiny_config
from ropewalk.train.branching import kept
from ropewalk.train.environment import Episode
from ropewalk.train.policy_batches import lay_out, sharing_pays
from ropewalk.train.policy_losses import METHODS, PolicyInput, Totals, policy_loss
from ropewalk.train.pupil import Pupil

PAD = 0
RUN = parse_run(
    "{base_model: base, datasets: [{path: rows.jsonl}], output_dir: run, adapter: lora, learning_rate: 1e-3, rl: grpo, trl: {reward_funcs: [rewards.length]}}"
)
ARCHITECTURES = {
    "llama": {},
    "qwen3_moe": {},
    "gemma3_text": {"sliding_window": 6},  # narrower than the prompts, and than some answers
    "gemma2": {},  # a soft cap in its attention
    "qwen3_next": {},  # carries a state, so that packed samples get rows of their own
}
SHARING = ("llama", "qwen3_moe", "gemma3_text", "deepseek_v2")  # of which the last has values narrower than keys
STEP = [(7, (5, 2, 9)), (1, (3, 3)), (12, (4, 4, 1, 8)), (3, (6,))]  # ids of each prompt, and of each answer to it


def episode(ids, trained, prompt, logprobs=None, routing=None):
    logprobs = [-1.5 if sampled else 0.0 for sampled in trained] if logprobs is None else logprobs
    return Episode(ids, trained, logprobs, [0] * len(ids), prompt, [], 0.0, "done", routing=routing)


def step(sizes=STEP, seed=0):
    """Groups of answers to a prompt; the last answer of each is of two turns, with words between that nobody sampled."""
    draw = np.random.default_rng(seed)
    groups = []
    for prompt, answers in sizes:
        first = draw.integers(64, 256, prompt).tolist()
        group = []
        for number, answer in enumerate(answers):
            said = [3, 4] if number == len(answers) - 1 else []
            ids = [*first, *draw.integers(64, 256, answer).tolist(), *said, *draw.integers(64, 256, len(said)).tolist()]
            trained = [False] * prompt + [True] * answer + [False] * len(said) + [True] * len(said)
            group.append(episode(ids, trained, prompt))
        groups.append(group)
    return groups


def pupil_of(architecture, dtype=torch.float64, **overrides):
    register_experts()
    torch.manual_seed(0)
    config = tiny_config(architecture, **ARCHITECTURES.get(architecture, {}) | overrides)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=NAME).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    head = output_head(model)
    adapter = attach(model, LoraSpec(r=4), seed=0, dtype=dtype)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            if name.endswith("lora_B"):
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=dtype) * 0.1)
    return Pupil(model, adapter, head, RUN)


def learnt(pupil, batches, advantage, temperature=0.7, routing=None):
    """The log-probs of every sample's sampled ids, and the gradients of a step's loss."""
    parameters = [p for _, p in pupil.trainable()]
    totals = Totals(len(advantage), sum(batch.trained for batch in batches))
    found = {}
    for batch in batches:
        mask, sample = torch.from_numpy(batch.labels[0] != -100), torch.from_numpy(batch.sample[0])
        behaviour = torch.from_numpy(batch.behaviour[0]).double()
        with nullcontext() if routing is None else routing.replay(batch.routing):
            logp = pupil.policy_log_probs(batch, temperature)
            given = PolicyInput(logp, mask, sample, advantage[list(batch.samples)], behaviour=behaviour)
            policy_loss(given, METHODS["dapo"], totals).loss.backward()
        for index, number in enumerate(batch.samples):
            found[number] = logp.detach()[mask & (sample == index)]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return found, gradients


def alone(pupil, groups, temperature=0.7):
    """The log-probs of every sample's sampled ids from a row of its own, through whole logits."""
    found = {}
    for number, sample in enumerate(e for group in groups for e in group):
        logits = pupil.model(input_ids=torch.tensor([sample.ids]), use_cache=False).logits[0, :-1]
        logp = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(sample.ids[1:])[:, None])[:, 0]
        found[number] = logp[torch.tensor(sample.trained[1:])]
    return found


def same(ours, theirs, tolerance=1e-9):
    (values, gradients), (their_values, their_gradients) = ours, theirs
    assert values.keys() == their_values.keys()
    assert all(torch.allclose(values[n], their_values[n], atol=tolerance) for n in values)
    assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(gradients, their_gradients))


ADVANTAGE = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0, 0.7, -0.2, 0.4, -2.0, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("architecture", SHARING)
def test_a_shared_prompt_teaches_what_as_many_prompts_teach(architecture):
    pupil, groups = pupil_of(architecture), step()
    assert pupil.shares_prompts
    rows = learnt(pupil, lay_out(groups, tokens=1, shared=False, pad=PAD, multiple=1), ADVANTAGE)
    for tokens, multiple in ((200, 8), (40, 1), (30, 16)):
        shared = lay_out(groups, tokens=tokens, shared=True, pad=PAD, multiple=multiple)
        assert any(batch.shared for batch in shared)
        same(learnt(pupil, shared, ADVANTAGE), rows)


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3_next"])
def test_a_model_for_which_it_is_not_right_says_so_and_learns_from_whole_rows(architecture):
    pupil = pupil_of(architecture)
    assert not pupil.shares_prompts
    assert "every answer is trained on together with a prompt of its own, since" in pupil.notices[-1]


def test_a_window_that_the_configuration_does_not_tell_is_found_out(monkeypatch):
    from ropewalk.train import branching

    real = branching._layout_of
    monkeypatch.setattr(branching, "_layout_of", lambda model: dataclasses.replace(real(model), kinds=("full", "full")))
    assert "a window of 6" in pupil_of("gemma3_text").notices[-1]


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (
            lambda q, k, v, row, scale, window, sinks: plain(q, k, v, Branching((Piece(0, (len(q),)),), len(q)), scale),
            "log-probabilities",
        ),
        (lambda q, k, v, row, scale, window, sinks: plain(q, k.detach(), v, row, scale, window), "gradients"),
    ],
)
def test_attention_that_is_wrong_forwards_or_backwards_is_found_out(wrong, what, monkeypatch):
    monkeypatch.setattr("ropewalk.train.branching.branching", wrong)
    assert f"the {what} of a row with a shared prompt are off" in pupil_of("llama").notices[-1]


def test_shared_prompts_with_layers_computed_again_teach_the_same():
    pupil, groups = pupil_of("qwen3_moe"), step()
    shared = lay_out(groups, tokens=60, shared=True, pad=PAD, multiple=8)
    expected = learnt(pupil, shared, ADVANTAGE)
    recompute(pupil.model, "layer", wrap=kept)
    pupil.model.train()
    before = pupil.model.config._attn_implementation
    again = Pupil(pupil.model, pupil.adapter, pupil.head, RUN)
    same(learnt(again, shared, ADVANTAGE), expected)
    assert pupil.model.config._attn_implementation == before


@pytest.mark.parametrize("shared", [False, True])
def test_the_order_of_groups_and_answers_teaches_nothing(shared):
    pupil, groups = pupil_of("llama"), step()
    values, gradients = learnt(pupil, lay_out(groups, tokens=40, shared=shared, pad=PAD, multiple=8), ADVANTAGE)
    turned = [group[::-1] for group in groups[::-1]]
    order = [*range(9, -1, -1)]
    again, its = learnt(pupil, lay_out(turned, tokens=40, shared=shared, pad=PAD, multiple=8), ADVANTAGE[order])
    same(({order[n]: found for n, found in again.items()}, its), (values, gradients))


@pytest.mark.parametrize("shared", [False, True])
def test_only_what_stands_before_a_sampled_id_gets_a_gradient_and_what_comes_after_the_last_changes_nothing(shared):
    pupil, kept = pupil_of("llama"), []
    hook = pupil.model.model.norm.register_forward_hook(lambda module, args, out: kept.append(out) or out.retain_grad())
    found = []
    for word in (70, 80):
        groups = step()
        for sample in (sample for group in groups for sample in group):
            for part, value in ((sample.ids, word), (sample.trained, False), (sample.logprobs, -3.0)):
                part += [value, value]
        (batch,) = lay_out(groups, tokens=300, shared=shared, pad=PAD, multiple=8)
        kept.clear()
        found.append(learnt(pupil, [batch], ADVANTAGE)[1])
        quiet = torch.from_numpy(np.append(batch.labels[0, 1:] == -100, True))
        assert kept[0].grad[0, quiet].abs().sum() == 0
        assert (kept[0].grad[0, ~quiet].abs().sum(-1) > 0).sum() > 30  # the others' are clipped
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("whole", [False, True])
def test_the_base_of_a_shared_row_is_the_base_of_whole_rows(whole):
    pupil, groups = pupil_of("llama"), step()
    if whole:  # without an adapter the base is held beside the model
        pupil.reference, pupil.adapter = pupil_of("llama").model, None
    (shared,) = lay_out(groups, tokens=300, shared=True, pad=PAD, multiple=8)
    (plain,) = lay_out(groups, tokens=300, shared=False, pad=PAD, multiple=8)
    sums = []
    for batch in (shared, plain):
        base = torch.zeros(10, dtype=torch.float64)
        base.index_add_(0, torch.tensor(batch.samples)[batch.sample[0]], pupil.base_policy_log_probs(batch, 0.7))
        sums.append(base)
    assert torch.allclose(*sums)


def test_sharing_pays_where_prompts_outweigh_what_joining_costs():
    def group(prompt, answer, samples):
        return [episode([3] * (prompt + answer), [False] * prompt + [True] * answer, prompt) for _ in range(samples)]

    # 7 times 15 ids are saved, and 8 times 33 cost 0.3 more each: 105 > 79.2; of a prompt of 8 ids 49, which is less
    assert sharing_pays([group(16, 32, 8)])
    assert not sharing_pays([group(8, 32, 8)])
    assert not sharing_pays([group(100, 1, 1)])
    assert sharing_pays([group(8, 32, 8), group(16, 32, 8)]) is False  # 154 against 158.4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_samples_are_worth_what_they_are_worth_alone(architecture):
    pupil, groups = pupil_of(architecture), step()
    plain = lay_out(groups, tokens=40, shared=False, pad=PAD, multiple=8)
    assert 1 < len(plain) < 10
    mine = learnt(pupil, plain, ADVANTAGE)
    rows = lay_out(groups, tokens=1, shared=False, pad=PAD, multiple=1)
    assert len(rows) == 10
    same(mine, learnt(pupil, rows, ADVANTAGE))
    expected = alone(pupil, groups)
    assert all(torch.allclose(mine[0][n], expected[n].detach(), atol=1e-5) for n in expected)


def test_a_row_holds_ids_labels_positions_and_what_was_noted_when_they_were_sampled():
    group = [episode([7, 8, 9], [False, False, True], 2, [0, 0, -0.5]), episode([7, 8, 5, 6], [False, False, True, True], 2)]
    (plain,) = lay_out([group], tokens=16, shared=False, pad=PAD, multiple=8)
    assert plain.ids.tolist() == [[7, 8, 9, 7, 8, 5, 6, 0]]
    assert plain.labels.tolist() == [[-100, -100, 9, -100, -100, 5, 6, -100]]
    assert plain.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert plain.sample.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    assert plain.behaviour.tolist() == [[0, 0, -0.5, 0, 0, -1.5, -1.5, 0]]
    assert (plain.samples, plain.tokens, plain.trained, plain.shared) == ((0, 1), 7, 3, None)
    (shared,) = lay_out([group], tokens=16, shared=True, pad=PAD, multiple=8)
    assert shared.ids.tolist() == [[7, 8, 9, 8, 5, 6, 0, 0]]
    assert shared.labels.tolist() == [[-100, -100, 9, -100, 5, 6, -100, -100]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 1, 2, 3, 4, 5]]
    assert [(piece.prompt, piece.branches) for piece in shared.shared.pieces] == [(1, (2, 3))]


def test_samples_that_train_nothing_are_left_out_and_the_others_keep_their_numbers():
    failed = episode([], [], 0)
    (batch,) = lay_out([[failed, *step()[0]], [failed]], tokens=64, shared=True, pad=PAD, multiple=8)
    assert batch.samples == (1, 2, 3)
    assert lay_out([[failed]], tokens=64, shared=True, pad=PAD, multiple=8) == []


def test_only_several_answers_to_one_prompt_of_more_than_an_id_share_it_and_never_more_than_a_row_holds():
    other = episode([70, 71, 72], [False, False, True], 2)
    groups = [*step(), [*step()[0][:1], other]]
    rows = lay_out(groups, tokens=30, shared=True, pad=PAD, multiple=8)
    prompts = {n: piece.prompt for row in rows if row.shared for n, piece in zip_pieces(row)}
    assert prompts == {0: 6, 1: 6, 2: 6, 5: 11, 6: 11, 7: 11, 8: 11} | {n: 0 for n in prompts if n in (3, 4, 9, 10, 11)}
    assert [piece.branches for row in rows if row.shared for piece in row.shared.pieces if piece.prompt == 11] == [
        (5, 13),
        (5, 2),
    ]
    assert all(row.tokens <= 30 for row in rows)
    assert sorted(n for row in rows for n in row.samples) == list(range(12))


def zip_pieces(row):
    numbers = iter(row.samples)
    return [(next(numbers), piece) for piece in row.shared.pieces for _ in piece.branches]


def test_the_experts_that_read_an_id_lie_beside_it():
    known = torch.arange(3 * 2, dtype=torch.int16).view(3, 1, 2)
    group = [episode([7, 8, 9], [False, False, True], 2, routing=known[:2]), episode([7, 8, 5], [False, False, True], 2)]
    (batch,) = lay_out([group], tokens=16, shared=False, pad=PAD, multiple=4)
    assert batch.routing.dtype == torch.int16
    assert batch.routing[:, 0].tolist() == [[0, 1], [2, 3]] + [[-1, -1]] * 6


def test_experts_that_were_written_down_are_replayed_in_shared_rows_as_in_plain_ones():
    pupil, groups = pupil_of("qwen3_moe"), []
    routing = Routing(pupil.model)
    for group in step():
        groups.append([])
        for sample in group:
            with torch.no_grad(), routing.record() as seen:
                pupil.model(input_ids=torch.tensor([sample.ids]), use_cache=False)
            groups[-1].append(dataclasses.replace(sample, routing=(seen.selection() + 1) % 8))  # of 8 experts the next one each
    live = learnt(pupil, lay_out(groups, tokens=40, shared=False, pad=PAD, multiple=8), ADVANTAGE)
    plain = learnt(pupil, lay_out(groups, tokens=40, shared=False, pad=PAD, multiple=8), ADVANTAGE, routing=routing)
    same(learnt(pupil, lay_out(groups, tokens=60, shared=True, pad=PAD, multiple=8), ADVANTAGE, routing=routing), plain)
    assert all(not torch.allclose(plain[0][n], live[0][n], atol=1e-3) for n in live[0])


def test_the_temperature_divides_the_logits_before_the_softmax_and_the_entropy_is_that_of_what_was_sampled():
    pupil, groups = pupil_of("gemma2"), step()
    (batch,) = lay_out(groups, tokens=200, shared=False, pad=PAD, multiple=8)
    logp, entropy = pupil.policy_log_probs_with_entropy(batch, 0.7)
    assert torch.equal(logp, pupil.policy_log_probs(batch, 0.7))
    expected = alone(pupil, groups)
    for index, number in enumerate(batch.samples):
        at = torch.from_numpy((batch.labels[0] != -100) & (batch.sample[0] == index))
        assert torch.allclose(logp[at], expected[number], atol=1e-5)
    row = torch.tensor([groups[0][0].ids])
    p = torch.softmax(pupil.model(input_ids=row, use_cache=False).logits[0] / 0.7, -1)
    begin = batch.samples.index(0)
    at = torch.from_numpy((batch.labels[0] != -100) & (batch.sample[0] == begin))
    assert torch.allclose(entropy[at], -(p * p.log()).sum(-1)[6:11], atol=1e-5)
    assert not entropy.requires_grad


def test_the_base_is_the_pupil_without_its_adapter():
    pupil, groups = pupil_of("llama"), step()
    (batch,) = lay_out(groups, tokens=200, shared=False, pad=PAD, multiple=8)
    with pupil.adapter.enabled(False):
        expected = pupil.policy_log_probs(batch, 0.7).detach()
    base = pupil.base_policy_log_probs(batch, 0.7)
    assert torch.equal(base, expected)
    assert not torch.allclose(base, pupil.policy_log_probs(batch, 0.7), atol=1e-3)
