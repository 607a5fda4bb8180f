"""Each row of a batch is adapted by its own request's adapter, experts too, as PEFT would."""

import pytest
import torch
from peft import PeftModel

from engine.architectures import make
from engine.test_engine import GREEDY, ask, ids, prefixes, run, text
from ropewalk.engine.adapters import Adapters
from ropewalk.engine.engine import Engine
from ropewalk.engine.request import Request, Span
from ropewalk.engine.runner import Runner
from ropewalk.engine.scheduler import Limits
from ropewalk.errors import ModelError, NotFound
from ropewalk.models.lora import LoraSpec, attach

INVOCATION = (7, 8, 9)


def trained(name, folder, seed, **spec):
    """A folder with an adapter whose factors are not zero."""
    adapter = attach(make(name), LoraSpec(**{"r": 4, "alpha": 16.0} | spec), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapter.save(folder)
    return folder


def with_adapters(name, **folders):
    model = make(name)
    runner = Runner(model)
    adapters = Adapters(model)
    for adapter, folder in folders.items():
        adapters.load(adapter, folder)
    return Engine(runner, prefixes(runner), adapters, limits=Limits(chunk=16))


def as_peft_says(name, folder, prompt, new=8):
    model = make(name)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt_oss", "gemma4", "qwen3_5_moe"])
def test_a_batch_of_several_adapters_and_the_base_is_answered_as_by_peft(name, tmp_path):
    folders = {"a": trained(name, tmp_path / "a", 1), "b": trained(name, tmp_path / "b", 2, r=8)}
    server = with_adapters(name, **folders)
    prompts = {adapter: ids(20 + i, 10 + i) for i, adapter in enumerate(["a", "", "b"])}
    found = run(server, *(ask(f"r{adapter}", prompt, adapter=adapter or None) for adapter, prompt in prompts.items()))
    for adapter, prompt in prompts.items():
        expected = as_peft_says(name, folders.get(adapter), prompt)
        assert text(found[f"r{adapter}", 0]) == expected, adapter
    assert len({tuple(text(events)) for events in found.values()}) == 3


def test_an_adapter_reads_its_documents_for_itself_and_an_activated_one_takes_the_bases(tmp_path):
    plain = trained("qwen3", tmp_path / "plain", 1)
    activated = {n: trained("qwen3", tmp_path / f"al{n}", n, alora_invocation_tokens=INVOCATION) for n in (2, 3)}
    server = with_adapters("qwen3", plain=plain, al2=activated[2], al3=activated[3])
    document, question = ids(40, 5), (*ids(6, 6), *INVOCATION, 11)

    def asked(id, adapter):
        request = Request(id, (Span(document),), question, 8, adapter, GREEDY, logprobs=True)
        events = run(server, request)[id, 0]
        return events[0].read, text(events)

    assert asked("base", None)[0] == 0
    assert asked("plain", "plain")[0] == 0
    for n in (2, 3):
        read, out = asked(f"al{n}", f"al{n}")
        assert read == 40
        assert out == as_peft_says("qwen3", activated[n], [*document, *question])
    assert asked("again", "plain")[0] == 40
    assert len({tuple(asked(f"x{a}", a)[1]) for a in (None, "plain", "al2", "al3")}) == 4


def test_an_activated_adapter_that_is_not_invoked_does_nothing(tmp_path):
    folder = trained("qwen3", tmp_path / "a", 1, alora_invocation_tokens=INVOCATION)
    server = with_adapters("qwen3", a=folder)
    prompt = [id for id in ids(20, 1) if id not in INVOCATION]
    found = run(server, ask("with", prompt, adapter="a"), ask("without", prompt))
    assert text(found["with", 0]) == text(found["without", 0])


def test_an_adapter_loaded_anew_is_another(tmp_path):
    server = with_adapters("qwen3", a=trained("qwen3", tmp_path / "1", 1))
    document = ids(30, 1)
    first = run(server, ask("1", ids(4, 2), [document], adapter="a"))["1", 0]
    server.adapters.load("a", trained("qwen3", tmp_path / "2", 2))
    second = run(server, ask("2", ids(4, 2), [document], adapter="a"))["2", 0]
    assert [(event.read, event.version) for event in (first[0], second[0])] == [(0, 0), (0, 1)]
    assert text(second) == as_peft_says("qwen3", tmp_path / "2", [*document, *ids(4, 2)])


def test_an_adapter_that_cannot_be_served_is_told(tmp_path):
    server = with_adapters("qwen3")
    with pytest.raises(NotFound, match="no adapter 'x'"):
        server.submit(ask("1", ids(4, 1), adapter="x"))
    with pytest.raises(NotFound, match="adapter_config"):
        server.adapters.load("x", tmp_path)
    whole = trained("qwen3", tmp_path / "whole", 1, modules_to_save=("lm_head",))
    with pytest.raises(ModelError, match="merge it"):
        server.adapters.load("x", whole)
    assert server.adapters.names() == []
