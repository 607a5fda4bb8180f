"""Rows with pictures: every way to say where one lies, and what is said of one that cannot be shown."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ropewalk.chat.template import Template
from ropewalk.config.run import Run, parse_run
from ropewalk.data import dataset
from ropewalk.data.dataset import Rows, open_data
from ropewalk.data.packing import batches
from ropewalk.data.pictures import find, kept, read_kept
from ropewalk.errors import DataError
from ropewalk.files import local
from ropewalk.files.local import open_local

JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|endoftext|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class FakeLens:
    """An id for every pixel, between two others; the token that the template writes for a picture is one that ends texts elsewhere."""

    token_id: int
    feature_id: int = 7
    digest: str = "fake"

    def ids(self, width: int, height: int) -> tuple[int, ...]:
        return (5, *[self.feature_id] * (width * height), 6)


@pytest.fixture
def template(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Template:
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    return Template.load(tokenizer_folder, "jinja", chat_template_jinja=JINJA)


@pytest.fixture
def lens(template: Template) -> FakeLens:
    (id,) = template.encode("<|endoftext|>")
    return FakeLens(id)


def png(size: tuple[int, int] = (3, 2), colour: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def a_run(path: Path | str, **keys: object) -> Run:
    given = {"base_model": "x", "learning_rate": 0.1, "adapter": "lora", "processor_type": "AutoProcessor", **keys}
    return parse_run(json.dumps({**given, "datasets": [{"path": str(path), "type": "chat_template"}]}))


def said(*parts: Any, **row: Any) -> dict[str, Any]:
    """A row in which the user says this and the assistant answers."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    asked = content[0]["text"] if len(parts) == 1 and isinstance(parts[0], str) else content
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "It is red"}], **row}


def opened(folder: Path, template: Template, lens: FakeLens, *rows: Any, **keys: object) -> Rows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = open_data(a_run(path, **keys), template, quiet=True, lens=lens)
    assert isinstance(data.train, Rows)
    return data.train


URL = "data:image/png;base64," + base64.b64encode(png()).decode()
PARTS = {
    "OpenAI's, a data URL": {"type": "image_url", "image_url": {"url": URL}},
    "OpenAI's, a path": {"type": "image_url", "image_url": {"url": "a.png"}},
    "Claude's, base64": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png()).decode()},
    },
    "transformers', a path": {"type": "image", "path": "a.png"},
    "transformers', base64": {"type": "image", "base64": base64.b64encode(png()).decode()},
    "Qwen's": {"type": "image", "image": "file://a.png"},
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_a_part_of_a_message_says_where_its_picture_lies(tmp_path: Path, template: Template, lens: FakeLens, part: Any) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = opened(tmp_path, template, lens, said("Look: ", part, " Which colour?"))
    ids, labels = rows[0]
    at = ids.tolist().index(5)
    assert ids[at : at + 8].tolist() == [5, *[7] * 6, 6]
    assert template.decode(ids[:at], skip_special_tokens=False) == "<|im_start|>user\nLook: "
    assert template.decode(labels[labels != -100], skip_special_tokens=False) == "It is red<|im_end|>"
    (shown,) = rows.pictures(0)
    assert shown.decode().getpixel((0, 0)) == (255, 0, 0)


def test_the_column_images_fills_marks_in_texts_bare_parts_or_stands_before_the_words(
    tmp_path: Path, template: Template, lens: FakeLens
) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(colour=colour))
    bare = {"type": "image"}
    rows = opened(
        tmp_path,
        template,
        lens,
        said("First <image>, then <image>.", images=["a.png", "b.png"]),
        said("First ", bare, ", then ", bare, ".", images=[URL, {"bytes": None, "path": "b.png"}]),
        said("Look.", image="b.png"),
        said("No picture at all."),
    )
    texts = [template.decode([id for id in row[0] if id not in (5, 6, 7)], skip_special_tokens=False) for row in rows]
    assert texts[0] == texts[1]
    assert "First , then ." in texts[0]
    colours = [[shown.decode().getpixel((0, 0)) for shown in rows.pictures(n)] for n in range(4)]
    assert colours == [[(255, 0, 0), (0, 0, 255)]] * 2 + [[(0, 0, 255)], []]
    assert rows[2][0].tolist().index(7) < len(template.encode("<|im_start|>user\n")) + 2
    assert rows.shows


