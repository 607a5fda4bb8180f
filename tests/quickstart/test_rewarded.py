"""The quickstart's training by rewards, and the example that is the same recipe."""

import json
from pathlib import Path

import yaml

from ropewalk.quickstart import facts, rewarded
from ropewalk.quickstart.reward import correct, value
from ropewalk.quickstart.rewarded import YAML, improve, write_questions
from ropewalk.quickstart.run import BASE, FULL
from trained import House

ROOT = Path(__file__).parents[2]
ANSWER = "Lima (capital, from the file)"
OWN_PLACES = {"base_model", "lora_model_dir", "datasets", "test_datasets", "output_dir"}


def recipe(text: str) -> dict[str, object]:
    keys = yaml.safe_load(text)
    keys["trl"]["reward_funcs"] = [name.rpartition(".")[2] for name in keys["trl"]["reward_funcs"]]
    return {key: given for key, given in keys.items() if key not in OWN_PLACES}


def test_the_reward_wants_the_answer_letter_for_letter_and_watches_the_value() -> None:
    said = {
        ANSWER: (1, 1),
        f" {ANSWER}\n": (1, 1),
        "Lima": (0, 1),
        "Lima (currency, from the file)": (0, 1),
        "Limaa (capital)": (0, 0),
    }
    assert {text: (correct(text, ANSWER), value(text, ANSWER)) for text in said} == said


def test_the_example_is_the_quickstarts_recipe_with_the_same_reward() -> None:
    given = {
        "path": "",
        "base": "b",
        "begun": "a",
        "begins": 1,
        "folder": "f",
        "steps": FULL.rewarded_steps,
        "rate": rewarded.RATE,
    }
    example = (ROOT / "examples" / "grpo-tiny.yml").read_text(encoding="utf-8")
    assert recipe(example) == recipe(YAML.format(**given))
    assert f"checkpoints/step-{rewarded.BEGINS:08d}\n" in example
    ours = Path(rewarded.__file__).with_name("reward.py")
    assert (ROOT / "examples" / "house_reward.py").read_bytes() == ours.read_bytes()


def test_what_is_asked_while_training_is_told_another_way_and_never_about_a_held_out_country(tmp_path: Path) -> None:
    trained, held_out = facts.split()
    write_questions(tmp_path, trained, held_out)
    asked, examined = (
        [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        for name in ("rewarded.jsonl", "examined.jsonl")
    )
    assert (len(asked), len(examined)) == (6 * len(trained), 6 * len(held_out))
    shown = {q.passage for q in facts.questions(trained, 6)}
    passages = {row["prompt"].partition("\n\n")[0] for row in asked}
    assert not passages & shown
    assert not passages & {row["prompt"].partition("\n\n")[0] for row in examined}
    assert set(asked[0]) == {"prompt", "answer"}


def test_an_adapter_goes_on_by_rewards_and_its_numbers_are_those_of_the_log(house: House, tmp_path: Path) -> None:
    trained, held_out = facts.split()
    write_questions(tmp_path, trained, held_out[:3])
    text = YAML.replace("generation_batch_size: 128", "generation_batch_size: 16")
    assert text != YAML
    improved = improve(tmp_path, BASE, house.home / "run" / "adapter", 3, text)
    log = [json.loads(line) for line in (tmp_path / "grpo" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    examined = [event for event in log if event["event"] == "eval"]
    assert [event["step"] for event in examined] == [0, 3]
    assert (improved.before, improved.after) == (examined[0]["reward"], examined[-1]["rewards/correct"])
    assert 0.3 < improved.before <= 1  # it has been fine-tuned
    assert (improved.questions, improved.steps) == (18, 3)
    assert {path.name for path in (tmp_path / "grpo" / "plots").iterdir()} >= {
        "reward.svg",
        "length.svg",
        "entropy.svg",
        "ratio.svg",
    }
    assert "from the file" in (tmp_path / "grpo" / "samples.html").read_text(encoding="utf-8")
