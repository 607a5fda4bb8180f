"""Everybody's requests together are answered as each alone, and what was read once is not read again."""

import pytest
import torch

from engine.architectures import ARCHITECTURES, VOCABULARY, make
from ropewalk.engine.engine import Engine
from ropewalk.engine.prefixes import Prefixes
from ropewalk.engine.request import Keep, Request, Sampling, Span
from ropewalk.engine.runner import Runner
from ropewalk.engine.scheduler import Limits
from ropewalk.errors import BadInput, Overloaded

GREEDY = Sampling(temperature=0)


def ids(count, seed):
    return tuple(torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def prefixes(runner, **more):
    return Prefixes(runner.layout, "test", **{"memory_bytes": 1 << 30} | more)


def engine(name="qwen3", limits=Limits(), **more):  # noqa: B008
    runner = Runner(make(name))
    return Engine(runner, prefixes(runner, **more), limits=limits)


def ask(id, tail, prefix=(), max_tokens=8, **more):
    return Request(id, tuple(Span(span) for span in prefix), tuple(tail), max_tokens, **{"sampling": GREEDY} | more)


def run(engine, *requests):
    """Events by request and sample, after all are done."""
    for request in requests:
        engine.submit(request)
    return drain(engine)


def drain(engine, steps=500):
    found = {}
    for _ in range(steps):
        if not engine.busy:
            return found
        for event in engine.step():
            found.setdefault((event.id, event.sample), []).append(event)
    raise AssertionError("the engine does not come to an end")


def text(events):
    return [id for event in events for id in event.ids]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_crowd_is_answered_as_each_alone(name):
    documents = [ids(50, 1), ids(33, 2)]
    requests = [
        ask("a", ids(7, 3), documents[:1]),
        ask("b", ids(40, 4), documents),
        ask("c", ids(3, 5)),
        ask("d", ids(9, 6), documents[:1]),
    ]
    alone = {request.id: text(run(engine(name), request)[request.id, 0]) for request in requests}
    crowd = engine(name, Limits(chunk=16))
    found = {}
    for request in requests:
        crowd.submit(request)
        for event in crowd.step():
            found.setdefault((event.id, 0), []).append(event)
    for key, events in drain(crowd).items():
        found.setdefault(key, []).extend(events)
    assert {id: text(events) for (id, _), events in found.items()} == alone


def test_what_was_read_is_told_and_not_read_again():
    server = engine()
    document, other = ids(50, 1), ids(20, 2)
    told = [
        run(server, ask("1", ids(5, 3), [document]))["1", 0][0],
        run(server, ask("2", ids(6, 4), [document]))["2", 0][0],
        run(server, ask("3", ids(6, 4), [document, other]))["3", 0][0],
        run(server, ask("4", ids(6, 4), [other, document]))["4", 0][0],
        run(server, ask("5", ids(6, 4), [document], scope="another"))["5", 0][0],
    ]
    assert [(event.read, event.created) for event in told] == [(0, 50), (50, 0), (50, 20), (0, 70), (0, 50)]


def test_two_who_need_the_same_document_read_it_once():
    server = engine(limits=Limits(chunk=16))
    found = run(server, *(ask(str(i), ids(5, i), [ids(64, 9)]) for i in range(4)))
    assert sorted((events[0].read, events[0].created) for events in found.values()) == [(0, 64), (64, 0), (64, 0), (64, 0)]


def test_a_warm_answer_is_the_cold_one():
    document, question = ids(64, 1), ids(9, 2)
    server = engine("gemma4")
    cold = run(server, ask("cold", question, [document], logprobs=True))["cold", 0]
    warm = run(server, ask("warm", question, [document], logprobs=True))["warm", 0]
    assert [event.logprobs for event in warm] == [event.logprobs for event in cold]
    assert (warm[0].read, cold[0].read) == (64, 0)


def test_reading_ahead_answers_nothing_and_makes_the_first_question_warm():
    server = engine()
    (event,) = run(server, ask("warm", (), [ids(50, 1)], max_tokens=0))["warm", 0]
    assert (event.ids, event.finish, event.created) == ((), "length", 50)
    assert run(server, ask("q", ids(5, 2), [ids(50, 1)]))["q", 0][0].read == 50


def test_samples_of_one_prompt_are_read_once_and_drawn_apart():
    server = engine()
    hot = Sampling(temperature=1.0, seed=7)
    found = run(server, ask("g", ids(30, 1), samples=6, sampling=hot, max_tokens=12, logprobs=True))
    assert sorted(sample for _, sample in found) == list(range(6))
    assert len({tuple(text(events)) for events in found.values()}) == 6
    again = run(engine(), ask("g2", ids(30, 1), samples=6, sampling=hot, max_tokens=12))
    assert {sample: text(events) for (_, sample), events in again.items()} == {s: text(e) for (_, s), e in found.items()}


def test_samples_of_one_prompt_may_differ_in_length():
    server, hot = engine(), Sampling(temperature=1.0, seed=7)
    alike = run(server, ask("g", ids(30, 1), samples=3, sampling=hot, max_tokens=9))
    found = run(server, ask("h", ids(30, 1), samples=3, sampling=hot, max_tokens=9, lengths=(2, 9, 1)))
    assert [text(found["h", n]) for n in range(3)] == [text(alike["g", n])[:count] for n, count in enumerate((2, 9, 1))]
    for wrong in ((2, 9), (2, 9, 0), (2, 10, 1)):
        with pytest.raises(BadInput, match="one for each sample"):
            server.submit(ask("i", ids(30, 1), samples=3, max_tokens=9, lengths=wrong))


def test_log_probabilities_at_the_temperature_of_sampling_are_told_where_asked_for():
    server, prompt = engine(), ids(30, 1)
    one = ask("g", prompt, sampling=Sampling(temperature=0.5, seed=1, top_k=20), logprobs=True, tempered=True)
    events = run(server, one)["g", 0]
    out = text(events)
    logits = make("qwen3")(torch.tensor([[*prompt, *out]])).logits[0].detach()
    expected = [float((logits[len(prompt) - 1 + i] / 0.5).log_softmax(-1)[id]) for i, id in enumerate(out)]
    assert [lp for event in events for lp in event.logprobs] == pytest.approx(expected, abs=2e-5)


def test_pages_go_back_when_requests_end_and_long_replies_take_several(monkeypatch):
    for module in ("pages", "crowd"):
        monkeypatch.setattr(f"ropewalk.engine.{module}.PAGE", 8)
    server = engine("gpt_oss")
    alone = text(run(server, ask("alone", ids(9, 1), max_tokens=60))["alone", 0])
    found = run(server, *(ask(str(n), ids(9, n), max_tokens=length) for n, length in enumerate((4, 60, 30, 50, 2))))
    assert text(found["1", 0]) == alone
    run(server, ask("last", ids(9, 4), max_tokens=2))
    assert [len(pool) for pool in server.runner._pages.pools] == [2, 2]  # 10 ids, those of a single request


def test_log_probabilities_are_those_of_the_model():
    server = engine()
    prompt = ids(30, 1)
    events = run(server, ask("g", prompt, sampling=Sampling(temperature=0.5, seed=1), logprobs=True))["g", 0]
    out = text(events)
    logits = make("qwen3")(torch.tensor([[*prompt, *out]])).logits[0].detach().log_softmax(-1)
    expected = [float(logits[len(prompt) - 1 + i, id]) for i, id in enumerate(out)]
    assert [lp for event in events for lp in event.logprobs] == pytest.approx(expected, abs=1e-5)


def test_an_id_to_stop_at_ends_the_reply():
    plain = text(run(engine(), ask("a", ids(9, 1)))["a", 0])
    events = run(engine(), ask("a", ids(9, 1), stop_ids=(plain[2],)))["a", 0]
    assert text(events) == plain[:3]
    assert (events[-1].finish, run(engine(), ask("a", ids(9, 1)))["a", 0][-1].finish) == ("stop", "length")


def test_a_cancelled_sample_leaves_the_others():
    server, hot = engine(), Sampling(temperature=1.0, seed=7)
    alone = run(engine(), ask("g", ids(30, 1), samples=3, sampling=hot))
    server.submit(ask("g", ids(30, 1), samples=3, sampling=hot))
    begun = [event for _ in range(3) for event in server.step()]
    server.cancel("g", 0)
    found = drain(server)
    assert found["g", 0][-1].finish == "cancelled"
    for sample in (1, 2):
        first = [event for event in begun if event.sample == sample]
        assert text([*first, *found["g", sample]]) == text(alone["g", sample])


def test_a_cancelled_request_ends_at_once_and_frees_its_place():
    server = engine(limits=Limits(chunk=8))
    server.submit(ask("long", ids(5, 1), [ids(64, 2)]))
    server.submit(ask("same", ids(5, 3), [ids(64, 2)]))
    server.step()
    server.cancel("long")
    found = drain(server)
    assert found["long", 0][-1].finish == "cancelled"
    assert len(text(found["same", 0])) == 8  # it reads on by itself
    server.cancel("long")  # nothing happens
    assert not server.busy


def test_more_than_may_wait_are_refused():
    server = engine(limits=Limits(waiting=3))
    for i in range(3):
        server.submit(ask(str(i), ids(5, 1)))
    with pytest.raises(Overloaded):
        server.submit(ask("4", ids(5, 1)))
    assert len(drain(server)) == 3
    server.submit(ask("4", ids(5, 1)))


def test_a_prompt_longer_than_the_model_reads_is_refused():
    server = engine()
    server.longest = 20
    with pytest.raises(BadInput, match="20 tokens"):
        server.submit(ask("a", ids(20, 1)))
    assert len(text(run(server, ask("b", ids(15, 1), max_tokens=50))["b", 0])) == 5


def test_a_long_prompt_holds_nobody_up():
    server = engine(limits=Limits(chunk=16))
    server.submit(ask("short", ids(4, 1), max_tokens=20))
    server.step()
    server.submit(ask("long", ids(4, 2), [ids(400, 3)]))
    assert all([event.id for event in server.step()] == ["short"] for _ in range(19))


def test_a_scope_with_many_requests_waits_for_itself():
    server = engine(limits=Limits(running=2))
    for i in range(6):
        server.submit(ask(f"many{i}", ids(4, i), scope="many"))
    server.submit(ask("one", ids(4, 9), scope="one"))
    done = [event.id for _ in range(40) for event in server.step() if event.finish]
    assert done.index("one") <= 2


def test_what_leaves_memory_is_found_on_disk_also_after_a_restart(tmp_path):
    def keep(name):
        return Keep(str(tmp_path / "segments" / name), b"k" * 32)

    def request(id, number):
        return Request(id, (Span(ids(64, number), keep(str(number))),), ids(5, 99), 4, sampling=GREEDY, logprobs=True)

    small = {"memory_bytes": 3 * 4 * 2 * 2 * 64 * 16 * 4, "disk_bytes": 1 << 30, "folder": tmp_path / "segments"}
    server = engine(**small)
    first = {n: run(server, request(f"a{n}", n))[f"a{n}", 0] for n in range(10)}
    server.prefixes.flush()
    assert server.prefixes.memory_used <= small["memory_bytes"]
    for other in (server, engine(**small)):
        for n in range(10):
            events = run(other, request(f"b{n}", n))[f"b{n}", 0]
            assert events[0].read == 64
            assert [e.logprobs for e in events] == [e.logprobs for e in first[n]]
        assert other.prefixes.counts.disk_hits >= 7


@pytest.mark.parametrize("name", ["gemma4", "qwen3_5_moe", "gpt_oss"])
def test_every_kind_of_layer_comes_back_from_disk(name, tmp_path):
    folder = {"disk_bytes": 1 << 30, "folder": tmp_path}
    request = Request(
        "a", (Span(ids(64, 1), Keep(str(tmp_path / "s"), b"k" * 32)),), ids(5, 2), 4, sampling=GREEDY, logprobs=True
    )
    server = engine(name, **folder)
    cold = run(server, request)["a", 0]
    server.prefixes.flush()
    again = engine(name, **folder)
    warm = run(again, request)["a", 0]
    assert (warm[0].read, again.prefixes.counts.disk_hits) == (64, 1)
    assert [e.logprobs for e in warm] == [e.logprobs for e in cold]


def test_a_damaged_file_is_a_miss_and_is_read_anew(tmp_path):
    path = tmp_path / "s"
    request = Request("a", (Span(ids(64, 1), Keep(str(path), b"k" * 32)),), ids(5, 2), 4, sampling=GREEDY)
    folder = {"disk_bytes": 1 << 30, "folder": tmp_path}
    server = engine(**folder)
    cold = text(run(server, request)["a", 0])
    server.prefixes.flush()
    whole = path.read_bytes()
    assert bytes(8) not in whole[:4096]  # sealed
    for damaged in (whole[:-1], whole[:100], b"", whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]):
        path.write_bytes(damaged)
        again = engine(**folder)
        events = run(again, request)["a", 0]
        assert (text(events), events[0].read, events[0].created) == (cold, 0, 64)
        again.prefixes.flush()
        assert len(path.read_bytes()) == len(whole)
    other = Request("b", (Span(ids(64, 1), Keep(str(path), b"x" * 32)),), ids(5, 2), 4, sampling=GREEDY)
    assert run(engine(**folder), other)["b", 0][0].read == 0  # another key opens nothing


