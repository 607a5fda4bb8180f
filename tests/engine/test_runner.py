"""Several requests in one forward pass read what each would read alone; a segment read before is as good as one read now."""

import pytest
import torch
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_chunk_gated_delta_rule

from engine.architectures import ARCHITECTURES, VOCABULARY, make
from ropewalk.engine.cache import Reading
from ropewalk.engine.day0 import generated, through_engine
from ropewalk.engine.prefixes import pack, unpack
from ropewalk.engine.recurrent import _is_known
from ropewalk.engine.runner import Runner
from ropewalk.kernels.delta_rule import LONGEST, delta_rule

NEW = 12


def ids(count, seed):
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_requests_that_come_and_go_are_answered_as_by_generate(name):
    model = make(name)
    prompts = [ids(5, 1), ids(70, 2), ids(33, 3), ids(41, 4)]
    wanted = [generated(model, prompt, NEW) for prompt in prompts]
    out, logs = through_engine(Runner(model), prompts, NEW)
    assert out == [new for new, _ in wanted]
    for mine, (_, theirs) in zip(logs, wanted):
        torch.testing.assert_close(torch.stack(mine), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_segment_read_before_gives_the_very_logits_of_one_read_now(name):
    runner = Runner(make(name))
    first, second, question = ids(75, 1), ids(40, 2), ids(9, 3)

    cold = Reading.after(runner.layout, [])
    runner.forward([(cold, first[:60])])
    runner.forward([(cold, first[60:])])
    one = cold.close("one", first)
    runner.forward([(cold, second)])
    two = cold.close("two", second)
    expected = [runner.forward([(cold, question)]), runner.forward([(cold, [7])])]

    for _ in range(2):  # reading on does not change what was read
        warm = Reading.after(runner.layout, [one, two])
        assert warm.position == 115
        assert torch.equal(runner.forward([(warm, question)]), expected[0])
        assert torch.equal(runner.forward([(warm, [7])]), expected[1])

    half = Reading.after(runner.layout, [one])
    runner.forward([(half, second)])
    half.close("two", second)
    assert torch.equal(runner.forward([(half, question)]), expected[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_many_on_one_segment_read_what_each_would_alone(name):
    runner = Runner(make(name))
    reading = Reading.after(runner.layout, [])
    runner.forward([(reading, ids(64, 1))])
    segment = reading.close("doc", ids(64, 1))
    questions = [ids(n, 10 + n) for n in (1, 4, 17, 30)]
    alone = torch.cat([runner.forward([(Reading.after(runner.layout, [segment]), question)]) for question in questions])
    together = runner.forward([(Reading.after(runner.layout, [segment]), question) for question in questions])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_segment_comes_back_from_its_bytes_as_it_was(name):
    runner = Runner(make(name))
    reading = Reading.after(runner.layout, [])
    runner.forward([(reading, ids(50, 1))])
    segment = reading.close("doc", ids(50, 1))
    back = unpack(memoryview(bytearray(pack(segment))), "doc", runner.layout, torch.device("cpu"))
    assert back.nbytes == segment.nbytes
    there, here = (runner.forward([(Reading.after(runner.layout, [one]), ids(5, 2))]) for one in (back, segment))
    assert torch.equal(there, here)
    rounded = unpack(memoryview(bytearray(pack(segment, "int8"))), "doc", runner.layout, torch.device("cpu"))
    about = runner.forward([(Reading.after(runner.layout, [rounded]), ids(5, 2))])
    assert not torch.equal(about, here)
    assert (about.log_softmax(-1) - here.log_softmax(-1)).abs().max() < 0.5


def test_a_segment_knows_its_size():
    runner = Runner(make("qwen3"))
    reading = Reading.after(runner.layout, [])
    runner.forward([(reading, ids(10, 1))])
    # 4 layers x keys and values x 2 heads x 10 ids x 16 numbers x 4 bytes
    assert reading.close("doc", ids(10, 1)).nbytes == 4 * 2 * 2 * 10 * 16 * 4


def test_a_question_goes_through_the_short_delta_rule_and_a_document_through_the_models_own(monkeypatch):
    lengths = []

    def seen(query, *rest):
        lengths.append(query.shape[1])
        return delta_rule(query, *rest)

    runner = Runner(make("qwen3_5_moe"))
    monkeypatch.setattr("ropewalk.engine.recurrent.delta_rule", seen)
    reading = Reading.after(runner.layout, [])
    runner.forward([(reading, ids(LONGEST + 1, 1))])
    assert lengths == []
    runner.forward([(reading, ids(9, 2))])
    layers = sum(kind == "recurrent" for kind in runner.layout.kinds)
    assert lengths == [9] * layers
    assert layers


def test_a_rule_that_computes_something_else_is_not_taken_for_the_known_one():
    def half(query, key, value, g, beta, initial_state=None, **more):
        return tuple(found / 2 for found in delta_rule(query, key, value, g, beta, initial_state, True))

    def strict(query, key, value, g, beta, initial_state=None, **more):
        raise ValueError("tensors must be on a GPU")

    assert _is_known(torch_chunk_gated_delta_rule)
    assert not _is_known(half)
    assert not _is_known(strict)
