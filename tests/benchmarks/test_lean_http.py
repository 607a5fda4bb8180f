"""The benchmark's own HTTP client: what it sends is a form, what it receives is whole, in whatever pieces it comes."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
try:
    from peers.lean_http import BOUNDARY, Connection
finally:
    sys.path.pop(0)


@pytest.fixture
def served():
    """A server that answers one request with given pieces, and keeps what it was sent."""
    listener = socket.create_server(("127.0.0.1", 0))
    received: list[bytes] = []

    def serve(pieces: list[bytes], expected: int) -> Connection:
        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                data = b""
                while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < expected:
                    data += connection.recv(1 << 16)
                received.append(data)
                for piece in pieces:
                    connection.sendall(piece)

        thread = threading.Thread(target=answer)
        thread.start()
        threads.append(thread)
        connections.append(Connection(listener.getsockname()[1], {"x-api-key": "k"}))
        return connections[-1]

    threads: list[threading.Thread] = []
    connections: list[Connection] = []
    yield serve, received
    for thread in threads:
        thread.join(10)
    for connection in connections:
        connection.close()
    listener.close()


@pytest.mark.parametrize("cut", [1, 7, 1000])
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    ],
    ids=["length", "chunks"],
)
def test_an_answer_is_whole_however_it_is_cut(served, answer, cut):
    serve, _ = served
    found = serve([answer[at : at + cut] for at in range(0, len(answer), cut)], 0).ask("GET", "/a")
    assert (found.status, bytes(found.body)) == (200, b"hello")


def test_a_file_goes_out_as_a_form(served, tmp_path):
    serve, received = served
    file = tmp_path / "a.bin"
    file.write_bytes(bytes(range(256)) * 1000)
    body = (
        f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nany\r\n'
        f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="a.bin"\r\n'
        "content-type: application/octet-stream\r\n\r\n"
    ).encode()
    body += file.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()
    connection = serve([b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"], len(body))
    assert connection.upload("/v1/files", file, {"purpose": "any"}).json() == {}
    head, _, sent = received[0].partition(b"\r\n\r\n")
    assert sent == body
    assert f"content-length: {len(body)}".encode() in head
    assert b"x-api-key: k" in head


def test_a_connection_that_closes_early_is_no_answer(served):
    serve, _ = served
    with pytest.raises(ConnectionError):
        serve([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe"], 0).ask("GET", "/a")


def test_what_nobody_keeps_takes_no_room(served):
    serve, _ = served
    small = bytearray(4)
    found = serve([b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", b"abcdefgh", b"ij"], 0).ask("GET", "/a", into=small)
    assert found.status == 200
    assert set(small) <= set(b"abcdefghij")
