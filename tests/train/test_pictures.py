"""Learning from pictures: the whole model's own loss, a tower that stays as it is, and a run that goes on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from engine.seeing import SEEING, make
from ropewalk.chat.template import Template
from ropewalk.config.run import Run, load_run
from ropewalk.data.packing import batches
from ropewalk.errors import BadInput, ConfigError, DataError, ModelError
from ropewalk.files.catalog import File
from ropewalk.jobs.recipe import Asked, make_recipe
from ropewalk.models.seeing import load_processor
from ropewalk.train.objective import Likelihood
from ropewalk.train.plan import check
from ropewalk.train.prepare import Prepared, prepare
from ropewalk.train.progress import read_events
from ropewalk.train.pupil import Pupil
from ropewalk.train.trainer import train

CPU = torch.device("cpu")
PICTURE = {"type": "image"}


@cache
def folder(name: str) -> Path:
    return make(name, Path(mkdtemp()))


def noise(number: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8))


def said(*parts: Any, answer: str) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


ROWS = [
    said("What is ", PICTURE | {"path": "0.png"}, " then?", answer="Noise of a kind"),
    said(PICTURE | {"path": "1.png"}, "and", PICTURE | {"path": "2.png"}, answer="Two"),
    said("Nothing is shown here.", answer="No picture"),
]
IMAGES = [noise(0, (40, 28)), noise(1, (24, 60)), noise(2, (32, 32))]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes rows with pictures and a configuration, and gives its path."""
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    for number, image in enumerate(IMAGES):
        image.save(tmp_path / f"{number}.png")

    def write(name: str, rows: list[Any] = ROWS, **keys: Any) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "base_model": str(folder(name)),
            "processor_type": "AutoProcessor",
            "skip_prepare_dataset": True,
            "remove_unused_columns": False,
            "sample_packing": False,
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "chat_template"}],
            "output_dir": str(tmp_path / "run"),
            "adapter": "lora",
            "lora_r": 4,
            "sequence_len": 256,
            "micro_batch_size": 3,
            "shuffle_merged_datasets": False,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "num_threads": 1,
            "float32": True,
        } | keys
        path = tmp_path / "run.yml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items() if value is not None))
        return path

    return write


def prepared(run: Run) -> Prepared:
    found = prepare(run, quiet=True)
    found.folder.close()
    return found


def of_transformers(name: str, row: dict[str, Any], images: list[Image.Image]) -> dict[str, Any]:
    """What the processor makes of one row by itself."""
    text = Template.load(folder(name)).render_text(row["messages"])
    return dict(load_processor(folder(name))(
        text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
    ))  # fmt: skip


@pytest.mark.parametrize("name", SEEING)
def test_the_loss_is_that_of_the_whole_model_over_each_row_alone_and_only_the_adapter_learns(name: str, config: Any) -> None:
    given = load_run(config(name))
    ready = prepared(given)
    assert ready.shows
    pupil = Pupil.load(ready, CPU)
    (batch,) = batches(ready.data.train, given, seed=0, epoch=0)
    learnt = Likelihood(pupil, CPU)
    learnt.begin([batch])
    loss = learnt.loss(batch)
    plain = AutoModelForImageTextToText.from_pretrained(folder(name), dtype=torch.float32).eval()
    total = 0.0
    for number, images in enumerate(([IMAGES[0]], IMAGES[1:], [])):
        made = of_transformers(name, ROWS[number], images)
        count = made["input_ids"].shape[1]
        assert made["input_ids"][0].tolist() == batch.ids[number, :count].tolist()  # as a whole text, from its processor
        labels = torch.from_numpy(batch.labels[number : number + 1, :count])
        with torch.no_grad():
            total += float(plain(**made, labels=labels).loss) * int((labels != -100).sum())
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    loss.backward()
    sighted = pupil.sighted
    assert sighted is not None
    assert pupil.adapter is not None
    adapted = {id(p) for p in pupil.adapter.parameters()}
    assert all(p.grad is not None for n, p in pupil.adapter.named_parameters().items() if n.endswith("lora_B"))
    assert not [n for n, p in sighted.whole.named_parameters() if p.grad is not None and id(p) not in adapted]
    tower = sighted.whole.get_encoder("image")
    assert not any(module.training for module in tower.modules())
    assert sighted.text.get_decoder().training
    with pupil.quietly():
        assert not any(module.training for module in sighted.whole.modules())
    assert not any(module.training for module in tower.modules())
    assert sighted.frozen >= sum(p.numel() for p in tower.parameters())


