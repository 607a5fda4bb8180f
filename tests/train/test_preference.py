"""Training by preferences from a configuration to an adapter: its losses are those of a plain implementation, and it learns."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ropewalk.chat.template import Template
from ropewalk.config.run import load_run
from ropewalk.models.load import load_base
from ropewalk.train.plan import check
from ropewalk.train.progress import read_events
from ropewalk.train.trainer import train

METHODS = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """32 questions whose preferred answer is short."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{a} plus {b}?", "chosen": str(a + b), "rejected": f"it is {a + b + 1}"} for a in range(8) for b in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def judged(tmp_path_factory, pairs):
    """The same answers one by one, wanted or not."""
    path = tmp_path_factory.mktemp("judged") / "judged.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def preferring(config, pairs, judged):
    """Writes a configuration of a method."""

    def write(method, **keys):
        source = {"path": str(judged if method == "kto" else pairs), "type": "chat_template"}
        return config(rl=method, datasets=[source], **keys)

    return write


def steps(folder, event="step"):
    return [e for e in read_events(folder / "events.jsonl") if e["event"] == event]


def run(path):
    return train(load_run(path), quiet=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_raises_the_margin_of_pairs_it_has_not_seen(preferring, tmp_path, method):
    keys = {"kto": {"rl_beta": 0.5}, "dpo": {"rl_beta": 0.5}, "orpo": {"orpo_alpha": 1.0}}.get(method, {})
    keys |= {"val_set_size": 8, "micro_batch_size": 4}
    run(preferring(method, max_steps=1, learning_rate=1e-9, output_dir=str(tmp_path / "before"), **keys))
    before = steps(tmp_path / "before", "eval")[-1]
    run(preferring(method, max_steps=30, eval_steps=15, **keys))
    trained, held = steps(tmp_path / "run"), steps(tmp_path / "run", "eval")
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert trained[-1]["rewards/margins"] > trained[0]["rewards/margins"] + 0.05
    assert held[-1]["rewards/margins"] > max(0.05, before["rewards/margins"] + 0.05)
    assert held[-1]["rewards/accuracies"] >= 0.85
    assert (tmp_path / "run" / "plots" / "rewards.svg").exists()
    assert (tmp_path / "run" / "plots" / "accuracy.svg").exists()


def sequence_log_probs(model, template, prompt, answer):
    """The plain way: one answer at a time, whole logits, without packing; the sum and the number of its tokens."""
    user = {"role": "user", "content": prompt}
    begin = template.render([user], add_generation_prompt=True).ids
    whole = template.render([user, {"role": "assistant", "content": answer}]).ids
    end = max(i for i, token in enumerate(whole) if token == template.eos_id) + 1
    ids = torch.tensor([whole[:end]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    found = logp.gather(1, ids[0, 1:, None])[len(begin) - 1 :, 0]
    return found.sum(), len(found)


def plain_loss(method, policy, base):
    """Each method over (log p, tokens) of chosen and rejected, as its paper has it."""
    (pc, nc), (pr, nr) = policy
    (bc, _), (br, _) = base
    mean_c, mean_r, logs = pc / nc, pr / nr, torch.nn.functional.logsigmoid
    match method:
        case "dpo":
            return -logs(0.1 * ((pc - bc) - (pr - br)))
        case "ipo":
            return ((pc - bc) / nc - (pr - br) / nr - 1 / 0.2) ** 2
        case "orpo":
            odds = torch.log(mean_c.exp() / (1 - mean_c.exp())) - torch.log(mean_r.exp() / (1 - mean_r.exp()))
            return -mean_c - 0.1 * logs(odds)
        case "simpo":
            return -logs(2.0 * (mean_c - mean_r) - 0.5)
        case "cpo":
            return -logs(0.1 * (pc - pr)) - mean_c


def plain_kto(rows, policy, base, twins):
    """KTO over judged answers; `twins` are log pi/ref of each prompt with the next row's answer."""
    kl = max(0.0, float(sum(twins)) / len(twins))
    losses = []
    for row, (p, _), (b, _) in zip(rows, policy, base):
        sign = 1 if row["label"] else -1
        losses.append(1 - torch.sigmoid(0.1 * sign * ((p - b) - kl)))
    return float(sum(losses)) / len(losses)


def both_models(base, folder):
    """The untouched base and the base with the saved adapter, loaded by PEFT."""
    from peft import PeftModel

    whole = load_base(base, dtype="float32", device="cpu", experts_implementation=None)
    again = load_base(base, dtype="float32", device="cpu", experts_implementation=None)
    return whole, PeftModel.from_pretrained(again, str(folder / "adapter")).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_that_of_a_plain_implementation_with_two_models(preferring, base, pairs, judged, tmp_path, method, packed):
    lines = (judged if method == "kto" else pairs).read_text().splitlines()[:8]
    tested = tmp_path / "tested.jsonl"
    tested.write_text("\n".join(lines) + "\n")
    source = {"path": str(tested), "type": "chat_template"}
    run(preferring(method, max_steps=6, eval_steps=6, test_datasets=[source], sequence_len=128, sample_packing=packed))
    whole, tuned = both_models(base, tmp_path / "run")
    template = Template.load(base)
    rows = [json.loads(line) for line in lines]
    held = steps(tmp_path / "run", "eval")[-1]
    if method == "kto":
        of = lambda model, answers: [
            sequence_log_probs(model, template, row["prompt"], text) for row, text in zip(rows, answers)
        ]
        own, turned = [row["completion"] for row in rows], [row["completion"] for row in rows[1:] + rows[:1]]
        twins = [p - b for (p, _), (b, _) in zip(of(tuned, turned), of(whole, turned))]
        assert held["loss"] == pytest.approx(plain_kto(rows, of(tuned, own), of(whole, own), twins), abs=1e-5)
        return
    total = margin = 0.0
    for row in rows:
        policy, reference = (
            [sequence_log_probs(model, template, row["prompt"], row[n]) for n in ("chosen", "rejected")]
            for model in (tuned, whole)
        )
        total += float(plain_loss(method, policy, reference))
        margin += 0.1 * float((policy[0][0] - reference[0][0]) - (policy[1][0] - reference[1][0]))
    assert held["loss"] == pytest.approx(total / len(rows), rel=1e-5, abs=1e-5)
    if method in ("dpo", "ipo"):
        assert held["rewards/margins"] == pytest.approx(margin / len(rows), abs=1e-5)


def test_at_the_start_policy_and_base_are_one(preferring, tmp_path):
    # ln 2 and no margin: the adapter changes nothing yet, on linear layers and experts alike
    run(preferring("dpo", max_steps=1, lora_dropout=0.0))
    first = steps(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_how_a_step_is_cut_and_packed_changes_neither_losses_nor_gradients(config, pairs, judged, tmp_path, method):
    lines = judged.read_text().splitlines()[:16] if method == "kto" else pairs.read_text().splitlines()[:8]
    few, rows = tmp_path / "few.jsonl", len(lines)
    few.write_text("\n".join(lines) + "\n")
    shapes = {
        "whole": {"micro_batch_size": rows, "sample_packing": False},
        "cut": {"micro_batch_size": 2, "gradient_accumulation_steps": rows // 2, "sample_packing": False},
        "packed": {"micro_batch_size": rows // 2, "sample_packing": True},  # more rows than are filled
    }
    # Every step takes all rows, and moves every weight by about its gradient: by g / (|g| + 1).
    keys = {"max_steps": 2, "sequence_len": 256, "learning_rate": 1.0, "adam_epsilon": 1.0, "max_grad_norm": 0.0}
    found, moved = {}, {}
    for name, shape in shapes.items():
        source = {"path": str(few), "type": "chat_template"}
        run(config(rl=method, datasets=[source], output_dir=str(tmp_path / name), **keys, **shape))
        found[name] = [e[n] for e in steps(tmp_path / name) for n in ("loss", "rewards/margins", "gradient_norm")]
        moved[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    assert found["whole"][2] > 0
    for name in ("cut", "packed"):
        assert found[name] == pytest.approx(found["whole"], rel=1e-3, abs=1e-5), name
        for key, tensor in moved["whole"].items():
            torch.testing.assert_close(moved[name][key], tensor, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_two_processes_give_the_numbers_of_one(preferring, tmp_path, method):
    keys = {"max_steps": 3, "sample_packing": False, "micro_batch_size": 4, "val_set_size": 8, "eval_steps": 3}
    run(preferring(method, gradient_accumulation_steps=2, output_dir=str(tmp_path / "one"), **keys))
    path = preferring(method, output_dir=str(tmp_path / "two"), **keys)
    subprocess.run([sys.executable, "-m", "ropewalk", "train", str(path), "--processes", "2"], check=True, capture_output=True)
    names = ("loss", "rewards/margins", "rewards/accuracies")
    for event in ("step", "eval"):
        one, two = ([e[name] for e in steps(tmp_path / n, event) for name in names] for n in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


def test_a_run_goes_on_from_its_checkpoint_with_the_same_numbers(preferring, tmp_path):
    path = preferring("dpo", max_steps=6, save_steps=2, save_total_limit=9, lora_dropout=0.1)
    run(path)
    whole = [e["loss"] for e in steps(tmp_path / "run")]
    for saved in (tmp_path / "run" / "checkpoints").iterdir():
        if int(saved.name.removeprefix("step-")) > 2:
            shutil.rmtree(saved)
    shutil.rmtree(tmp_path / "run" / "adapter")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"state": "training"}))
    run(path)
    assert [e["loss"] for e in steps(tmp_path / "run")] == whole


@pytest.mark.parametrize(
    "keys",
    [
        {"dpo_loss_type": "hinge"},
        {"dpo_loss_type": ["sigmoid", "ipo"], "dpo_loss_weights": [1.0, 0.5]},
        {"dpo_loss_type": "robust", "dpo_label_smoothing": 0.1},
        {"rpo_alpha": 1.0},
        {"rl_beta": 0.5},
    ],
    ids=["hinge", "two", "robust", "rpo", "beta"],
)
def test_every_key_of_dpo_has_an_effect(preferring, tmp_path, keys):
    run(preferring("dpo", max_steps=3, output_dir=str(tmp_path / "plain")))
    run(preferring("dpo", max_steps=3, output_dir=str(tmp_path / "varied"), **keys))
    plain, varied = ([e["loss"] for e in steps(tmp_path / n)] for n in ("plain", "varied"))
    assert plain[-1] != varied[-1]


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("kto", {"kto_desirable_weight": 2.0}),
        ("kto", {"kto_undesirable_weight": 2.0}),
        ("orpo", {"orpo_alpha": 0.5}),
        ("simpo", {"simpo_gamma": 1.5}),
        ("simpo", {"cpo_alpha": 1.0}),
        ("cpo", {"cpo_alpha": 0.0}),
    ],
)
def test_every_key_of_the_other_methods_has_an_effect(preferring, tmp_path, method, keys):
    run(preferring(method, max_steps=1, output_dir=str(tmp_path / "plain")))
    run(preferring(method, max_steps=1, output_dir=str(tmp_path / "varied"), **keys))
    plain, varied = (steps(tmp_path / n)[0]["loss"] for n in ("plain", "varied"))
    assert plain != pytest.approx(varied, rel=1e-3)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_model_that_is_trained_whole_is_compared_with_the_base_held_beside_it(preferring, base, pairs, tmp_path, method):
    path = preferring(method, adapter=None, lora_r=None, max_steps=12, learning_rate=3e-3, micro_batch_size=4, save_steps=6)
    run(path)
    found = steps(tmp_path / "run")
    assert abs(found[0]["rewards/margins"]) < 1e-5  # they begin as one
    assert found[-1]["rewards/margins"] > found[0]["rewards/margins"] + 0.05
    for name in ("checkpoints/step-00000012", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"state": "training"}))
    run(path)
    assert [e["loss"] for e in steps(tmp_path / "run")] == [e["loss"] for e in found]
    once = check(load_run(preferring("orpo", adapter=None, lora_r=None))).memory["weights"]
    assert check(load_run(preferring(method, adapter=None, lora_r=None))).memory["weights"] == 2 * once


def test_whole_models_learn_from_pairs_where_no_base_is_compared_with(preferring, tmp_path):
    run(preferring("simpo", adapter=None, lora_r=None, max_steps=15, learning_rate=3e-3, micro_batch_size=4))
    found = steps(tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["rewards/margins"] > found[0]["rewards/margins"]


def test_check_shows_both_answers_of_a_pair_with_what_is_compared(preferring):
    text = check(load_run(preferring("dpo"))).text()
    shown = text.split("Preview")[1]
    assert "pair 1, chosen" in shown
    assert "pair 1, rejected" in shown
    assert "\u27e60<|im_end|>" in shown
    assert "\u27e6it is 1<|im_end|>" in shown
    judged = check(load_run(preferring("kto"))).text()
    assert "row 1, wanted" in judged
    assert "row 2, not wanted" in judged
