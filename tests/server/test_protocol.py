"""What comes before a body is bounded, in time and in bytes; whoever keeps within the bounds notices nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ropewalk.server import protocol

PIECE = b"x" * 16_384


@contextmanager
def connected(server) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


def pushed(connection: socket.socket, most: int) -> int:
    """How many bytes the server takes before it closes the connection, `most` at the most."""
    sent = 0
    try:
        while sent < most:
            sent += connection.send(PIECE)
    except (ConnectionResetError, BrokenPipeError):
        pass
    return sent


def received(connection: socket.socket) -> bytes:
    answer = b""
    try:
        while piece := connection.recv(65_536):
            answer += piece
    except ConnectionResetError:
        pass
    return answer


def test_headers_that_are_too_large_are_refused_in_the_shape_of_all_errors(server):
    with connected(server) as connection:
        connection.sendall(b"GET /v1/files HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * (protocol.HEAD_BYTES + 1))
        answer = received(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    shown = json.loads(body)
    assert (shown["type"], shown["error"]["type"]) == ("error", "invalid_request_error")
    assert f"request-id: {shown['request_id']}".encode() in head


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n",
        b"GET / HTTP/1.1\r\nx: ",
        b"POST /v1/files HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;",
        b"POST /v1/files HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx: ",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /",
    ],
    ids=["path", "header-name", "header", "chunk-extension", "trailer", "second-request"],
)
def test_what_never_ends_is_cut_off(server, beginning):
    with connected(server) as connection:
        connection.sendall(beginning)
        # Buffers of the kernel take some megabytes that the server never reads.
        assert pushed(connection, 64 << 20) < 32 << 20


@pytest.mark.parametrize("beginning", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nhost: loc"], ids=["nothing", "a-line", "half"])
def test_a_head_that_does_not_end_is_not_waited_for(server, monkeypatch, beginning):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    with connected(server) as connection:
        connection.sendall(beginning)
        begun = time.monotonic()
        assert received(connection) == b""
    assert time.monotonic() - begun < 10


def test_a_head_that_is_slow_but_ends_in_time_is_answered(server):
    with connected(server) as connection:
        for piece in (b"GET /health HT", b"TP/1.1\r\nho", b"st: localhost\r\nconnection: close\r\n", b"\r\n"):
            connection.sendall(piece)
            time.sleep(0.05)
        assert received(connection).startswith(b"HTTP/1.1 200 ")


def test_requests_one_after_the_other_on_one_connection_are_answered(server, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    with server.http() as client:
        for _ in range(3):
            assert client.get("/health").status_code == 200
            time.sleep(0.4)  # longer than a head may take: between two requests another wait counts


def test_a_body_may_take_longer_than_a_head(server, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"x" * (2 * protocol.HEAD_BYTES) + b"\r\n--b--\r\n"
    head = f"POST /v1/files HTTP/1.1\r\nhost: localhost\r\nx-api-key: {server.key}\r\nconnection: close\r\n"
    head += f"content-type: multipart/form-data; boundary=b\r\ncontent-length: {len(body)}\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(head.encode())
        for start in range(0, len(body), 40_000):
            time.sleep(0.15)
            connection.sendall(body[start : start + 40_000])
        assert received(connection).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_was_answered_is_not_read_for_ever(server, monkeypatch):
    monkeypatch.setattr(protocol, "DISCARD_SECONDS", 0.3)
    with connected(server) as connection:
        connection.sendall(b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
        with pytest.raises(ConnectionError):
            trickle(connection, 400)


def trickle(connection: socket.socket, count: int) -> None:
    for _ in range(count):
        connection.sendall(b"x")
        time.sleep(0.02)


def test_the_rest_of_a_body_that_was_answered_may_take_longer_than_a_head(server, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    with connected(server) as connection:
        connection.sendall(b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
        for _ in range(10):
            time.sleep(0.05)
            connection.sendall(b"x" * 100)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_what_is_no_request_is_answered_in_the_shape_of_all_errors(server):
    with connected(server) as connection:
        connection.sendall(b"nothing of the kind\r\n\r\n")
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert f"request-id: {json.loads(body)['request_id']}" in head.decode()
