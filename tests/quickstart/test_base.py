from __future__ import annotations

import json

import torch
from transformers import AutoTokenizer

from ropewalk.chat.template import Template
from ropewalk.models.load import load_base
from ropewalk.quickstart.invented import Inventor
from ropewalk.quickstart.run import BASE
from ropewalk.quickstart.train_base import SEED, answer_loss, build_model, build_tokenizer, cut, encode, orthogonal


def test_the_shipped_base_is_small_and_says_how_it_came_about() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 12e6
    record = json.loads((BASE / "base.json").read_text(encoding="utf-8"))
    assert record["seed"] == SEED
    assert record["steps"] == record["of"]
    assert "invented" in record["corpus"]
    assert record["loss"] < 0.4


def test_the_shipped_base_still_has_the_loss_it_was_shipped_with() -> None:
    """On passages of another seed: within 0.1 of the recorded loss, where an untrained one would have about ln 768 = 6.6."""
    model, inventor = load_base(BASE, dtype="float32"), Inventor(SEED + 1)
    template, tokenizer = Template.load(BASE), AutoTokenizer.from_pretrained(BASE)
    total = answers = 0.0
    for _ in range(60):
        messages = inventor.conversation(inventor.random.randint(1, 8), inventor.random.randint(1, 6))
        mine, labels = encode(tokenizer, messages)
        assert mine == template.render(messages).ids
        with torch.no_grad():
            trained = sum(label != -100 for label in labels)
            total += trained * float(answer_loss(model, torch.tensor([mine]), torch.tensor([labels])))
            answers += trained
    record = json.loads((BASE / "base.json").read_text(encoding="utf-8"))
    assert abs(total / answers - record["loss"]) < 0.1


def test_the_script_makes_a_model_of_the_shape_that_is_shipped() -> None:
    model, shipped = build_model(AutoTokenizer.from_pretrained(BASE)), load_base(BASE)
    config = shipped.config
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen3_moe", 8, 2)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in shipped.state_dict().items()}


def test_the_first_two_heads_begin_by_looking_back_one_and_two_tokens() -> None:
    torch.manual_seed(0)
    model = build_model(AutoTokenizer.from_pretrained(BASE))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        (attention,) = model.model(torch.randint(3, 700, (1, 40)), output_attentions=True).attentions[0]
    assert attention[0].diagonal(-1).min() > 0.9
    assert attention[1].diagonal(-2).min() > 0.9


def test_a_name_has_the_same_tokens_wherever_it_stands() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    alone = tokenizer.encode("Lodravo")
    for text in ("is Lodravo.", "(Lodravo)", "\nLodravo\n", "<|im_start|>assistant\nLodravo<|im_end|>"):
        ids = tokenizer.encode(text)
        assert any(ids[i : i + len(alone)] == alone for i in range(len(ids)))
        assert tokenizer.decode(ids) == text


def test_labels_are_the_answers_and_their_ends() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Lodravo"}]
    ids, labels = encode(tokenizer, messages)
    assert tokenizer.decode([i for i in labels if i != -100]) == "Lodravo<|im_end|>"
    assert all(label in (-100, i) for i, label in zip(ids, labels))


def test_batches_keep_to_their_budget() -> None:
    rows = [([0] * n, [0] * n) for n in (2, 3, 3, 5)]
    # budget 9: 2, 3, 3 padded to 3 are 9; a row of 5 more would make 20
    assert [len(chunk) for chunk in cut(rows, 9)] == [3, 1]


def test_the_update_is_nearly_orthogonal() -> None:
    """Newton-Schulz with these coefficients brings every singular value to between 0.68 and 1.14."""
    torch.manual_seed(0)
    for shape in ((16, 16), (3, 24, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_the_tokenizer_can_be_built_again() -> None:
    tokenizer = build_tokenizer(Inventor(SEED), texts=50)
    assert tokenizer.decode(tokenizer.encode("Ålesund, 1,204 km²")) == "Ålesund, 1,204 km²"
