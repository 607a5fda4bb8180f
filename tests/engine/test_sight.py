"""Pictures: seen by the engine as by the whole model's own `generate()`, looked at once, and never mistaken for one another."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from engine.seeing import SEEING, make
from ropewalk.engine.adapters import Adapters
from ropewalk.engine.engine import Engine
from ropewalk.engine.prefixes import Prefixes
from ropewalk.engine.request import Keep, Picture, Request, Sampling, Span
from ropewalk.engine.runner import Runner
from ropewalk.engine.scheduler import Limits
from ropewalk.engine.sight import Sight
from ropewalk.errors import BadInput
from ropewalk.models.load import load_base
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.models.seeing import load_processor, load_seeing, text_part
from ropewalk.vault import KEY_BYTES

NEW = 12
SIZES = ((40, 28), (24, 60))


@cache
def folder(name: str) -> Path:
    return make(name, Path(mkdtemp()))


@cache
def plain(name: str) -> Any:
    """The whole model as transformers runs it."""
    return AutoModelForImageTextToText.from_pretrained(folder(name), dtype=torch.float32).eval()


def picture(number: int, size: tuple[int, int]) -> Picture:
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Picture(f"picture {number}", *size, noise.tobytes())


PICTURES = [picture(number, size) for number, size in enumerate(SIZES)]


class Served:
    """An engine that sees."""

    def __init__(self, name: str, **options: Any) -> None:
        limits = options.pop("limits", Limits())
        seeing = load_seeing(folder(name), dtype=torch.float32, device="cpu")
        runner = Runner(seeing.text)
        self.sight = Sight(seeing)
        self.looks = 0
        self.prefixes = Prefixes(runner.layout, "test", **{"memory_bytes": 1 << 30} | options)
        self.adapters = Adapters(seeing.text)
        self.engine = Engine(runner, self.prefixes, self.adapters, limits=limits, sight=self)
        self.encode = seeing.processor.tokenizer.encode

    @property
    def at_once(self) -> bool:
        return self.sight.at_once

    def look(self, shown: Picture) -> Any:
        self.looks += 1
        return self.sight.look(shown)

    def read(self, *what: Any) -> None:
        self.sight.read(*what)

    def request(self, id: str, *parts: str | Picture, **more: Any) -> Request:
        """A prompt of texts and pictures; the last text is its tail."""
        *before, last = parts
        assert isinstance(last, str)
        spans = []
        for part in before:
            if isinstance(part, str):
                spans.append(Span(tuple(self.encode(part, add_special_tokens=False))))
            else:
                spans.append(Span(self.sight.ids(part.width, part.height), None, part))
        tail = tuple(self.encode(last, add_special_tokens=False))
        return Request(id, tuple(spans), tail, NEW, **{"sampling": Sampling(temperature=0), "logprobs": True} | more)

    def run(self, *requests: Request) -> dict[str, tuple[list[int], list[float]]]:
        """Ids and their log-probabilities, by request."""
        for request in requests:
            self.engine.submit(request)
        found: dict[str, tuple[list[int], list[float]]] = {request.id: ([], []) for request in requests}
        self.read_before: dict[str, int] = {}
        while self.engine.busy:
            for event in self.engine.step():
                assert event.finish != "error", event.error
                found[event.id][0].extend(event.ids)
                found[event.id][1].extend(event.logprobs)
                if event.read is not None:
                    self.read_before[event.id] = event.read
        return found


def generated(name: str, *parts: str | Picture, model: Any = None) -> tuple[list[int], list[float]]:
    """What transformers itself makes of texts and pictures."""
    model, processor = model or plain(name), load_processor(folder(name))
    text = "".join(part if isinstance(part, str) else processor.image_token for part in parts)
    shown = [part for part in parts if isinstance(part, Picture)]
    images = [Image.fromarray(np.frombuffer(p.pixels or b"", np.uint8).reshape(p.height, p.width, 3)) for p in shown]
    inputs = processor(text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=-1
        )
    ids = out.sequences[0, inputs["input_ids"].shape[1] :]
    logprobs = torch.log_softmax(torch.cat(out.logits).float(), -1).gather(1, ids[:, None])[:, 0]
    return ids.tolist(), logprobs.tolist()


PROMPTS: list[tuple[str | Picture, ...]] = [
    ("<|im_start|>Look:", PICTURES[0], " what is it, then?"),
    ("Two of them: ", PICTURES[0], " and ", PICTURES[1], " which of the two is the brighter one, and why do you say so?"),
    (PICTURES[1], "!"),
    ("No picture at all, only words.", " Go on"),
]


def same(found: tuple[list[int], list[float]], wanted: tuple[list[int], list[float]]) -> None:
    assert found[0] == wanted[0]
    assert found[1] == pytest.approx(wanted[1], abs=1e-5)


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_a_picture_is_seen_as_the_whole_model_sees_it(name: str, number: int) -> None:
    served = Served(name)
    same(served.run(served.request("a", *PROMPTS[number]))["a"], generated(name, *PROMPTS[number]))


@pytest.mark.parametrize("name", SEEING)
def test_a_crowd_with_and_without_pictures_is_answered_as_each_alone(name: str) -> None:
    served = Served(name, limits=Limits(chunk=16))
    found = served.run(*(served.request(str(number), *prompt) for number, prompt in enumerate(PROMPTS)))
    for number, prompt in enumerate(PROMPTS):
        same(found[str(number)], generated(name, *prompt))


@pytest.mark.parametrize("name", SEEING)
def test_a_second_question_about_a_picture_does_not_look_at_it_again(name: str) -> None:
    served = Served(name)
    served.run(served.request("first", *PROMPTS[1]))
    assert served.looks == 2
    *shown, _ = PROMPTS[1]
    bare = [replace(part, pixels=None) if isinstance(part, Picture) else part for part in shown]
    warm = served.run(served.request("second", *bare, " And now?"))["second"]
    assert served.looks == 2
    assert served.read_before["second"] == sum(len(span.ids) for span in served.request("x", *PROMPTS[1]).prefix)
    cold = Served(name).run(served.request("second", *shown, " And now?"))["second"]
    assert warm == cold  # bit for bit


@pytest.mark.parametrize("name", SEEING)
def test_a_picture_that_was_read_is_found_on_disk(name: str, tmp_path: Path) -> None:
    def kept(request: Request) -> Request:
        key = bytes(KEY_BYTES)
        return replace(
            request,
            prefix=tuple(replace(span, keep=Keep(str(tmp_path / str(n)), key)) for n, span in enumerate(request.prefix)),
        )

    first = Served(name, folder=tmp_path, disk_bytes=1 << 30)
    asked = kept(first.request("a", *PROMPTS[1]))
    cold = first.run(asked)["a"]
    first.prefixes.close()
    again = Served(name, folder=tmp_path, disk_bytes=1 << 30)
    assert again.run(asked)["a"] == cold
    assert again.looks == 0
    again.prefixes.close()


def test_pictures_of_one_size_are_told_apart() -> None:
    served = Served("qwen3_vl")
    one, other = picture(1, (40, 28)), picture(2, (40, 28))
    found = served.run(served.request("a", "See ", one, " it"), served.request("b", "See ", other, " it"))
    assert served.looks == 2
    assert found["a"] != found["b"]


def test_pictures_whose_pixels_are_lacking_are_named() -> None:
    served = Served("gemma4")
    bare = [replace(shown, pixels=None) for shown in PICTURES]
    asked = served.request("a", "See ", bare[0], " and ", bare[1], "!")
    assert served.engine.lacking(asked) == ["picture 0", "picture 1"]
    served.run(served.request("b", "See ", PICTURES[0], "."))
    assert served.engine.lacking(asked) == ["picture 1"]


def test_two_who_ask_about_a_picture_at_once_look_at_it_once() -> None:
    served = Served("qwen3_5_moe")
    found = served.run(*(served.request(id, *PROMPTS[0]) for id in "ab"))
    assert served.looks == 1
    assert found["a"][0] == found["b"][0]
    assert found["a"][1] == pytest.approx(found["b"][1], abs=1e-6)  # the last was alone in its step


@pytest.mark.parametrize("name", SEEING)
def test_ids_of_a_picture_are_told_from_its_size_alone(name: str) -> None:
    served = Served(name)
    ids = served.sight.ids(40, 28)
    (_, count), *_ = Counter(ids).most_common(1)
    seen = served.sight.look(PICTURES[0])
    assert count == sum(len(features) for features in seen.features.pooler_output)


def test_a_shape_that_the_model_takes_none_of_is_refused() -> None:
    served = Served("qwen3_vl")
    with pytest.raises(BadInput, match="1000 by 1 pixels"):
        served.sight.ids(1000, 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["qwen3_5_moe", "gemma4"])
def test_an_adapter_of_the_text_part_reads_pictures_for_itself(name: str, tmp_path: Path) -> None:
    trained = attach(load_base(folder(name), dtype=torch.float32, device="cpu"), LoraSpec(r=4, alpha=16.0), 1)
    with torch.no_grad():
        for number, parameter in enumerate(trained.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    trained.save(tmp_path)
    served = Served(name)
    served.adapters.load("house", tmp_path)
    ours = served.run(served.request("a", *PROMPTS[0], adapter="house"), served.request("b", *PROMPTS[0]))
    whole = AutoModelForImageTextToText.from_pretrained(folder(name), dtype=torch.float32).eval()
    PeftModel.from_pretrained(text_part(whole), tmp_path)  # into the modules that both share
    same(ours["a"], generated(name, *PROMPTS[0], model=whole))
    same(ours["b"], generated(name, *PROMPTS[0]))
    assert ours["a"] != ours["b"]
