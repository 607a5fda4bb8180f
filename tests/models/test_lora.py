"""Adapters: what they cover, PEFT's layout on disk, activated and weight-decomposed LoRA, and the way back to the base."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ropewalk.errors import ModelError, OutputError, VerificationFailed
from ropewalk.models import adapter_folder
from ropewalk.models.activated import active_positions
from ropewalk.models.adapter_folder import from_disk, keys, to_disk
from ropewalk.models.lora import LoraSpec, attach, verify_saved
from ropewalk.models.tiny import tiny_config

IDS = torch.randint(64, 256, (2, 9), generator=torch.Generator().manual_seed(3))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def model_of(architecture="qwen3_moe", **overrides):
    torch.manual_seed(0)
    config = tiny_config(architecture, **overrides)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def trained(model, spec, seed=0):
    """An adapter after one backward pass, with factors that do something."""
    adapter = attach(model, spec, seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            if name.endswith(("lora_B", "lora_magnitude_vector")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return adapter


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_adapter_answers_like_one_in_training_also_after_it_was_changed_in_place(dtype):
    model = model_of().to(dtype)
    adapter = trained(model, LoraSpec(r=4, alpha=8))
    for change in (0.0, 0.05):
        for parameter in adapter.parameters():
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter.add_(change)
        wanted = logits(model)
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
        tolerance = 1e-5 if dtype == torch.float32 else 0.03 * float(wanted.abs().max())
        torch.testing.assert_close(logits(model), wanted, atol=tolerance, rtol=0)
        adapter.switch.on = False
        assert (logits(model) - wanted).abs().max() > 2 * tolerance
        adapter.switch.on = True


SPECS = {
    "all": LoraSpec(r=4, alpha=8, dropout=0.1),
    "small experts": LoraSpec(r=8, expert_r=2),
    "small experts, rank-stabilised": LoraSpec(r=8, expert_r=2, rslora=True),
    "patterns": LoraSpec(
        target_linear=False,
        target_modules=("q_proj", "down_proj"),
        rank_pattern={"q_proj": 3, "experts.down_proj": 5},
        alpha_pattern={"experts.gate_up_proj": 7},
    ),
    "one stack": LoraSpec(target_linear=False, target_parameters=("experts.down_proj",)),
    "dora": LoraSpec(dora=True),
    "whole modules": LoraSpec(modules_to_save=("lm_head", "embed_tokens")),
    "one layer": LoraSpec(layers_to_transform=(1,)),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_new_adapter_changes_nothing_and_a_saved_one_is_the_same_in_peft(name, tmp_path):
    model = model_of()
    base = logits(model)
    adapter = attach(model, SPECS[name], 0)
    assert torch.allclose(logits(model), base, atol=1e-5)
    adapter.detach()
    adapter = trained(model, SPECS[name])
    changed = logits(model)
    assert not torch.allclose(changed, base, atol=1e-3)
    adapter.save(tmp_path / "adapter")
    assert verify_saved(adapter, tmp_path / "adapter", IDS) < 1e-5
    assert torch.equal(logits(model), changed)
    with adapter.enabled(False):
        assert torch.allclose(logits(model), base, atol=1e-6)
    adapter.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    "architecture", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "olmoe", "llama", "gemma3"]
)
def test_the_same_holds_for_other_families(architecture, tmp_path):
    """Shared experts, dense layers, biases, transposed stacks, experts without gates, and models that are no mixtures."""
    model = model_of(architecture)
    adapter = trained(model, LoraSpec(r=4))
    adapter.save(tmp_path / "adapter")
    assert verify_saved(adapter, tmp_path / "adapter", IDS) < 1e-4


def test_keys_and_shapes_are_those_that_peft_writes(tmp_path):
    theirs_model = get_peft_model(
        model_of(),
        LoraConfig(r=4, target_modules=list(ATTENTION), target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    )
    theirs_model.save_pretrained(tmp_path / "theirs")
    model = model_of()
    adapter = attach(model, LoraSpec(r=4, target_modules=ATTENTION, target_linear=False), 0)
    adapter.save(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_an_adapter_that_peft_saved_gives_the_same_here(tmp_path):
    theirs_model = get_peft_model(
        model_of(),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=list(ATTENTION),
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            init_lora_weights=False,
        ),
    )
    theirs = logits(theirs_model)
    theirs_model.save_pretrained(tmp_path)
    model = model_of()
    attach(model, LoraSpec(r=4, alpha=8, target_modules=ATTENTION, target_linear=False), 0).load(tmp_path)
    assert torch.allclose(logits(model), theirs, atol=1e-5)


def test_experts_lie_on_disk_slowest_in_a_and_fastest_in_b():
    """A [2 experts, 1, 1] = 10, 20 -> rows 10, 20. B [2, 1 output, 2 ranks] = (1, 2), (3, 4) -> rank by rank, expert by expert: 1 3 2 4."""
    a, b = torch.tensor([[[10.0]], [[20.0]]]), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    assert to_disk("x.lora_A", a).tolist() == [[10.0], [20.0]]
    assert to_disk("x.lora_B", b).tolist() == [[1.0, 3.0, 2.0, 4.0]]
    assert torch.equal(from_disk("x.lora_A", to_disk("x.lora_A", a), a), a)
    assert torch.equal(from_disk("x.lora_B", to_disk("x.lora_B", b), b), b)


def test_the_first_values_depend_on_seed_and_name_alone():
    both = attach(model_of(), LoraSpec(), 5).state_dict()
    alone = attach(model_of(), LoraSpec(target_linear=False, target_modules=("v_proj",), experts=False), 5).state_dict()
    other = attach(model_of(), LoraSpec(), 6).state_dict()
    for name, value in alone.items():
        assert torch.equal(both[name], value)
    a = [n for n in both if n.endswith("lora_A")]
    assert all(not torch.equal(both[n], other[n]) for n in a)
    assert all(not v.any() for n, v in both.items() if n.endswith("lora_B"))
    assert len({both[n].flatten()[0].item() for n in a}) == len(a)


def test_factors_are_float32_over_a_bfloat16_base(tmp_path):
    model = model_of().bfloat16()
    adapter = trained(model, LoraSpec(r=4))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    adapter.save(tmp_path / "a")
    verify_saved(adapter, tmp_path / "a", IDS)


def test_coverage_counts_by_hand():
    """Two layers of 8 experts: gate_up 64 -> 64, down 32 -> 64, rank 4: 2 * 8 * 4 * (64 + 64) = 8192 and 2 * 8 * 4 * (32 + 64) = 6144."""
    rows = {row.family: row for row in attach(model_of(), LoraSpec(r=4), 0).coverage().rows}
    up, down = rows["model.layers.*.mlp.experts.gate_up_proj"], rows["model.layers.*.mlp.experts.down_proj"]
    assert (up.count, up.experts, up.parameters) == (2, 8, 8192)
    assert (down.count, down.inputs, down.outputs, down.parameters) == (2, 32, 64, 6144)


def test_all_linear_leaves_out_head_router_and_layers_whose_weight_is_read_directly():
    names = {n.rpartition(".")[2] for n in attach(model_of("qwen2_moe"), LoraSpec(), 0).linears}
    assert names == {*ATTENTION, "gate_proj", "up_proj", "down_proj"}
    adapter = attach(model_of("jamba"), LoraSpec(), 0)
    assert not [n for n in adapter.linears if n.endswith("dt_proj")]
    assert any("dt_proj" in note for note in adapter.coverage().notes)


def test_names_of_former_expert_layers_mean_their_stacks():
    adapter = attach(model_of("mixtral"), LoraSpec(target_linear=False, target_modules=("q_proj", "w1", "w2", "w3")), 0)
    assert set(next(iter(adapter.experts.values())).scales) == {"gate_up_proj", "down_proj"}
    with pytest.raises(ModelError, match="'w1' matches nothing"):
        attach(model_of("mixtral"), LoraSpec(target_linear=False, target_modules=("w1",), experts=False), 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LoraSpec(target_modules=("q_prj",)), "'q_prj' matches nothing in this model; did you mean 'q_proj'"),
        (LoraSpec(target_modules=("embed_tokens",)), "modules_to_save"),
        (LoraSpec(target_modules="nothing.*"), "matches no linear layer"),
        (LoraSpec(target_parameters=("experts.gate_proj",)), "'experts.gate_proj' matches nothing"),
        (LoraSpec(target_parameters=("gate.weight",)), "not a stack of experts"),
        (LoraSpec(modules_to_save=("head",)), "'head' matches no module"),
        (LoraSpec(target_linear=False, experts=False), "would cover nothing"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_with_the_way_out(spec, message):
    with pytest.raises(ModelError) as error:
        attach(model_of(), spec, 0)
    assert message in str(error.value)


def test_a_regular_expression_means_whole_names():
    adapter = attach(
        model_of(), LoraSpec(target_modules=r".*layers\.1\.self_attn\.(q|v)_proj", target_linear=False, experts=False), 0
    )
    assert [n.split(".", 2)[2] for n in adapter.linears] == ["1.self_attn.q_proj", "1.self_attn.v_proj"]


def test_dropout_acts_in_training_on_linear_layers_only():
    model = model_of()
    trained(model, LoraSpec(dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    adapter = attach(model_of(), LoraSpec(dropout=0.5, target_linear=False), 0)
    assert any("lora_dropout" in note for note in adapter.coverage().notes)


def test_tied_embeddings_come_apart_when_one_is_trained_whole():
    model = model_of(tie_word_embeddings=True)
    model.tie_weights()
    adapter = attach(model, LoraSpec(modules_to_save=("embed_tokens",), target_linear=False, experts=False), 0)
    head = model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight is not head
    assert not head.requires_grad
    adapter.detach()
    assert model.get_input_embeddings().weight is head


def test_checkpoints_of_another_adapter_are_refused():
    adapter = attach(model_of(), LoraSpec(r=4), 0)
    state = {n: v.clone() for n, v in adapter.state_dict().items()}
    adapter.load_state_dict(state)
    with pytest.raises(ModelError, match="another rank"):
        attach(model_of(), LoraSpec(r=8), 0).load_state_dict(state)
    with pytest.raises(ModelError, match="another adapter"):
        attach(model_of(), LoraSpec(r=4, experts=False), 0).load_state_dict(state)


def test_a_changed_file_and_a_dead_factor_are_found(tmp_path):
    model = model_of()
    adapter = trained(model, LoraSpec(r=4))
    adapter.save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = keys(adapter)["model.layers.0.mlp.experts.down_proj.lora_B"]
    save_file({**tensors, key: tensors[key].flip(1).contiguous()}, file)  # the order of experts reversed
    with pytest.raises(VerificationFailed, match="differs from the factor"):
        verify_saved(adapter, tmp_path / "a", IDS)
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, file)
    with pytest.raises(VerificationFailed, match="zero everywhere"):
        verify_saved(adapter, tmp_path / "a", IDS)


def test_a_layout_that_peft_reads_otherwise_is_found(tmp_path, monkeypatch):
    """Both our ways to and from disk agreeing with each other is not enough: expert slowest in B, say."""
    adapter = trained(model_of(), LoraSpec(r=4))
    wrong = lambda t: t.permute(1, 0, 2).reshape(t.shape[1], -1).contiguous()
    right = adapter_folder.to_disk
    monkeypatch.setattr(adapter_folder, "to_disk", lambda n, t: wrong(t) if t.dim() == 3 and n.endswith("B") else right(n, t))
    monkeypatch.setattr(adapter_folder, "_verify_tensors", lambda adapter, folder: None)
    adapter.save(tmp_path / "a")
    with pytest.raises(VerificationFailed, match="other logits through PEFT"):
        verify_saved(adapter, tmp_path / "a", IDS)


def test_keys_that_peft_renames_away_are_told_and_the_adapter_is_still_verified(tmp_path):
    """PEFT 0.21 renames laguna's mlp.shared_experts as if they were an old checkpoint's and then finds nothing to load them into."""
    adapter = trained(model_of("laguna"), LoraSpec(r=4))
    adapter.save(tmp_path / "a")
    assert verify_saved(adapter, tmp_path / "a", IDS) < 1e-4
    assert any("renames some" in note for note in adapter.notes) or not peft.__version__.startswith("0.21.")


def test_an_adapter_appears_whole_or_not_at_all(tmp_path):
    adapter = attach(model_of(), LoraSpec(r=4), 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        adapter.save(tmp_path / "file" / "adapter")
    adapter.save(tmp_path / "adapter")
    adapter.save(tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "file"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_only_the_text_part_of_a_model_that_sees_is_adapted():
    from ropewalk.models.day0 import build
    from ropewalk.models.tiny import expert_architectures

    model = build(dict(expert_architectures())["qwen3_vl_moe"])
    assert all(n.startswith("model.language_model.") for n in attach(model, LoraSpec(), 0).linears)
    model = build(dict(expert_architectures())["qwen3_vl_moe"])
    assert any(".visual." in n for n in attach(model, LoraSpec(text_only=False), 0).linears)


# ---------------------------------------------------------------- activated LoRA


def test_active_positions_by_hand():
    """Two samples in one row: 7 8 | the invocation 1 2 | 9, then 5 1 2 1 2 6, where the last one counts; an invocation cut by an end is none."""
    ids = torch.tensor([[7, 8, 1, 2, 9, 5, 1, 2, 1, 2, 6, 3, 1, 2, 4]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 0, 1]])
    active = active_positions(ids, positions, (1, 2))
    assert active.int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]]


def test_before_its_invocation_the_model_is_its_base_and_after_it_peft_agrees(tmp_path):
    model = model_of()
    ids = IDS.clone()
    ids[0, 4:6] = torch.tensor([65, 66])
    base = logits(model, ids)
    adapter = trained(model, LoraSpec(alora_invocation_tokens=(65, 66)))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    found = logits(model, ids)
    assert torch.allclose(found[0, :4], base[0, :4], atol=1e-6)
    assert torch.allclose(found[1], base[1], atol=1e-6)
    assert not torch.allclose(found[0, 4:], base[0, 4:], atol=1e-3)
    adapter.save(tmp_path / "a")
    adapter.detach()
    reloaded = PeftModel.from_pretrained(model, tmp_path / "a")
    with torch.no_grad():
        assert torch.allclose(reloaded(input_ids=ids).logits, found, atol=1e-5)


def test_packed_samples_are_activated_each_for_itself():
    model = model_of(attn_implementation="sdpa")
    trained(model, LoraSpec(alora_invocation_tokens=(65,)))
    first, second = torch.tensor([[100, 65, 101]]), torch.tensor([[102, 103, 65, 104]])
    packed, positions = torch.cat([first, second], 1), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad():
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits
    assert torch.allclose(together[:, :3], logits(model, first), atol=1e-5)
    assert torch.allclose(together[:, 3:], logits(model, second), atol=1e-5)


def test_generation_goes_on_being_activated_over_the_cache():
    """The prompt with its invocation at once, then one token at a time: the logits of the whole."""
    model = model_of()
    trained(model, LoraSpec(alora_invocation_tokens=(65, 66)))
    ids = torch.tensor([[100, 101, 65, 66, 102, 103]])
    whole, cache, steps = logits(model, ids), None, []
    for piece in (ids[:, :4], ids[:, 4:5], ids[:, 5:6]):
        with torch.no_grad():
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


def test_an_invocation_that_arrives_in_pieces_is_still_seen():
    """65 came with the prompt, 66 completes the invocation, and from there on the adapter acts."""
    model = model_of()
    adapter = trained(model, LoraSpec(alora_invocation_tokens=(65, 66)))
    seen = []
    cache = None
    for piece in ([[100, 65]], [[66]], [[102]]):
        with torch.no_grad():
            cache = model(input_ids=torch.tensor(piece), past_key_values=cache, use_cache=True).past_key_values
        seen += adapter.switch.active[0].tolist()
    assert seen == [False, False, True, True]
