from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ropewalk.models.head import output_head, unpack
from ropewalk.models.lora import LoraSpec, attach

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}

MODELS = {
    "llama": {},
    "qwen3_moe": MOE,
    "mixtral": MOE,
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 50.0},
    "gemma4_text": {
        "final_logit_softcapping": 3.0,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "granite": {"logits_scaling": 8.0, "tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.0625},
    "phi": {},  # a head with a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"n_layer": 2, "n_head": 4},  # no position ids at all
    "gpt_oss": {**MOE, "layer_types": ["sliding_attention", "full_attention"]},  # its mask does not know position ids
    "falcon_h1": {"lm_head_multiplier": 0.5, **MAMBA},  # a state-space half that cannot see where a sample starts
}
ISOLATION = {"bloom": "unpacked", "gpt_oss": "unpacked", "falcon_h1": "unpacked"}


def build(name: str, **more):
    torch.manual_seed(3)
    config = CONFIG_MAPPING[name](**{**SMALL, **MODELS[name], **more})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if name in ("gemma2", "bloom", "gpt_oss") else "sdpa"
    )
    for name, parameter in model.named_parameters():
        if "bias" in name or parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def packed():
    """Row 0 packs samples of 6, 5 and 4 tokens and a padding token, row 1 holds one of 16."""
    ids = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, [0, 1, 6, 11, 15]] = -100
    labels[1, :4] = -100
    positions = torch.stack([torch.tensor([*range(6), *range(5), *range(4), 0]), torch.arange(16)])
    ids[0, 15] = 0
    return ids, labels, positions


def sum_of_rows_alone(model):
    ids, labels, _ = packed()
    total = torch.zeros(())
    for row, start, stop in ((0, 0, 6), (0, 6, 11), (0, 11, 15), (1, 0, 16)):
        logits = model(input_ids=ids[row : row + 1, start:stop], use_cache=False).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, labels[row, start + 1 : stop], reduction="sum")
    return total


@pytest.mark.parametrize("name", MODELS)
def test_the_packed_loss_and_gradients_are_those_of_every_sample_alone(name):
    model = build(name)
    head = output_head(model)
    assert head.notices == ()
    assert head.isolation == ISOLATION.get(name, "positions")

    loss, count = head.loss(model, *packed())
    assert count == 16 - 5 + 16 - 4
    expected = sum_of_rows_alone(model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)

    wanted = list(model.parameters())
    pairs = zip(torch.autograd.grad(loss, wanted, allow_unused=True), torch.autograd.grad(expected, wanted, allow_unused=True))
    for got, twin in pairs:
        assert (got is None) == (twin is None)
        if got is not None:
            assert (got - twin).norm() <= 1e-4 * twin.norm() + 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_every_token_has_the_log_probability_it_has_in_its_sample_alone(name):
    model = build(name)
    head = output_head(model)
    ids, labels, positions = packed()
    logp = head.log_probs(model, ids, labels, positions)
    assert torch.equal(logp == 0, labels == -100)
    for row, start, stop in ((0, 0, 6), (0, 6, 11), (0, 11, 15), (1, 0, 16)):
        logits = model(input_ids=ids[row : row + 1, start:stop], use_cache=False).logits[0, :-1].float()
        alone = logits.log_softmax(-1).gather(1, ids[row, start + 1 : stop, None])[:, 0]
        kept = labels[row, start + 1 : stop] != -100
        torch.testing.assert_close(logp[row, start + 1 : stop][kept], alone[kept], rtol=1e-4, atol=1e-5)
    wanted = list(model.parameters())
    ours, twin = (torch.autograd.grad(loss, wanted, allow_unused=True) for loss in (-logp.sum(), sum_of_rows_alone(model)))
    for got, expected in zip(ours, twin):
        if got is not None:
            assert (got - expected).norm() <= 1e-4 * expected.norm() + 1e-5


def test_the_probe_leaves_the_model_as_it_was():
    model = build("llama").train()
    output_head(model)
    assert model.training
    assert "forward" not in model.lm_head.__dict__
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 97)


