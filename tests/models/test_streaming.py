"""Weights that come from the host layer by layer: the same bits, and nothing that still looks where they lay before."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ropewalk.errors import ModelError
from ropewalk.kernels.quant import FORMATS
from ropewalk.models.experts import NAME, register_experts
from ropewalk.models.head import output_head
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.models.quantized import replace, to_quantise
from ropewalk.models.recompute import decoder_layers, recompute
from ropewalk.models.ring import Ring
from ropewalk.models.streaming import Streamed, Streaming, stream, streamed
from ropewalk.models.tiny import shrink, tiny_config

CPU = torch.device("cpu")
LAYERS = 4


def build(architecture, quantize=None, dtype=torch.float32):
    torch.manual_seed(0)
    register_experts()
    kinds = getattr(tiny_config(architecture), "layer_types", None)
    sizes = {"layer_types": (list(kinds) * LAYERS)[:LAYERS]} if kinds else {}
    config = shrink(CONFIG_MAPPING[architecture], vocab_size=199, num_hidden_layers=LAYERS, **sizes)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if architecture != "llama":
        model.set_experts_implementation(NAME)
    for name in to_quantise(model) if quantize else ():
        path, _, leaf = name.rpartition(".")
        replace(model, name, FORMATS[quantize].of(getattr(model.get_submodule(path), leaf).detach()))
    return model.requires_grad_(False).eval()


def learnt(model, head, ways="keep"):
    """Losses and gradients of two micro-batches that are added up, with an evaluation between them."""
    adapter = attach(model, LoraSpec(r=4), seed=0)
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    recompute(model, ways)
    ids = torch.randint(70, 199, (2, 12))
    found = []
    for _ in range(2):
        loss = head.loss(model.train(), ids, ids)[0]
        loss.backward()
        with torch.no_grad():
            found += [loss.detach(), head.loss(model.eval(), ids, ids)[0]]
    return found + [p.grad for p in adapter.parameters() if p.grad is not None]


def on_host(model, part, slots=2, poisoned=True):
    made = stream(model, Streaming(part, slots), CPU)
    made.ring.poisoned = poisoned
    return made


@pytest.mark.parametrize(
    ("architecture", "quantize", "dtype"),
    [
        ("llama", None, torch.float32),
        ("qwen3_moe", None, torch.float32),
        ("qwen3_moe", "nf4", torch.float32),
        ("gemma4_text", None, torch.float32),
        ("qwen3_5_moe_text", "int8", torch.float32),
        ("gpt_oss", None, torch.float32),
        ("gpt_oss", "nf4", torch.float32),
    ],
)
def test_a_model_whose_weights_come_and_go_learns_the_same_to_the_bit(architecture, quantize, dtype):
    model = build(architecture, quantize, dtype)
    head = output_head(model)
    plain = learnt(model, head)
    assert all(torch.isfinite(found).all() for found in plain)
    mixed = ["layer", "offload", "experts", "keep"]
    for part, slots, ways in (("experts", 3, "keep"), ("layers", 3, "keep"), ("layers", 2, mixed)):
        if part == "experts" and architecture == "llama":
            continue
        model = build(architecture, quantize, dtype)
        ring = on_host(model, part, slots).ring
        assert all(map(torch.equal, plain, learnt(model, head, ways))), (part, slots, ways)
        assert ring.copies >= 2 * (3 * LAYERS - 2)


@pytest.mark.parametrize("part", ["experts", "layers"])
def test_whoever_kept_a_buffer_of_the_ring_past_its_turn_would_read_not_a_number(part, monkeypatch):
    monkeypatch.setattr(Streamed, "_pack", lambda self, number, tensor: tensor.detach())
    model = build("qwen3_moe")
    head = output_head(model)
    on_host(model, part, slots=3)
    assert any(found.isnan().any() for found in learnt(model, head))


def test_layers_that_the_other_pass_left_in_the_ring_are_not_copied_again():
    counts = []
    for slots in (2, 3):
        model = build("qwen3_moe")
        made = on_host(model, "experts", slots, poisoned=False)
        head, adapter = output_head(model), attach(model, LoraSpec(r=2), seed=0)
        assert adapter.experts
        ids = torch.randint(70, 199, (1, 16))
        model.train()
        before = made.ring.copies
        for _ in range(3):
            head.loss(model, ids, ids)[0].backward()
        counts.append(made.ring.copies - before)
    # Of four layers two (three) are there when a pass turns round. The first pass comes after an evaluation, which left layer 0 (and 1).
    assert counts[0] <= 3 * 2 * (LAYERS - 2) + 2
    assert counts[1] <= 3 * 2 * (LAYERS - 3) + 3


def test_what_waits_on_the_host_answers_for_its_shape_and_takes_no_room():
    model = build("qwen3_moe", "nf4")
    sizes = {name: (p.shape, p.dtype) for name, p in (*model.named_parameters(), *model.named_buffers())}
    made = on_host(model, "layers")
    assert sizes == {name: (p.shape, p.dtype) for name, p in (*model.named_parameters(), *model.named_buffers())}
    waiting = {name for names in streamed(model, "layers") for name in names}
    absent = [t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in waiting]
    assert len(absent) == len(waiting) > 20
    assert all(tensor.untyped_storage().nbytes() == tensor.itemsize for tensor in absent)
    assert made.ring.nbytes == 2 * max(len(block) for block in made.ring.host)
    assert made.host_bytes >= sum(tensor.nbytes for tensor in absent)


def test_experts_alone_wait_and_what_is_around_them_stays():
    model = build("qwen3_moe")
    names = [name for names in streamed(model, "experts") for name in names]
    assert len(names) == 2 * LAYERS
    assert all(".experts." in name for name in names)
    kept = [name for names in streamed(model, "layers", besides=["mlp.gate", "q_proj"]) for name in names]
    assert not any("mlp.gate." in name or "q_proj" in name for name in kept)
    assert any("k_proj" in name for name in kept)


def test_the_factors_of_an_adapter_are_trained_where_they_are():
    model = build("qwen3_moe")
    on_host(model, "layers")
    adapter = attach(model, LoraSpec(r=2), seed=0)
    other = attach(build("qwen3_moe"), LoraSpec(r=2), seed=0)
    assert all(map(torch.equal, adapter.parameters(), other.parameters()))
    assert not any(".lora" in name or "ropewalk_lora" in name for names in streamed(model, "layers") for name in names)


def test_a_model_without_experts_is_told_what_to_stream():
    with pytest.raises(ModelError, match="write stream_weights: layers"):
        stream(build("llama"), Streaming("experts"), CPU)
    with pytest.raises(ModelError, match="leave stream_weights out"):
        stream(torch.nn.Linear(2, 2), Streaming("layers"), CPU)


def test_a_second_tree_over_the_same_tensors_shares_the_ring():
    model = build("llama")
    ids = torch.randint(70, 199, (1, 16))
    with torch.no_grad():
        truth = model(input_ids=ids).logits
        on_host(model, "layers")
        twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
        assert torch.equal(model(input_ids=ids).logits, truth)
        assert torch.equal(twin(input_ids=ids).logits, truth)
    assert decoder_layers(twin)[0] is not decoder_layers(model)[0]


def test_the_ring_lets_go_of_what_was_used_longest_ago_and_not_of_what_is_in_use():
    ring = Ring([torch.full((4 + i,), i, dtype=torch.uint8) for i in range(4)], 2, CPU, poisoned=True)
    assert ring.bring(0) == (0, None)
    assert ring.bring(1) == (1, None)
    assert ring.bring(0) == (0, None)  # it is there, and now the last to have been asked for
    assert ring.bring(2) == (1, 1)
    assert ring.bring(3, but=0) == (1, 2)
    assert ring.buffers[0][:4].tolist() == [0] * 4
    assert ring.buffers[1].tolist() == [3] * 7
    assert ring.copies == 4
    ring.give_back(3)
    assert ring.buffers[1].tolist() == [255] * 7
    assert ring.slot(3) is None
    assert ring.slot(0) == 0


class Stream:
    """What the ring asks of a stream of a GPU, written down."""

    def __init__(self, name, told):
        self.name, self.told = name, told

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.told.append(f"{self.name} has copied")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.told.append(f"{self.name} waits for {event}")


def test_on_a_gpu_a_copy_waits_for_what_is_computed_and_a_layer_once_for_its_copy(monkeypatch):
    told = []
    compute = Stream("compute", told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    ring = Ring([torch.full((4,), i, dtype=torch.uint8) for i in range(3)], 2, CPU)
    ring._side = Stream("side", told)
    ring.bring(0)
    ring.bring(1)
    assert told == ["side waits for compute", "side has copied"] * 2
    for _ in range(2):
        ring.wait(0)
    assert told[4:] == ["compute waits for event of side"]
    ring.bring(2, but=1)
    assert told[5:] == ["side waits for compute", "side has copied"]
    assert ring.buffers[0].tolist() == [2] * 4
    ring.wait(2)
    ring.wait(1)
    assert told[7:] == ["compute waits for event of side"] * 2
