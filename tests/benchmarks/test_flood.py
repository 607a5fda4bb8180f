"""What the fuzzer counts, against servers that misbehave in known ways."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import strategies as st

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@contextmanager
def answering(*answers: bytes) -> Iterator[int]:
    """A server that reads a request and writes these in turn, over and over; b"" closes without an answer."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            count = 0
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    if not connection.recv(65536):
                        return  # the test is over
                    connection.sendall(answers[count % len(answers)])
                count += 1

        thread = threading.Thread(target=serve)
        thread.start()
        port = listening.getsockname()[1]
        yield port
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join()


def test_an_answer_in_the_500s_is_an_error_and_no_answer_is_counted_apart():
    from flood import Flood, raw
    from hostile import Hostile

    with answering(b"HTTP/1.1 500 Oh\r\n\r\n", b"HTTP/1.1 404 No\r\n\r\n", b"HTTP/1.1 200 Yes\r\n\r\n", b"") as port:
        flood = Flood(port, seed_value=1)
        sent = flood.pour(st.binary(min_size=1).map(lambda body: Hostile((b"GET / HTTP/1.1\r\n\r\n", body))), 40, raw("x"))
        flood.pool.shutdown()
    tally = flood.tally
    assert (sent, tally.requests) == (40, 40)
    assert len(tally.errors) == tally.statuses["x", 500] == 10
    assert (tally.statuses["x", 404], tally.statuses["x", 200], tally.unanswered["x"]) == (10, 10, 10)
    assert tally.errors[0].startswith("x: 500 to b'GET / HTTP/1.1")


def test_an_answer_that_never_comes_is_told(monkeypatch):
    import flood as module
    from hostile import Hostile

    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        flood = module.Flood(silent.getsockname()[1], seed_value=1)
        flood.pour(st.just(Hostile((b"GET / HTTP/1.1\r\n\r\n",))), 2, module.raw("x"))
        flood.pool.shutdown()
    assert len(flood.tally.hung) == 2
    assert flood.tally.errors == []


def test_a_mistake_of_our_own_is_not_taken_for_the_servers():
    from flood import Flood

    def mistaken(flood: Flood, example: int) -> None:
        raise ZeroDivisionError

    flood = Flood(1, seed_value=1)
    with pytest.raises(ZeroDivisionError):
        flood.pour(st.integers(), 10, mistaken)
    flood.pool.shutdown()


def test_the_same_seed_makes_the_same_requests():
    from flood import Flood
    from hostile import uploads

    seen: list[list[bytes]] = []
    for _ in range(2):
        flood, made = Flood(1, seed_value=3), []
        flood.pool.shutdown()
        flood.pool = _AtOnce()
        flood.pour(
            uploads([(b"/v1/files", b"x-api-key: key")]),
            20,
            lambda flood, request, made=made: made.append(b"".join(request.pieces)),
        )
        seen.append(made)
    assert len(seen[0]) == 20
    assert seen[0] == seen[1]


class _AtOnce:
    def submit(self, function, *arguments):
        function(*arguments)