def test_scale_and_cap_are_measured():
    assert output_head(build("granite")).after.scale == 0.125
    assert output_head(build("gemma2")).after.softcap == 5.0
    assert output_head(build("llama")).after.softcap is None


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, checkpointed = build("qwen3_moe").train(), build("qwen3_moe").train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        output_head(model).loss(model, *packed())[0].backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_bf16_needs_no_autocast():
    model = build("gemma4_text").to(torch.bfloat16)
    head = output_head(model)
    assert head.notices == ()
    loss, count = head.loss(model, *packed())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss / count, sum_of_rows_alone(model) / count, rtol=2e-2, atol=0)


class Odd(torch.nn.Linear):
    """A head that does more than multiply."""

    def forward(self, hidden):
        return super().forward(hidden) ** 2


def test_a_head_that_cannot_be_proven_keeps_whole_logits_and_says_so():
    model = build("llama")
    model.lm_head.__class__ = Odd
    head = output_head(model)
    assert head.after is None
    assert "Odd" in head.notices[0]
    torch.testing.assert_close(head.loss(model, *packed())[0], sum_of_rows_alone(model), rtol=1e-5, atol=1e-4)


def test_an_adapter_put_on_the_head_later_is_neither_missed_nor_removed():
    model = build("llama")
    head = output_head(model)
    adapter = attach(model, LoraSpec(r=4, target_modules=("lm_head", "q_proj"), target_linear=False), seed=0)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    for _ in range(2):
        torch.testing.assert_close(head.loss(model, *packed())[0], sum_of_rows_alone(model), rtol=1e-5, atol=1e-4)


def test_logits_changed_across_the_vocabulary_are_noticed():
    model = build("llama")
    plain = model.forward

    def normalised(**kwargs):
        out = plain(**kwargs)
        out.logits = out.logits - out.logits.mean(dim=-1, keepdim=True)
        return out

    model.forward = normalised
    assert output_head(model).after is None


def test_unpacking_gives_each_sample_a_row_and_drops_what_trains_nothing():
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [3, 4, 0, 0, 0, 0]])
    labels = torch.tensor([[-100, 6, -100, 8, 9, -100], [-100, 4, -100, -100, -100, -100]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0]])
    short, long = unpack(ids, labels, positions)
    assert [t.tolist() for t in short] == [[[5, 6], [3, 4]], [[-100, 6], [-100, 4]], [[0, 1], [0, 1]]]
    assert [t.tolist() for t in long] == [[[7, 8, 9]], [[-100, 8, 9]], [[0, 1, 2]]]


def test_unpacking_pads_no_sample_to_twice_its_length():
    lengths = [1, 2, 3, 4, 5, 8, 9, 31, 32, 33, 100, 250]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    ids = torch.arange(positions.numel()).unsqueeze(0)
    parts = list(unpack(ids, ids, positions))
    assert sum(part[0].numel() for part in parts) < 2 * sum(lengths)
    assert sorted(int((row != -100).sum()) for part in parts for row in part[1]) == lengths


def test_unpacking_rows_without_any_label_still_gives_a_forward_pass():
    ids = torch.tensor([[5, 6, 7]])
    (only,) = unpack(ids, torch.full_like(ids, -100), torch.tensor([[0, 1, 0]]))
    assert only[0].tolist() == [[5, 6]]


def test_flash_attention_lays_all_rows_end_to_end():
    head = type(output_head(build("llama")))(after=None, isolation="one row")
    ((ids, labels, positions),) = head._apart(*packed())
    assert ids.shape == (1, 32)
    assert positions[0, 16] == 0
    assert labels[0, 16] == -100


def test_a_load_balancing_loss_is_added_while_training_where_the_config_asks_for_it():
    model = build("mixtral")
    model.config.output_router_logits = True
    head = output_head(model)
    assert head.after is not None
    model.eval()
    plain, count = head.loss(model, *packed())
    model.train()
    loss, _ = head.loss(model, *packed())
    ids, _, positions = packed()
    balance = model(input_ids=ids, position_ids=positions, use_cache=False).aux_loss
    torch.testing.assert_close(loss, plain + count * model.config.router_aux_loss_coef * balance)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "gate" in name and p.grad is not None)
