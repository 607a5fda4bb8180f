"""Sends what hypothesis makes to a server, over a few connections at once, and counts what comes back."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from hostile import Hostile
from measure import PAGE, descendants

CONNECTIONS = 4
ANSWER_SECONDS = 60.0  # an answer that has not come by then will not come


@dataclass
class Tally:
    """What came back."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)  # the connection was closed without an answer, by them or by us
    hung: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # answers in the 500s
    untrue: Counter[str] = field(default_factory=Counter)  # answers that are not what the server's own document says
    broken: list[BaseException] = field(default_factory=list)  # our own mistakes

    @property
    def requests(self) -> int:
        return self.statuses.total() + self.unanswered.total() + len(self.hung)


class Flood:
    """A few connections, a tally, and a seed that moves on with every pour."""

    def __init__(self, port: int, seed_value: int) -> None:
        self.port, self.seed, self.tally = port, seed_value, Tally()
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(CONNECTIONS)

    def pour(self, strategy: st.SearchStrategy[Any], count: int, send: Callable[[Flood, Any], None]) -> int:
        """Sends `count` examples of the strategy and waits for the last answer; none where the strategy can make none."""
        room = threading.BoundedSemaphore(2 * CONNECTIONS)

        def sent(example: Any) -> None:
            try:
                send(self, example)
            except BaseException as error:
                self.tally.broken.append(error)
            finally:
                room.release()

        left = count
        while left > 0 and not self.tally.broken:

            @seed(self.seed)
            @settings(
                max_examples=left,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(strategy)
            def each(example: Any) -> None:
                nonlocal made
                made += 1
                room.acquire()
                self.pool.submit(sent, example)

            made = 0
            try:
                each()
            except Unsatisfiable:
                break
            self.seed += 1
            left -= made  # hypothesis stops early where it has seen everything
        for _ in range(2 * CONNECTIONS):
            room.acquire()
        if self.tally.broken:
            raise self.tally.broken[0]
        return count - left

    def count(self, kind: str, status: int | None, shown: object) -> None:
        """One answer, or none."""
        with self.lock:
            if status is None:
                self.tally.unanswered[kind] += 1
                return
            self.tally.statuses[kind, status] += 1
            if status >= 500:
                self.tally.errors.append(f"{kind}: {status} to {shown}")

    def hang(self, kind: str, shown: object) -> None:
        with self.lock:
            self.tally.hung.append(f"{kind}: no answer within {ANSWER_SECONDS:.0f} s to {shown}")

    def disagree(self, what: str) -> None:
        with self.lock:
            self.tally.untrue[what] += 1


def raw(kind: str) -> Callable[[Flood, Hostile], None]:
    """Writes a request to a socket of its own, and reads how the answer begins."""

    def send(flood: Flood, request: Hostile) -> None:
        try:
            flood.count(kind, _exchange(flood.port, request), request)
        except TimeoutError:
            flood.hang(kind, request)

    return send


def stall(flood: Flood, secret: bytes) -> None:
    """An upload that promises much, sends a little and stays connected: to be answered, not waited for."""
    head = b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\nx-api-key: " + secret
    form = b"content-length: 100000000\r\ncontent-type: multipart/form-data; boundary=b\r\n\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nthe beginning'
    raw("stalled")(flood, Hostile((head + b"\r\n" + form + part,)))


def memory(process_id: int) -> int:
    """Resident bytes of a server and its children, once it has come to rest."""
    time.sleep(1.0)
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in descendants(process_id))


def _exchange(port: int, request: Hostile) -> int | None:
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A server that has refused may close before all is sent; its answer is read all the same.
        with contextlib.suppress(OSError):
            for piece in request.pieces:
                connection.sendall(piece)
                if request.pause:
                    time.sleep(request.pause)
            if request.hang_up:
                return None
            if request.ends:
                connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while b"\r\n" not in answer and (more := connection.recv(4096)):
                answer += more
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else None
