"""Large answers reach slow readers whole, and those who leave early leave nothing behind."""

import hashlib
import os
import socket
import time

from ropewalk.server.transport import LARGE, Unlocked


class Behind:
    """A transport that notes what is left to it."""

    def __init__(self, waiting: int = 0, closing: bool = False) -> None:
        self.waiting, self.closing, self.written = waiting, closing, []

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return ours, theirs


def test_what_the_socket_does_not_take_is_left_to_the_loop():
    ours, theirs = pair()
    data = os.urandom(8_000_000)
    behind = Behind()
    with ours, theirs:
        Unlocked(behind, ours.fileno()).write(data)
        rest = b"".join(behind.written)
        sent = len(data) - len(rest)
        assert 0 < sent < len(data)
        received = b""
        while len(received) < sent:
            received += theirs.recv(1 << 20)
    assert received + rest == data


def test_small_pieces_and_pieces_behind_others_are_not_written_by_hand():
    ours, theirs = pair()
    with ours, theirs:
        for behind, size in ((Behind(), LARGE - 1), (Behind(waiting=1), LARGE), (Behind(closing=True), LARGE)):
            Unlocked(behind, ours.fileno()).write(bytes(size))
            assert [len(data) for data in behind.written] == [size]
        behind = Behind()
        lost = Unlocked(behind, ours.fileno())
        lost.lost()
        lost.write(bytes(LARGE))
        assert [len(data) for data in behind.written] == [LARGE]
        theirs.setblocking(False)
        assert not _readable(theirs)


def test_a_slow_reader_gets_every_byte(server):
    content = os.urandom(12_000_000)
    with server.http() as http:
        id = http.post("/v1/files", files={"file": ("a.bin", content)}).json()["id"]
        with http.stream("GET", f"/v1/files/{id}/content") as answer:
            digest = hashlib.sha256()
            for number, piece in enumerate(answer.iter_raw(), 1):
                digest.update(piece)
                if number % 20 == 0:
                    time.sleep(0.005)
    assert digest.digest() == hashlib.sha256(content).digest()


def test_a_reader_who_leaves_does_not_disturb_the_next(server):
    content = os.urandom(12_000_000)
    with server.http() as http:
        id = http.post("/v1/files", files={"file": ("a.bin", content)}).json()["id"]
        for _ in range(5):
            with http.stream("GET", f"/v1/files/{id}/content") as answer:
                next(answer.iter_raw())
        assert http.get(f"/v1/files/{id}/content").content == content


def _readable(end: socket.socket) -> bool:
    try:
        return bool(end.recv(1))
    except BlockingIOError:
        return False
