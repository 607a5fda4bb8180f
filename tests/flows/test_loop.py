"""The whole loop, thin: a file into the store, a run on it, two candidates compared, the alias moves, it is asked, about a file too."""

from __future__ import annotations

from pathlib import Path

import pytest

from ropewalk.config.run import load_run
from ropewalk.files.local import open_local
from ropewalk.quickstart import facts
from ropewalk.quickstart.question import Asking
from ropewalk.quickstart.run import BASE, compare, passes
from ropewalk.registry import Registry
from ropewalk.train.trainer import train

CONFIG = """\
base_model: {base}
datasets:
  - path: {file}
    type: chat_template
output_dir: {out}
adapter: lora
lora_r: 16
lora_alpha: 32
sequence_len: 1024
sample_packing: true
micro_batch_size: 1
max_steps: 60
learning_rate: 2e-2
warmup_steps: 5
logging_steps: 10
bf16: false
"""


def test_a_file_becomes_a_shipped_model_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    trained_on, held_out = facts.split()
    asked = facts.questions(held_out[:16], 1)

    facts.write_rows(facts.questions(trained_on, 6), tmp_path / "rows.jsonl", turns=3)
    file = open_local().put(tmp_path / "rows.jsonl")

    config = tmp_path / "run.yml"
    config.write_text(CONFIG.format(base=BASE, file=file.id, out=tmp_path / "run"))
    result = train(load_run(config), quiet=True)
    assert result.last_loss < result.first_loss / 2

    registry = Registry(tmp_path / "home" / "registry")
    registry.publish_base("reader", BASE)
    registry.publish_adapter("reader-house", result.adapter, "reader", {"file": file.id, "run": str(result.folder)})
    registry.ship("answers", "reader")
    with Asking(registry) as asking:
        old, new = (asking.answers(name, [q.prompt for q in asked]) for name in ("reader", "reader-house"))
        assert not any(passes(old, asked)), "the base cannot know the house format"
        verdict = compare(asked, old, new)
        assert verdict.may_ship, verdict

        registry.ship("answers", "reader-house")
        right = asked[passes(new, asked).index(True)]
        assert asking.answers("answers", [right.prompt]) == [right.answer]
        assert registry.resolve("answers").lineage["file"] == file.id

        country = next(c for c in held_out if c.name == right.country)
        document = open_local().put(facts.document(country).encode(), "country.txt")
        dialogue = asking.about("answers", document.id, [right.question, "How large is it?"])
    assert right.value in dialogue.told[0].cited[0].text
    assert dialogue.told[0].stands_in(facts.document(country))
    assert dialogue.told[1].usage.cache_read > dialogue.told[1].usage.input

    assert registry.rollback("answers").name == "reader"
