"""The layer that scores, over architectures: packed samples get the scores that they get alone, over a quantised base too."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ropewalk.errors import ModelError
from ropewalk.models.load import Scored, load_base, quiet
from ropewalk.models.score_head import score_head, score_name
from ropewalk.models.tiny import tiny_config


def saved(arch, folder):
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(tiny_config(arch).get_text_config(decoder=True)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("arch", "isolation"), [("llama", "positions"), ("gpt_oss", "unpacked")])
def test_packed_samples_have_the_scores_that_they_have_alone(arch, isolation, tokens, quantize, tmp_path):
    model = load_base(
        saved(arch, tmp_path), dtype="float32", device="cpu", quantize=quantize, scored=Scored(tokens, 2 if tokens else 1)
    )
    model.config.pad_token_id = 0
    head = score_head(model)
    assert head.isolation == isolation
    one, two = torch.arange(100, 109)[None], torch.arange(120, 126)[None]
    labels = torch.full((1, 15), -100)
    labels[0, [8, 12, 14]] = 1  # of the second, a token amid it too
    places = torch.cat([torch.arange(9), torch.arange(6)])[None]
    with torch.no_grad():
        found = head.scores(model, torch.cat([one, two], 1), labels, places)
        alone = [model(input_ids=ids).logits for ids in (one, two[:, :4], two)]
    expected = torch.cat([logits[:, -1] if tokens else logits for logits in alone])
    assert found.shape == (3, 2 if tokens else 1)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_layer_is_found_by_any_of_its_names(tmp_path):
    folder = saved("gpt2", tmp_path)
    kinds = {"score": Scored(False, 1), "classifier": Scored(True, 2)}
    assert {name: score_name(load_base(folder, device="cpu", scored=scored)) for name, scored in kinds.items()} == {
        name: name for name in kinds
    }


def test_an_architecture_that_transformers_cannot_score_with_is_told(tmp_path):
    with pytest.raises(ModelError, match="no model of type 'mamba' that scores sequences; name a base of another architecture"):
        load_base(saved("mamba", tmp_path), device="cpu", scored=Scored(False, 1))