@pytest.mark.parametrize("said", [{"bytes": png(), "path": None}, png(), Image.new("RGBA", (3, 2), "red")])
def test_what_parquet_files_and_the_datasets_library_hold_is_a_picture(said: Any) -> None:
    shown = find(said, "rows.parquet:1", None).sized()
    (again,) = read_kept(kept([shown]))
    assert again == shown
    assert (again.width, again.decode().getpixel((0, 0))) == (3, (255, 0, 0))


def test_pictures_of_the_file_store_are_named_by_their_ids(tmp_path: Path, template: Template, lens: FakeLens) -> None:
    file = open_local().put(png(), "a.png")
    rows = opened(tmp_path, template, lens, said({"type": "image", "source": {"type": "file", "file_id": file.id}}, "?"))
    assert rows.pictures(0)[0].decode().size == (3, 2)
    open_local().delete(file.id)
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: the picture '{file.id}' is not there"):
        rows.pictures(0)[0].decode()


def test_batches_have_the_pictures_of_their_rows_in_order(tmp_path: Path, template: Template, lens: FakeLens) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png((number + 1, 1)))
    rows = opened(tmp_path, template, lens, *[said({"type": "image", "path": f"{n}.png"}, str(n)) for n in range(5)])
    run = a_run("x", micro_batch_size=2)
    found = list(batches(rows, run, seed=0, epoch=0))
    assert [batch.shown_by for batch in found] == [(1, 1), (1, 1), (1,)]
    for batch in found:
        assert [(row == 7).sum() for row in batch.ids] == [shown.width for shown in batch.pictures]
    assert sorted(shown.width for batch in found for shown in batch.pictures) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (said({"type": "image", "path": "no.png"}, "?"), r"rows\.jsonl:1: .*no\.png' is not there"),
        (said({"type": "image", "path": "text.png"}, "?"), r"text\.png' is damaged, or neither PNG"),
        (said({"type": "image", "path": "cut.png"}, "?"), r"rows\.jsonl:1: the picture '.*cut\.png' is damaged"),
        (said({"type": "image", "url": "https://a.example/b.png"}, "?"), "is not fetched while training; download it"),
        (said({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}, "?"), "is not base64"),
        (said({"type": "image"}, "?"), "shows 1 pictures in its messages, and its column 'images' lists 0"),
        (said("<image>", images=["a.png", "a.png"]), "shows 1 pictures in its messages, and its column 'images' lists 2"),
        (said("<|endoftext|>"), "shows 0 pictures, and the chat template writes 1 places"),
        (said({"type": "audio", "path": "a.wav"}, "?"), "a part of type 'audio'; only text and pictures"),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": [PARTS["Qwen's"]]}]},
            "message 2 is the assistant's and holds a picture",
        ),
    ],
)
def test_a_picture_that_cannot_be_shown_is_told_with_its_row(
    tmp_path: Path, template: Template, lens: FakeLens, row: Any, reason: str
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(png((64, 64))[:80])
    with pytest.raises(DataError, match=reason):
        opened(tmp_path, template, lens, row)


def test_pictures_without_a_processor_are_an_error_with_the_way_out(tmp_path: Path, template: Template) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(said({"type": "image", "path": "a.png"}, "?")) + "\n")
    run = a_run(tmp_path / "rows.jsonl", processor_type="")
    with pytest.raises(DataError, match="holds a picture; to train on pictures add processor_type: AutoProcessor"):
        open_data(run, template, quiet=True)


