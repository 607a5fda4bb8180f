"""Rows longer than a layer's window: attention by spans in place of a mask over the whole row, for models with windows, wide heads and sinks."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ropewalk.data.dataset import Batch
from ropewalk.kernels.branching import Branching, Piece
from ropewalk.models.experts import NAME, expert_modules
from ropewalk.models.head import output_head
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.train import pupil
from ropewalk.train.branching import BranchingModel
from ropewalk.train.objective import Likelihood
from ropewalk.train.pupil import Pupil

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "vocab_size": 99, "pad_token_id": 0}
MODELS = {
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 512,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(params=sorted(MODELS))
def taught(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[request.param](**SIZES, **TYPES, **MODELS[request.param]))
    model = model.double()
    adapter = attach(model, LoraSpec(r=4), seed=0, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in (*adapter.named_parameters().items(), *model.named_parameters()):
            if "lora" in name or "sinks" in name:
                parameter.normal_(std=0.3)
    model.set_experts_implementation(NAME)
    assert any(True for _ in expert_modules(model))
    branching = BranchingModel(model, output_head(model))
    assert branching.reason == ""
    assert branching.window == 5
    return model, adapter, branching


@pytest.mark.parametrize("lengths", [(40,), (17, 3, 20)])
def test_loss_and_gradients_are_those_of_dense_masks_over_each_sample(taught, lengths):
    """In float64: in float32 the gradients of so even a softmax are lost in its rounding, whoever computes them."""
    model, adapter, branching = taught
    ids = torch.randint(1, 99, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    with branching.row(Branching((Piece(0, lengths),), ids.shape[1])) as attended:
        loss, _ = branching.head.loss(model, ids, labels, positions)
    assert attended == {0, 1}
    alone = [
        branching.head.loss(model, *part)[0]
        for part in zip(ids.split(lengths, 1), labels.split(lengths, 1), positions.split(lengths, 1))
    ]
    found = [[one.detach(), *torch.autograd.grad(one, list(adapter.parameters()))] for one in (loss, torch.stack(alone).sum())]
    for spans, mask in zip(*found):
        assert (spans - mask).abs().max() <= 1e-6 * mask.abs().max()


class Watching:
    """A head that keeps what it is given and computes nothing."""

    isolation, notices = "positions", ()

    def loss(self, model, *row):
        self.row = row
        return torch.zeros(()), 0


@pytest.mark.parametrize(("packing", "window", "pays"), [(True, 0, True), (False, 5, True), (True, 0, False)])
def test_how_a_row_is_made_up_is_read_without_asking_the_device(packing, window, pays, monkeypatch):
    """A meta tensor, like one on a GPU, gives no numbers to the host; unlike it, it says so here."""
    monkeypatch.setattr(pupil, "_spans_pay", lambda device: pays)
    rows = []
    learner = Pupil.__new__(Pupil)
    learner.model, learner.sighted, learner.head = SimpleNamespace(device=torch.device("meta")), None, Watching()
    learner.config = SimpleNamespace(packing=packing)
    learner.branching = SimpleNamespace(window=window, row=lambda branching, model: rows.append(branching) or nullcontext())
    ids = np.arange(1, 17).reshape(2, 8)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    Likelihood(learner, torch.device("meta")).loss(Batch(ids, ids, positions, 16, 16))
    assert [(one.device.type, one.shape) for one in learner.head.row] == [("meta", (1, 16) if pays else (2, 8))] * 3
    assert [one.pieces for one in rows] == [(Piece(0, (3, 5, 6, 2)),)] * pays
    assert all(one.device.type == "meta" for one in rows)