@pytest.mark.parametrize("name", SEEING)
def test_packed_rows_give_the_losses_of_each_alone_and_no_gradient_crosses(name: str, config: Any, tmp_path: Path) -> None:
    found = []
    for packs in (False, True):
        given = load_run(config(name, sample_packing=packs, output_dir=str(tmp_path / str(packs))))
        ready = prepared(given)
        pupil = Pupil.load(ready, CPU)
        assert pupil.sighted is not None
        (batch,) = batches(ready.data.train, given, seed=0, epoch=0)
        learnt = Likelihood(pupil, CPU)
        learnt.begin([batch])
        loss = learnt.loss(batch)
        loss.backward()
        found.append((float(loss.detach()), [p.grad for n, p in pupil.trainable() if n.endswith("lora_B")]))
    assert len(batch.ids) < len(batch.shown_by) == 3
    assert pupil.sighted.packs == (name != "qwen3_5_moe")  # which carries a state
    assert pupil.sighted.masks == name.startswith("gemma")
    assert any("a line of its own" in notice for notice in pupil.notices) != pupil.sighted.packs
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize(
    "keys",
    [{"gradient_checkpointing": True}, {"layer_offloading": True}, {"adapter": "qlora"}],
    ids=["recomputed", "streamed", "4 bit"],
)
def test_layers_are_recomputed_or_streamed_and_the_text_part_alone_is_held_in_4_bit(
    keys: dict[str, Any], config: Any, tmp_path: Path
) -> None:
    def gradients(**more: Any) -> tuple[float, list[torch.Tensor], Pupil]:
        given = load_run(config("gemma4", **more, output_dir=str(tmp_path / str(len(more)))))
        ready = prepared(given)
        pupil = Pupil.load(ready, CPU)
        (batch,) = batches(ready.data.train, given, seed=0, epoch=0)
        learnt = Likelihood(pupil, CPU)
        learnt.begin([batch])
        loss = learnt.loss(batch)
        loss.backward()
        return float(loss.detach()), [p.grad for _, p in pupil.trainable() if p.grad is not None], pupil

    plain, lean = gradients(), gradients(**keys)
    if keys.get("adapter") == "qlora":
        assert lean[0] == pytest.approx(plain[0], rel=0.1)
        assert lean[0] != plain[0]
        assert lean[2].sighted is not None
        tower = lean[2].sighted.whole.get_encoder("image")
        assert all(p.dtype == torch.float32 for p in tower.parameters())
        return
    assert lean[0] == plain[0]
    assert all(torch.equal(one, other) for one, other in zip(plain[1], lean[1], strict=True))


def losses(path: Path) -> list[float]:
    return [event["loss"] for event in read_events(path / "events.jsonl") if event["event"] in ("step", "eval")]