def test_a_picture_that_became_another_since_it_was_counted_is_told(tmp_path: Path, template: Template, lens: FakeLens) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = opened(tmp_path, template, lens, said({"type": "image", "path": "a.png"}, "?"))
    (tmp_path / "a.png").write_bytes(png((9, 9)))
    with pytest.raises(DataError, match="is 9 by 9 pixels, and was 3 by 2 when the rows were prepared"):
        rows.pictures(0)[0].decode()


def test_a_row_whose_pictures_do_not_fit_is_left_out_and_never_cut_through_one(
    tmp_path: Path, template: Template, lens: FakeLens
) -> None:
    (tmp_path / "a.png").write_bytes(png((10, 10)))
    long = said("Look ", {"type": "image", "path": "a.png"}, "word " * 40)
    rows = [long, said("A short one without.")]
    assert len(opened(tmp_path, template, lens, *rows, sequence_len=64)) == 1
    with pytest.raises(DataError, match="pictures do not fit within sequence_len"):
        opened(tmp_path, template, lens, long, sequence_len=64, excess_length_strategy="truncate", train_on_inputs=True)
    left = opened(tmp_path, template, lens, long, sequence_len=130, excess_length_strategy="truncate", train_on_inputs=True)
    assert (left[0][0] == 7).sum() == 100


def test_equal_rows_with_other_pictures_are_not_equal(tmp_path: Path, template: Template, lens: FakeLens) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(colour=colour))
    rows = [said({"type": "image", "path": name}, "?") for name in ("a.png", "b.png", "a.png")]
    assert len(opened(tmp_path, template, lens, *rows, dataset_exact_deduplication=True)) == 2


def test_the_same_rows_beside_other_pictures_are_prepared_anew(tmp_path: Path, template: Template, lens: FakeLens) -> None:
    for name, size in (("one", (1, 1)), ("two", (2, 2))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(size))
        rows = opened(tmp_path / name, template, lens, said({"type": "image", "path": "a.png"}, "?"))
        assert rows.pictures(0)[0].width == size[0]


def test_a_preview_shows_a_picture_as_one_of_its_ids(tmp_path: Path, template: Template, lens: FakeLens) -> None:
    (tmp_path / "a.png").write_bytes(png((10, 10)))
    (tmp_path / "rows.jsonl").write_text(json.dumps(said({"type": "image", "path": "a.png"}, "?")) + "\n")
    ((_, spans),) = dataset.previews(a_run(tmp_path / "rows.jsonl"), template, lens=lens)
    assert "".join(text for text, _ in spans).count(template.decode([7], skip_special_tokens=False)) == 1


def test_a_job_shows_what_stands_in_its_rows_alone_and_decodes_it_apart(
    tmp_path: Path, template: Template, lens: FakeLens, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(row: Any) -> Run:
        return a_run(open_local().put((json.dumps(row) + "\n").encode(), "rows.jsonl").id)

    inline = put(said(PARTS["OpenAI's, a data URL"], "?"))
    path, id = put(said({"type": "image", "path": "/etc/hostname"}, "?")), open_local().put(png(), "a.png").id
    other = put(said({"type": "image", "source": {"type": "file", "file_id": id}}, "?"))
    monkeypatch.setattr(local, "granted", open_local())
    in_process = []
    monkeypatch.setattr("ropewalk.files.readers.picture.pixels", lambda *_: in_process.append(1))
    data = open_data(inline, template, quiet=True, lens=lens)
    assert isinstance(data.train, Rows)
    assert data.train.pictures(0)[0].decode().getpixel((0, 0)) == (255, 0, 0)
    assert not in_process
    with pytest.raises(DataError, match="names no path; write it as a data URL"):
        open_data(path, template, quiet=True, lens=lens)
    with pytest.raises(DataError, match="a job reads its own files alone"):
        open_data(other, template, quiet=True, lens=lens)
