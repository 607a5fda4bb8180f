"""Addresses that strangers give: only the public internet is reached, and never by a detour."""

import asyncio
import ipaddress
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ropewalk.errors import DocumentError
from ropewalk.files import fetch as fetching
from ropewalk.files.fetch import fetch, is_public


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
    ],
)
def test_no_address_of_this_machine_or_its_network_is_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(ipaddress.ip_address(address))


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        moved = {
            "/moved": "/paper",
            "/inside": "http://169.254.169.254/latest",
            "/round": "/round",
            "/file": "file:///etc/passwd",
        }
        if self.path in moved:
            self.send_response(302)
            self.send_header("location", moved[self.path])
            self.send_header("content-length", "0")
            self.end_headers()
            return
        body = {"/paper": b"# Paper", "/large": b"x" * 3000, "/zipped": b"x"}.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("content-type", "text/markdown; charset=utf-8")
        self.send_header("content-length", str(len(body or b"")))
        if self.path == "/zipped":
            self.send_header("content-encoding", "gzip")
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str) -> fetching.Fetched:
    """As from a site of the internet: only this machine's own address is let through."""

    def local(address: fetching.Address) -> bool:
        return str(address) == "127.0.0.1"

    return asyncio.run(fetch(f"http://localhost:{port}{path}", allowed=local, ports=(port, 80)))


def test_what_lies_at_an_address_is_fetched_also_where_it_has_moved(site, monkeypatch):
    only_ipv4(monkeypatch)
    for path in ("/paper", "/moved"):
        assert get(site, path) == fetching.Fetched(b"# Paper", "text/markdown", "paper")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none", "it answers 404"),
        ("/inside", "its host is not on the public internet"),
        ("/round", "it redirects more than 5 times"),
        ("/file", "expected http or https"),
        ("/large", "it has more than 2,000 bytes"),
        ("/zipped", "it sends compressed bytes"),
    ],
)
def test_what_cannot_be_fetched_is_told(site, monkeypatch, path, message):
    only_ipv4(monkeypatch)
    monkeypatch.setattr(fetching, "MAX_BYTES", 2000)
    with pytest.raises(DocumentError, match=message):
        get(site, path)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://user@1.1.1.1/",
        "http://1.1.1.1:22/",
        "ftp://1.1.1.1/",
        "http://[::ffff:127.0.0.1]/",
        "http:///x",
        "http://[/",
        "http://1.1.1.1:99999/",
    ],
)
def test_nothing_inside_is_reached(url):
    with pytest.raises(DocumentError, match="cannot be fetched"):
        asyncio.run(fetch(url))


def only_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's site listens on one address only."""
    plain = fetching._resolved

    async def resolved(url, host, port, allowed):
        return await plain(url, "127.0.0.1" if host == "localhost" else host, port, allowed)

    monkeypatch.setattr(fetching, "_resolved", resolved)
