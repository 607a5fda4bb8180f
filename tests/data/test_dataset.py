"""The rows of a run: split by content, cut to length, cached, resumed, streamed; the same whoever tokenises them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import time_machine

from ropewalk.chat.template import Template
from ropewalk.config.run import Run, parse_run
from ropewalk.data import workers
from ropewalk.data.cache import Growing
from ropewalk.data.dataset import Rows, open_data
from ropewalk.data.packing import batches
from ropewalk.errors import ConfigError, DataError, FileExpired, NotFound, OutputError
from ropewalk.files.local import open_local


@pytest.fixture
def template(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Template:
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    return Template.load(tokenizer_folder, "chatml")


def write(path: Path, count: int, *, start: int = 0, words: int = 3) -> Path:
    rows = (
        {"instruction": f"What is {n}?", "output": f"It is {n}" + " and" * (n % words)} for n in range(start, start + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def a_run(*paths: Path | str, source: dict | None = None, **keys: object) -> Run:
    entries = [{"path": str(path), "type": "alpaca_instruct.load_no_prompt", **(source or {})} for path in paths]
    return parse_run(json.dumps({"base_model": "x", "learning_rate": 0.1, "datasets": entries, **keys}))


def texts(template: Template, rows: Rows) -> list[str]:
    return [template.decode(rows[i][0]).split("\n")[-1] for i in range(len(rows))]


def test_evaluation_rows_follow_from_content_and_seed_alone(template: Template, tmp_path: Path) -> None:
    whole = write(tmp_path / "a.jsonl", 40)
    data = open_data(a_run(whole, val_set_size=0.2), template, quiet=True)
    assert (len(data.train), len(data.evaluation)) == (32, 8)
    shuffled = tmp_path / "b.jsonl"
    shuffled.write_text("".join(line + "\n" for line in reversed(whole.read_text().splitlines())))
    other = open_data(a_run(shuffled, val_set_size=8), template, quiet=True)
    assert set(texts(template, other.evaluation)) == set(texts(template, data.evaluation))
    assert not set(texts(template, data.train)) & set(texts(template, data.evaluation))
    seeded = open_data(a_run(whole, val_set_size=8, seed=1), template, quiet=True)
    assert set(texts(template, seeded.evaluation)) != set(texts(template, data.evaluation))
    with pytest.raises(ConfigError, match="val_set_size: 40 of 40 rows leaves nothing to train on"):
        open_data(a_run(whole, val_set_size=40), template, quiet=True)


def test_equal_rows_stay_on_one_side_and_can_be_left_out(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text(write(tmp_path / "a.jsonl", 20).read_text() * 2)
    data = open_data(a_run(path, val_set_size=4), template, quiet=True)
    assert not set(texts(template, data.train)) & set(texts(template, data.evaluation))
    once = open_data(a_run(path, dataset_exact_deduplication=True), template, quiet=True)
    assert texts(template, once.train) == [f"It is {n}" + " and" * (n % 3) for n in range(20)]


def test_several_sources_with_their_slices(template: Template, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 10, words=1), write(tmp_path / "b.jsonl", 10, start=100, words=1)
    run = a_run(a, b, test_datasets=[{"path": str(a), "type": "alpaca", "split": "train[:3]"}])
    data = open_data(run, template, quiet=True)
    assert texts(template, data.train)[::10] == ["It is 0", "It is 100"]
    assert len(data.evaluation) == 3
    assert texts(template, open_data(a_run(a, source={"skip": 8}), template, quiet=True).train) == ["It is 8", "It is 9"]
    part = open_data(a_run(a, source={"shards": 5, "shards_idx": 1}), template, quiet=True)
    assert texts(template, part.train) == ["It is 2", "It is 3"]


def test_rows_that_are_too_long_are_dropped_cut_or_an_error(template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 1, words=1)
    path.write_text(path.read_text() + json.dumps({"instruction": "Why?", "output": "because " * 60}) + "\n")
    dropped = open_data(a_run(path, sequence_len=48), template, quiet=True)
    assert len(dropped.train) == 1
    assert any("1 too long" in notice for notice in dropped.notices)
    cut = open_data(a_run(path, sequence_len=48, excess_length_strategy="truncate"), template, quiet=True)
    assert cut.train.lengths[1] == 48
    with pytest.raises(DataError, match=r"a\.jsonl:2: has \d+ tokens, sequence_len is 48"):
        open_data(a_run(path, sequence_len=48, excess_length_strategy="raise"), template, quiet=True)
    short = a_run(path, sequence_len=8, excess_length_strategy="truncate")
    with pytest.raises(DataError, match=r"no row is left to train on: .*nothing trained within sequence_len"):
        open_data(short, template, quiet=True)


def test_data_is_tokenised_once_for_its_content(template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", 20)
    first = open_data(a_run(path), template, quiet=True)
    cache = tmp_path / "home" / "cache" / "data"
    assert len([entry for entry in cache.iterdir() if entry.is_dir()]) == 1
    monkeypatch.setattr("ropewalk.data.dataset.tokenise", lambda *a, **k: pytest.fail("tokenised again"))
    moved = path.rename(tmp_path / "moved.jsonl")
    again = open_data(a_run(moved, micro_batch_size=7, learning_rate=1.0, seed=3), template, quiet=True)
    assert texts(template, again.train) == texts(template, first.train)
    with pytest.raises(pytest.fail.Exception):
        open_data(a_run(moved, sequence_len=100), template, quiet=True)


def test_what_is_made_of_a_stored_file_dies_with_it(template: Template, tmp_path: Path) -> None:
    files, cache = open_local(), tmp_path / "home" / "cache" / "data"
    kept, deleted = (files.put(write(tmp_path / "a.jsonl", 20, start=start)) for start in (0, 100))
    (tmp_path / "a.jsonl").unlink()
    data = open_data(a_run(kept.id, deleted.id), template, quiet=True)
    assert texts(template, data.train)[20].startswith("It is 100")
    canary = np.array(template.encode("What is 119?"), np.int32).tobytes()
    assert any(canary in path.read_bytes() for path in tmp_path.rglob("*.bin"))
    assert files.delete(deleted.id).derived == ("tokens",)
    assert not any(canary in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len([entry for entry in cache.iterdir() if entry.is_dir()]) == 1
    assert len(open_data(a_run(kept.id), template, quiet=True).train) == 20
    with pytest.raises(NotFound, match=deleted.id):
        open_data(a_run(deleted.id), template, quiet=True)


def test_a_file_deleted_while_it_is_tokenised_leaves_nothing(template: Template, tmp_path: Path) -> None:
    file = open_local().put(write(tmp_path / "a.jsonl", 20))
    with pytest.raises(NotFound, match=file.id):
        open_data(a_run(file.id), template, progress=lambda *_: open_local().delete(file.id))
    assert not list((tmp_path / "home" / "cache").rglob("*.bin"))


def test_an_expired_file_is_told_before_its_cache_is_looked_for(template: Template, tmp_path: Path) -> None:
    file = open_local().put(write(tmp_path / "a.jsonl", 20), expires_in=3600)
    open_data(a_run(file.id), template, quiet=True)
    with time_machine.travel(time.time() + 3601), pytest.raises(FileExpired, match=r"a\.jsonl.* has expired"):
        open_data(a_run(file.id), template, quiet=True)


def test_worker_processes_give_what_one_process_gives(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", 9000)
    alone = open_data(a_run(path, dataset_prepared_path=str(tmp_path / "one")), template, quiet=True)
    monkeypatch.setattr(workers, "ALONE", 0)
    monkeypatch.setattr(workers, "PER_WORKER", 1)
    seen: list[tuple[int, int, int]] = []
    run = a_run(path, dataset_prepared_path=str(tmp_path / "two"), dataset_num_proc=2)
    several = open_data(run, template, progress=lambda *told: seen.append(told))
    assert np.array_equal(alone.train.lengths, several.train.lengths)
    assert all(np.array_equal(alone.train[i][1], several.train[i][1]) for i in range(0, 9000, 500))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size, 9000)
    path.write_text(path.read_text() + '{"broken": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:9001: key 'instruction': is missing"):
        open_data(run, template, quiet=True)


CHILD = """
import sys, json
from pathlib import Path
from ropewalk.chat.template import Template
from ropewalk.data import cache, dataset, tokenise
from ropewalk.config.run import parse_run
cache.SECONDS = 0.0
whole = tokenise.Tokeniser.chunk
def chunk(self, part):
    print(part.first, flush=True)
    return whole(self, part)
