"""Reward models from a configuration to a reward: the losses are those of a plain implementation, and transformers reads the result."""

import asyncio
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ropewalk.chat.template import Template
from ropewalk.config.run import load_run
from ropewalk.data.dataset import open_data
from ropewalk.data.packing import batches
from ropewalk.train.plan import check
from ropewalk.train.progress import read_events
from ropewalk.train.reward_builtins import read_spec
from ropewalk.train.reward_functions import Sample
from ropewalk.train.reward_process_model import process_reward_model
from ropewalk.train.reward_worker import loaded, scored
from ropewalk.train.trainer import train

WORDS = ("dog", "cat", "sun", "sea", "map", "ink", "oak", "egg")


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Answers in lower case are preferred to those that shout."""
    rows = [{"input": f"say {a}", "chosen": f"{a} {b}", "rejected": f"{a} {b}".upper()} for a in WORDS for b in WORDS[:6]]
    return written(tmp_path_factory.mktemp("ranked") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def steps(tmp_path_factory):
    """Steps that shout are wrong."""
    rows = []
    for number in range(48):
        said = [WORDS[(number + k) % 8] for k in range(1 + number % 3)]
        right = [(number >> k) % 2 == 0 for k in range(len(said))]
        texts = [word if ok else word.upper() for word, ok in zip(said, right)]
        rows.append({"prompt": f"task {number}\n", "completions": texts, "labels": right})
    return written(tmp_path_factory.mktemp("steps") / "steps.jsonl", rows)


@pytest.fixture
def scoring(config, pairs, steps):
    """Writes a configuration of a kind: reward_model or process_reward_model."""

    def write(kind, **keys):
        source = {"path": str(pairs), "type": "bradley_terry.chat_template"}
        if kind == "process_reward_model":
            source = {"path": str(steps), "type": "stepwise_supervised", "step_separator": "\n"}
        return config(**{kind: True, "datasets": [source], **keys})

    return write


def run(path):
    return train(load_run(path), quiet=True)


def events(folder, event="step"):
    return [e for e in read_events(folder / "events.jsonl") if e["event"] == event]


def classifier(base, folder, tokens=False):
    """The result as anybody would read it: transformers' class, with PEFT's adapter where there is one."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    made = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    if (folder / "model").exists():
        return made.from_pretrained(folder / "model").eval()
    torch.manual_seed(5)  # the head that the adapter brings along replaces whatever is drawn here
    model = made.from_pretrained(base, num_labels=2 if tokens else 1)
    return PeftModel.from_pretrained(model, str(folder / "adapter")).eval()


def rendered(template, row, name):
    said = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row[name]}]
    return torch.tensor([template.render(said).ids])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("adapter", ["lora", None])
def test_a_reward_model_learns_what_is_preferred_and_transformers_reads_its_scores(
    scoring, base, pairs, tmp_path, packed, adapter
):
    lines = [json.loads(line) for line in pairs.read_text().splitlines()[:6]]
    tested = written(tmp_path / "tested.jsonl", [row | {"margin": 0.5 * (n % 2)} for n, row in enumerate(lines)])
    source = {"path": str(tested), "type": "bradley_terry.chat_template"}
    keys = {"adapter": adapter, "lora_r": 4 if adapter else None, "learning_rate": 3e-3 if adapter else 1e-3}
    keys |= {"max_steps": 20, "eval_steps": 20, "micro_batch_size": 2 if packed else 4, "sequence_len": 64}
    run(scoring("reward_model", test_datasets=[source], center_rewards_coefficient=0.1, sample_packing=packed, **keys))
    told, held = events(tmp_path / "run"), events(tmp_path / "run", "eval")[-1]
    assert told[-1]["loss"] < told[0]["loss"]
    assert held["rewards/accuracies"] == 1.0
    assert held["rewards/margins"] > 0.5
    model, template = classifier(base, tmp_path / "run"), Template.load(base)
    loss = margin = 0.0
    with torch.no_grad():
        for number, row in enumerate(lines):
            chosen, rejected = (float(model(rendered(template, row, name)).logits) for name in ("chosen", "rejected"))
            loss += math.log1p(math.exp(-(chosen - rejected - 0.5 * (number % 2)))) + 0.1 * (chosen + rejected) ** 2
            margin += chosen - rejected
    assert held["loss"] == pytest.approx(loss / 6, rel=1e-4)
    assert held["rewards/margins"] == pytest.approx(margin / 6, rel=1e-4)