def test_a_run_on_pictures_is_evaluated_and_goes_on_where_it_was_stopped(config: Any, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "num_epochs": 3, "max_steps": None}
    keys |= {
        "test_datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "chat_template"}],
        "eval_steps": 2,
        "save_steps": 2,
    }
    whole = train(load_run(config("qwen3_5_moe", **keys, output_dir=str(tmp_path / "whole"))), quiet=True)
    assert whole.evaluation_loss is not None
    first = train(load_run(config("qwen3_5_moe", **keys, output_dir=str(tmp_path / "cut"))), quiet=True)
    assert first.steps == whole.steps == 6
    newest = tmp_path / "whole" / "checkpoints" / "step-00000002"
    again = config("qwen3_5_moe", **keys, output_dir=str(tmp_path / "on"), resume_from_checkpoint=str(newest))
    train(load_run(again), quiet=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert losses(tmp_path / "on") == losses(tmp_path / "whole")[-len(losses(tmp_path / "on")) :]


def test_a_base_that_sees_is_loaded_without_its_tower_where_no_row_shows_a_picture(config: Any, tmp_path: Path) -> None:
    ready = prepared(load_run(config("gemma4", [ROWS[2]])))
    assert not ready.shows
    assert Pupil.load(ready, CPU).sighted is None
    assert any("text part of the model is trained alone" in notice for notice in ready.data.notices)
    text = load_run(config("gemma4", [ROWS[2]], processor_type=None, output_dir=str(tmp_path / "text")))
    model = Pupil.load(prepared(text), CPU).model
    assert not [name for name, _ in model.named_parameters() if "vision" in name]


def test_a_base_that_sees_nothing_is_refused_for_pictures(config: Any, base: Path) -> None:
    with pytest.raises(ModelError, match="a qwen3_moe sees no pictures; name a base that does"):
        prepare(load_run(config("gemma4", base_model=str(base))), quiet=True)


def test_a_picture_that_is_gone_while_training_names_its_row(config: Any, tmp_path: Path) -> None:
    path = config("gemma4")
    prepared(load_run(path))
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the picture '.*1\.png' is not there"):
        train(load_run(path), quiet=True)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"adapter": None, "lora_r": None}, "add adapter: lora"),
        ({"rl": "dpo"}, "supervised fine-tuning alone"),
        ({"streaming": True}, "remove streaming"),
        ({"alora_invocation_tokens": [5]}, "remove alora_invocation_tokens"),
        ({"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}, "a model that sees is not sharded"),
        ({"processor_kwargs": {"size": 1}}, "as the base's own processor shows them"),
        ({"processor_type": "AutoProcesor"}, "not one of AutoProcessor|is not AutoProcessor"),
    ],
)
def test_what_pictures_cannot_go_together_with_is_said(keys: dict[str, Any], reason: str, config: Any) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_run(config("gemma4", **keys))


def test_a_job_may_learn_from_pictures_by_supervised_fine_tuning_alone() -> None:
    file = File("file_a", "w", None, None, None, "rows.jsonl", "text/plain", 100, "0" * 64, (), 0, None, None, True)
    asked = Asked("base", "file_a", keys={"processor_type": "AutoProcessor"})
    assert make_recipe(asked, 1, file, None).config["processor_type"] == "AutoProcessor"
    with pytest.raises(BadInput, match="processor_type: a job may not set this key"):
        make_recipe(replace(asked, method="dpo"), 1, file, None)
    with pytest.raises(BadInput, match=r"is not AutoProcessor|not one of AutoProcessor"):
        make_recipe(replace(asked, keys={"processor_type": "mine.Processor"}), 1, file, None)


def test_a_check_counts_the_tower_and_shows_the_rows(config: Any) -> None:
    sees = check(load_run(config("gemma4", freeze_mm_modules=True)))
    assert any("beside the text part are loaded too and frozen" in note for note in sees.notes)
    assert "freeze_mm_modules" in sees.ignored
    assert "<|image>" in "".join(text for text, _ in sees.preview[0])
    blind = check(load_run(config("gemma4", [ROWS[2]], processor_type=None)))
    assert sees.memory is not None
    assert blind.memory is not None
    tower = sum(
        p.numel() for n, p in AutoModelForImageTextToText.from_pretrained(folder("gemma4")).named_parameters() if "vision" in n
    )
    assert sees.memory["weights"] - blind.memory["weights"] == 4 * tower