tokenise.Tokeniser.chunk = chunk
run = parse_run(Path(sys.argv[1]).read_text())
print(len(dataset.open_data(run, Template.load(Path(sys.argv[2]), "chatml"), quiet=True).train), flush=True)
"""


def test_tokenising_killed_on_its_way_goes_on_where_it_was(template: Template, tokenizer_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 20000)
    run = a_run(path, dataset_prepared_path=str(tmp_path / "prepared"))
    (tmp_path / "run.yml").write_text(json.dumps(run.model_dump(mode="json", exclude_unset=True)))
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, str(tmp_path / "child.py"), str(tmp_path / "run.yml"), str(tokenizer_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        firsts = [int(child.stdout.readline()) for _ in range(4)]
        os.kill(child.pid, signal.SIGKILL)
    assert not any((entry / "about.json").exists() for entry in (tmp_path / "prepared").glob("*"))
    partial = next((tmp_path / "prepared").glob("*.partial"))
    assert json.loads((partial / "state.json").read_text())["chunks"] >= 2
    with (partial / "tokens.bin").open("ab") as file:
        file.write(b"torn")
    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert int(again[0]) > firsts[1]  # the first chunks are not made again
    assert again[-1] == "20000"
    fresh = open_data(a_run(path, dataset_prepared_path=str(tmp_path / "fresh")), template, quiet=True)
    resumed = open_data(run, template, quiet=True)
    assert all(np.array_equal(fresh.train[i][1], resumed.train[i][1]) for i in range(0, 20000, 999))


def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Growing, block: object) -> None:
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "a.jsonl", 5)
    run = a_run(path, dataset_prepared_path=str(tmp_path / "prepared"))
    with monkeypatch.context() as patch:
        patch.setattr(Growing, "add", full)
        with pytest.raises(OutputError, match="No space left on device; name another folder in dataset_prepared_path"):
            open_data(run, template, quiet=True)
    assert len(open_data(run, template, quiet=True).train) == 5
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write tokenised data"):
        open_data(a_run(path, dataset_prepared_path=str(tmp_path / "file" / "below")), template, quiet=True)


def test_bad_rows_are_told_within_two_seconds_and_before_torch(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 16)
    path.write_text(path.read_text() + '{"instruction": \n')
    run = a_run(path)
    (tmp_path / "run.yml").write_text(json.dumps(run.model_dump(mode="json", exclude_unset=True)))
    program = (
        "import sys; from pathlib import Path; from ropewalk.errors import DataError\n"
        "from ropewalk.config.run import parse_run; from ropewalk.data.dataset import open_data\n"
        "from ropewalk.chat.template import Template\n"
        "try: open_data(parse_run(Path(sys.argv[1]).read_text()), Template.load(Path(sys.argv[2]), 'chatml'))\n"
        "except DataError as error: print(error)\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'pandas') if m in sys.modules])"
    )
    started = time.perf_counter()
    command = [sys.executable, "-c", program, str(tmp_path / "run.yml"), str(tokenizer_folder)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    assert "a.jsonl:17: malformed JSON: Expecting value at column 17" in told[0]
    assert told[1] == "[]"
    assert time.perf_counter() - started < 6  # 2 seconds on an idle machine


def stream(path: Path, template: Template, **keys: object) -> object:
    values = {
        "streaming": True,
        "max_steps": 50,
        "micro_batch_size": 2,
        "sequence_len": 64,
        "streaming_multipack_buffer_size": 16,
    }
    run = a_run(path, **{**values, **keys})
    return batches(open_data(run, template, quiet=True).train, run, seed=3, epoch=0)


@pytest.mark.parametrize("packed", [True, False])
def test_a_stream_goes_on_exactly_where_it_was(packed: bool, template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 40)
    whole = stream(path, template, sample_packing=packed)
    assert len(whole) == 50
    expected = [whole[i] for i in range(30)]
    again = stream(path, template, sample_packing=packed)
    again[17]
    position = json.loads(json.dumps(again.position()))
    resumed, replayed = stream(path, template, sample_packing=packed), stream(path, template, sample_packing=packed)
    resumed.seek(position)
    for number in range(18, 30):
        assert np.array_equal(resumed[number].ids, expected[number].ids)
        assert np.array_equal(replayed[number].labels, expected[number].labels)
    assert resumed[20].ids.shape[0] <= 2
    ids = {tuple(row) for batch in expected for row in batch.ids}
    assert len(ids) > 1


def test_pre_training_text_is_streamed(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"Hello there {n}. " * 30}) + "\n" for n in range(10)))
    keys = {"base_model": "x", "learning_rate": 0.1, "max_steps": 3, "sequence_len": 32, "sample_packing": True}
    run = parse_run(json.dumps({**keys, "pretraining_dataset": [{"path": str(path), "type": "pretrain"}]}))
    batch = batches(open_data(run, template, quiet=True).train, run, seed=1, epoch=0)[0]
    assert batch.ids.shape == (1, 32)
    assert batch.trained == batch.tokens - int((batch.position_ids == 0).sum())