def test_what_is_forgotten_is_gone_with_all_that_was_read_after_it(tmp_path):
    server = engine(disk_bytes=1 << 30, folder=tmp_path)
    one, two = Keep(str(tmp_path / "1"), b"k" * 32), Keep(str(tmp_path / "2"), b"k" * 32)
    both = (Span(ids(30, 1), one), Span(ids(30, 2), two))
    run(server, Request("a", both, ids(3, 3), 1))
    server.prefixes.forget([one.path])
    assert list(tmp_path.iterdir()) == []
    assert run(server, Request("b", both, ids(3, 3), 1))["b", 0][0].read == 0


def test_names_that_nothing_came_of_are_let_go_of_and_the_forgetting_still_finds_what_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.engine.prefixes.NAMES", 50)
    server = engine(disk_bytes=1 << 30, folder=tmp_path)
    one, two = Keep(str(tmp_path / "1"), b"k" * 32), Keep(str(tmp_path / "2"), b"k" * 32)
    both = (Span(ids(30, 1), one), Span(ids(30, 2), two))
    run(server, Request("a", both, ids(3, 3), 1))
    for number in range(1000):
        server.prefixes.key("", "", "", [number])
    assert len(server.prefixes._parents) <= 50
    server.prefixes.forget([one.path])
    assert list(tmp_path.iterdir()) == []
    assert run(server, Request("b", both, ids(3, 3), 1))["b", 0][0].read == 0


