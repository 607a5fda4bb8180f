"""The bytes behind an address that a stranger gave: only from the public internet, only so many, only so long.

A name is resolved here, every address it has is looked at, and the connection goes to the address that was looked at: nobody can answer
with another one in between. Each redirect is an address like the first. No proxy of the environment is used, and no cookie is kept.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx

from ropewalk.errors import BadInput, DocumentError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_BYTES = 32_000_000
SECONDS = 30.0
REDIRECTS = 5
PORTS = (80, 443)
NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Fetched:
    """What lay there."""

    data: bytes
    media_type: str  # as the other server says
    name: str  # the last part of the path


def is_public(address: Address) -> bool:
    """Whether an address is of the public internet, and not of this machine, its network or its cloud."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


async def fetch(url: str, *, allowed: Callable[[Address], bool] = is_public, ports: tuple[int, ...] = PORTS) -> Fetched:
    """What lies at a URL; BadInput where it may not, or cannot, be fetched."""
    try:
        async with asyncio.timeout(SECONDS):
            async with httpx.AsyncClient(trust_env=False, timeout=SECONDS, follow_redirects=False) as client:
                for _ in range(REDIRECTS + 1):
                    found = await _get(client, url, allowed, ports)
                    if isinstance(found, Fetched):
                        return found
                    url = found
    except (TimeoutError, httpx.TimeoutException):
        raise _failed(url, f"it took more than {SECONDS:g} seconds") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        raise _failed(url, f"{type(error).__name__}") from error
    raise _failed(url, f"it redirects more than {REDIRECTS} times")


async def _get(
    client: httpx.AsyncClient, url: str, allowed: Callable[[Address], bool], ports: tuple[int, ...]
) -> Fetched | str:
    """The bytes, or where they have moved to."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https") or parts.username is not None or port not in ports:
        raise _failed(url, f"expected http or https, a host, no user, and port {' or '.join(map(str, ports))}")
    address = await _resolved(url, host, port, allowed)
    shown = f"[{address}]" if isinstance(address, ipaddress.IPv6Address) else str(address)
    target = f"{parts.scheme}://{shown}:{port}{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    headers = {"host": parts.netloc, "accept-encoding": "identity", "user-agent": "ropewalk"}
    async with client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as response:
        if response.is_redirect:
            return urljoin(url, response.headers["location"])
        if response.status_code != 200:
            raise _failed(url, f"it answers {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _failed(url, "it sends compressed bytes, though asked not to")
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > MAX_BYTES:
                raise _failed(url, f"it has more than {MAX_BYTES:,} bytes")
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        return Fetched(bytes(data), media_type, parts.path.rpartition("/")[2][:200])


async def _resolved(url: str, host: str, port: int, allowed: Callable[[Address], bool]) -> Address:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise _failed(url, "its host has no address") from None
    addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
    if not addresses or not all(allowed(address) for address in addresses):
        raise _failed(url, "its host is not on the public internet")
    return addresses[0]


def _failed(url: str, why: str) -> BadInput:
    return DocumentError(f"{url[:200]} cannot be fetched: {why}; upload the file and send its file_id", "url_not_fetched")