def test_a_trained_reward_model_is_a_reward_of_reinforcement(scoring, base, tmp_path):
    run(scoring("reward_model", max_steps=10, micro_batch_size=4))
    assert "base_model.model.score.weight" in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    asked = [{"role": "user", "content": "say dog"}]
    samples = [Sample(text, asked) for text in ("dog cat", "DOG CAT", "sea sun egg")]
    spec = read_spec({"kind": "model", "path": str(tmp_path / "run" / "adapter"), "device": "cpu"})
    with asyncio.Runner() as runner:  # what a worker's process does, without another start of torch
        one, two, three = scored(spec, loaded(spec), samples, runner)
    assert [one.error, two.error, three.error] == ["", "", ""]
    assert one.value > two.value + 0.5
    assert three.value > two.value
    row = {"input": "say dog", "chosen": "dog cat"}
    with torch.no_grad():
        plain = classifier(base, tmp_path / "run")(rendered(Template.load(base), row, "chosen")).logits
    assert one.value == pytest.approx(float(plain), abs=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_a_process_reward_model_judges_every_step_and_is_a_reward(scoring, base, steps, tmp_path, packed):
    lines = [json.loads(line) for line in steps.read_text().splitlines()[:8]]
    source = {"path": str(written(tmp_path / "tested.jsonl", lines)), "type": "stepwise_supervised"}
    keys = {
        "max_steps": 30,
        "eval_steps": 30,
        "sample_packing": packed,
        "micro_batch_size": 2 if packed else 8,
        "learning_rate": 5e-3,
    }
    run(scoring("process_reward_model", test_datasets=[source], **keys))
    held = events(tmp_path / "run", "eval")[-1]
    assert held["rewards/accuracies"] >= 0.9
    assert held["rewards/right"] > held["rewards/wrong"] + 0.3
    model, template = classifier(base, tmp_path / "run", tokens=True), Template.load(base)
    losses, sure = [], []
    with torch.no_grad():
        for row in lines:
            ids = template.encode(row["prompt"])
            for text, right in zip(row["completions"], row["labels"]):
                ids = ids + template.encode(text) + template.encode("\n")
                logits = model(torch.tensor([ids])).logits[0, -1].double()
                losses.append(-float(logits.log_softmax(-1)[int(right)]))
                sure.append(float(logits.softmax(-1)[1]))
    assert held["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    given = {"kind": "process_model", "path": str(tmp_path / "run" / "adapter"), "device": "cpu"}
    row, own = lines[2], sure[sum(len(line["labels"]) for line in lines[:2]) :][:3]
    assert len(own) == 3
    expected = {"min": min(own), "mean": sum(own) / 3, "last": own[-1], "product": math.prod(own)}
    for over, value in expected.items() if packed else {}.items():
        function = process_reward_model(read_spec({**given, "over": over}).params)
        assert function(["", "\n".join(row["completions"])], [row["prompt"]] * 2) == [0.0, pytest.approx(value, abs=1e-4)]


def test_how_a_step_is_cut_changes_nothing(scoring, tmp_path):
    for kind in ("reward_model", "process_reward_model"):
        found = []
        for name, shape in {"whole": (8, 1), "cut": (2, 4)}.items():
            keys = {"micro_batch_size": shape[0], "gradient_accumulation_steps": shape[1], "output_dir": str(tmp_path / name)}
            run(scoring(kind, max_steps=2, sample_packing=False, process_reward_model=kind != "reward_model", **keys))
            found.append([e["loss"] for e in events(tmp_path / name)])
            (tmp_path / name).rename(tmp_path / f"{name}-{kind}")
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_run_goes_on_from_its_checkpoint_with_the_same_numbers(scoring, tmp_path):
    path = scoring("reward_model", max_steps=4, save_steps=2, save_total_limit=9)
    run(path)
    whole = [e["loss"] for e in events(tmp_path / "run")]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "run" / "adapter")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"state": "training"}))
    run(path)
    assert [e["loss"] for e in events(tmp_path / "run")] == whole


def test_check_shows_where_a_score_is_read_and_counts_the_new_layer(scoring):
    plan = check(load_run(scoring("reward_model")))
    shown = plan.text().split("Preview")[1]
    assert "pair 1, chosen" in shown
    assert "dog dog<|im_end|>⟦\n" in "\n".join(line.strip() for line in shown.splitlines())
    assert any(row["family"] == "score" and row["parameters"] == 32 for row in plan.coverage)
    text = check(load_run(scoring("process_reward_model", reward_model=None))).text()
    assert "row 3, steps right, wrong, right" in text


def test_only_the_last_step_may_be_scored_and_a_long_answer_is_cut(scoring, steps):
    source = {"path": str(steps), "type": "stepwise_supervised", "train_on_last_step_only": True}
    text = check(load_run(scoring("process_reward_model", datasets=[source]))).text()
    assert "row 3, steps right\n" in text
    source = {"path": str(steps), "type": "stepwise_supervised", "max_completion_length": 9}
    text = check(load_run(scoring("process_reward_model", datasets=[source]))).text()
    assert "row 3, steps right, wrong\n" in text


def test_packed_lines_hold_their_rows_margins_and_verdicts_in_order(config, tmp_path):
    rows = [{"input": f"q{n}", "chosen": "a" * (n + 1), "rejected": "b", "margin": n / 4} for n in range(7)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "x.jsonl"), "type": "bradley_terry.chat_template"}
    run = load_run(config(reward_model=True, datasets=[source], sequence_len=96, curriculum_sampling=True))
    template = Template.load(run.base_model)
    found = list(batches(open_data(run, template, quiet=True).train, run, seed=1, epoch=0))
    margins = np.concatenate([batch.compared.margins for batch in found])
    assert margins.tolist() == [row["margin"] for row in rows]
    for batch in found:
        assert (batch.labels != -100).sum() == 2 * batch.compared.units
        assert batch.ids.shape[1] == 2 * 96
        assert batch.ids.max() < 259  # no margin among the ids

    rows = [{"prompt": f"q{n}", "completions": ["a"] * (n + 1), "labels": [k == n for k in range(n + 1)]} for n in range(7)]
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "y.jsonl"), "type": "stepwise_supervised"}
    run = load_run(config(process_reward_model=True, datasets=[source], sequence_len=16, curriculum_sampling=True))
    found = list(batches(open_data(run, template, quiet=True).train, run, seed=1, epoch=0))
    verdicts = np.concatenate([batch.compared.wanted for batch in found])
    assert verdicts.tolist() == [label for row in rows for label in row["labels"]]
    for batch in found:
        ends = batch.ids[batch.labels != -100]
        assert [template.decode([token]) for token in ends] == ["\n"] * batch.compared.units