def test_a_full_disk_budget_drops_what_was_used_least_recently(tmp_path):
    server = engine(disk_bytes=100_000, folder=tmp_path, memory_bytes=1)
    for n in range(4):  # about 66 kB each
        run(server, Request(str(n), (Span(ids(64, n), Keep(str(tmp_path / str(n)), b"k" * 32)),), ids(3, 9), 1))
    server.prefixes.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3"]


def test_int8_on_disk_is_smaller_and_close(tmp_path):
    sizes, logs = [], []
    for disk_format in ("exact", "int8"):
        folder = tmp_path / disk_format
        request = Request(
            "a", (Span(ids(256, 1), Keep(str(folder / "s"), b"k" * 32)),), ids(5, 2), 1, sampling=GREEDY, logprobs=True
        )
        server = engine(disk_bytes=1 << 30, folder=folder, disk_format=disk_format)
        run(server, request)
        server.prefixes.flush()
        sizes.append((folder / "s").stat().st_size)
        warm = run(engine(disk_bytes=1 << 30, folder=folder, disk_format=disk_format), request)["a", 0]
        assert warm[0].read == 256
        logs.append(warm[0].logprobs[0])
    assert sizes[1] < 0.4 * sizes[0]  # float32 -> 8 bits and a scale per 16 numbers
    assert logs[1] == pytest.approx(logs[0], abs=0.02)
