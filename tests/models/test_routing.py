"""The choice of experts, recorded and replayed: every mixture of experts of the installed transformers, by proof."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from ropewalk.engine.engine import Engine
from ropewalk.engine.request import Request, Sampling
from ropewalk.engine.runner import Runner
from ropewalk.errors import ModelError
from ropewalk.models import routers
from ropewalk.models.day0 import build
from ropewalk.models.routing import Routing
from ropewalk.models.tiny import FIRST_FREE_ID, VOCABULARY, expert_architectures, shrink

ARCHITECTURES = dict(expert_architectures())
REFUSED = {  # architecture -> what is told
    "phimoe": "does not get its experts by topk",  # by two maxima, with noise of its own in training
    "diffusion_gemma": "is given 16 of 8 tokens",  # writes a canvas, not from left to right
}


def tiny(name, **fixed):
    """A tiny model without anything constant: zero routers would tie."""
    torch.manual_seed(0)
    kind = ARCHITECTURES[name]
    config = shrink(kind.config_class)
    for key, value in fixed.items():
        setattr(config, key, value)
    model = build(kind) if not fixed else kind._from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids_of(count=10):
    torch.manual_seed(2)
    return torch.randint(FIRST_FREE_ID, VOCABULARY, (1, count))


def passing(model, ids):
    torch.manual_seed(1)  # some models draw noise in their forward
    output = model(input_ids=ids, use_cache=False)
    return output.logits if "logits" in output else output[0]


def recorded(routing, model, ids):
    with routing.record() as seen:
        logits = passing(model, ids)
    return seen.selection(), logits


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in REFUSED])
@torch.no_grad()
def test_what_was_recorded_is_replayed_to_the_bit_and_anything_else_is_not(name):
    model, ids = tiny(name), ids_of()
    routing = Routing(model)
    selection, live = recorded(routing, model, ids)
    assert selection.shape == (10, routing.layers, routing.k)
    with routing.replay(selection):
        assert torch.equal(passing(model, ids), live)
    with routing.replay((selection + 1) % 8):
        again, other = recorded(routing, model, ids)
    assert torch.equal(again, (selection + 1) % 8)
    assert not torch.equal(other, live)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & ARCHITECTURES.keys()))
def test_a_model_that_picks_in_another_way_is_refused_by_name(name):
    with pytest.raises(ModelError, match=f"^{name}: .*{REFUSED[name]}.*; remove trl.replay_routing"):
        Routing(tiny(name))


def test_routers_that_cannot_be_followed_are_refused(monkeypatch):
    monkeypatch.setattr(routers, "PICKS", ())
    with pytest.raises(ModelError, match="gets its experts in a way of its own"):
        Routing(tiny("mixtral"))
    dense = LlamaForCausalLM._from_config(shrink(LlamaForCausalLM.config_class))
    with pytest.raises(ModelError, match="llama has no experts"):
        Routing(dense)


@torch.no_grad()
def test_a_row_of_minus_one_leaves_its_token_to_the_router():
    model, ids = tiny("qwen3_moe"), ids_of()
    routing = Routing(model)
    selection, live = recorded(routing, model, ids)
    some = (selection + 1) % 8
    some[:6] = -1
    with routing.replay(some):
        again, mixed = recorded(routing, model, ids)
    assert torch.equal(again[:6], selection[:6])
    assert torch.equal(again[6:], some[6:])
    torch.testing.assert_close(mixed[:, :6], live[:, :6])
    assert not torch.allclose(mixed[:, 6:], live[:, 6:])
    with pytest.raises(ValueError, match="the experts of 9 tokens, for a pass over 10"), routing.replay(some[:9]):
        passing(model, ids)
    with (
        pytest.raises(ValueError, match=r"a selection of shape \(10, 2, 1\); expected \[tokens, 2, 2\]"),
        routing.replay(some[..., :1]),
    ):
        pass
    assert torch.equal(passing(model, ids), live)  # also after an error


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("deepseek_v2", {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
    ],
)
@torch.no_grad()
def test_experts_of_other_groups_keep_their_own_scores(name, groups):
    """In deepseek_v2 the weights come from scores that are 0 outside of the groups that were picked."""
    model, ids = tiny(name, **groups), ids_of()
    routing = Routing(model)
    selection, live = recorded(routing, model, ids)
    with routing.replay(selection):
        assert torch.equal(passing(model, ids), live)
    weights = []
    for router in routing.routers:
        router.experts.register_forward_pre_hook(lambda module, args: weights.append(args[2]))
    with routing.replay((selection + 4) % 8):
        passing(model, ids)
    assert len(weights) == routing.layers
    assert all(bool((one > 0).all()) for one in weights)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma4", "qwen3_5_moe", "deepseek_v3"])
def test_scores_of_replayed_experts_are_live_and_learn_and_recomputed_layers_replay_the_same(name):
    model, ids = tiny(name), ids_of(12)
    routing = Routing(model)
    with torch.no_grad():
        selection = (recorded(routing, model, ids)[0] + 1) % 8
    weights = [parameter for router in routing.routers for parameter in router.module.parameters()]
    targets = torch.arange(12) * 7 % VOCABULARY

    def gradients():
        with routing.replay(selection):
            loss = torch.nn.functional.cross_entropy(passing(model, ids)[0], targets)
            return torch.autograd.grad(loss, weights)

    plain = gradients()
    assert all(bool(gradient.any()) for gradient in plain)
    # The gradient by differences, along itself: loss(w + h g) - loss(w - h g) = 2 h |g|^2.
    with torch.no_grad(), routing.replay(selection):
        found = []
        for sign in (1, -2):
            for weight, gradient in zip(weights, plain):
                weight += sign * 1e-2 * gradient / norm(plain)
            found.append(float(torch.nn.functional.cross_entropy(passing(model, ids)[0], targets)))
        for weight, gradient in zip(weights, plain):
            weight += 1e-2 * gradient / norm(plain)
    assert (found[0] - found[1]) / 2e-2 == pytest.approx(float(norm(plain)), rel=0.05)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    calls = []
    routing.routers[0].module.register_forward_hook(lambda *_: calls.append(1))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(gradients(), plain))
    assert len(calls) == 2  # it was computed again


def norm(gradients):
    return torch.stack([gradient.norm() for gradient in gradients]).norm()


def test_an_engine_tells_the_experts_of_every_id_that_it_has_read():
    model = tiny("qwen3_moe")
    truth, prompts = Routing(model), {"one": 5, "two": 19}
    runner = Runner(model)
    runner.record_routing()
    engine = Engine(runner, Nothing(), longest=64)
    for name, length in prompts.items():
        asked = tuple(ids_of(length)[0].tolist())
        engine.submit(Request(name, (), asked, 6, sampling=Sampling(temperature=1.0), samples=3, logprobs=True))
        prompts[name] = asked
    written, ended = {}, {}
    while engine.busy:
        for event in engine.step():
            written[event.id, event.sample] = [*written.get((event.id, event.sample), ()), *event.ids]
            if event.finish:
                ended[event.id, event.sample] = event.routing
            else:
                assert event.routing is None
    assert len(ended) == 6
    model.set_attn_implementation("eager")
    for (name, sample), routing in ended.items():
        ids = [*prompts[name], *written[name, sample]]
        selection, _ = recorded(truth, model, torch.tensor([ids[:-1]]))  # the last one was never read
        assert torch.equal(routing.sort(-1).values, selection.sort(-1).values)


class Nothing:
    """No prefix is kept."""

    def key(self, parent, adapter, scope, ids, picture=""):
        return ""

    def find(self, key, keep):
        return None

    def put(self, segment, keep):
        pass
