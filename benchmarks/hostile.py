"""Requests that nobody should send, as hypothesis strategies: raw bytes in pieces, pauses between them, every field possibly wrong."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

BOUNDARY = b"----aB0'()+_,-./:=?"

NASTY_NAMES = [
    "",
    "\x00",
    "..",
    "../../etc/passwd",
    "..\\..\\boot.ini",
    "a" * 255,
    "a" * 256,
    "é" * 255,
    "\u202etxt.exe",
    "%2e%2e%2f",
    "CON",
]
NASTY_NAMES += [
    "\ufeff",
    "a\r\nset-cookie: x=1",
    "\"; filename*=utf-8''x",
    "\U0001f4a9" * 100,
    "\ud7ff\ue000",
    "a\u0301" * 90,
    "' OR 1=1 --",
]
NASTY_NUMBERS = [*b"-1 0 +5 1e3 0x10 NaN Infinity 1.5 \xd9\xa3 1_000 3600".split(), b"", b" 7 ", b"9" * 400, b"9" * 5000]
HEADER_NAMES = (
    b"anthropic-version anthropic-beta anthropic-workspace-id anthropic-user-id authorization x-api-key range if-range if-none-match accept "
    b"content-encoding cookie x-stainless-retry-count x-ropewalk-extensions x-ropewalk-tags origin tus-resumable upload-length upload-offset "
    b"upload-metadata upload-checksum x-http-method-override expect x-request-id host if-match if-modified-since sec-fetch-site hx-request "
    b"x-csrf-token accept-encoding accept-language connection upgrade forwarded x-forwarded-proto x-forwarded-host te content-type"
).split()
HEADER_VALUES = b'gzip bytes=0-0 bytes=-1 bytes=9-1 bytes=0-1,4-5 Bearer * " 1.0.0 true null 100-continue files-api-2025-04-14 2023-06-01'.split()
HEADER_VALUES += [
    b"deflate, br",
    b"bytes=" + b"0-," * 300,
    b"Basic Og==",
    b'W/"x", "y"',
    b"filename ZmlsZQ==",
    b"filename \xff,,a b c",
    b"sha1 x",
]
QUERY_NAMES = b"limit page ids[] ids%5B%5D after_id before_id lifecycle[] tag beta scope_id q".split()
QUERY_VALUES = [b"page_", b"page_AAAA", b"page_" + b"A" * 4000, b"file_x", b"&", b"="]
METHODS = [b"GET"] * 4 + [b"POST"] * 3 + b"DELETE PATCH PUT HEAD OPTIONS TRACE BREW".split()
MEDIA = [
    b"application/json",
    b"application/json; charset=utf-16",
    b"application/x-www-form-urlencoded",
    b"application/offset+octet-stream",
]
JSON_NAMES = "name ids limit_bytes limit_files rights tags workspace_id user_id expires_at downloads status requests_per_minute x".split()
BROKEN_JSON = [
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b'{"name":"\\ud800"}',
    b'{"name":"\\u0000"}',
    b"1" + b"0" * 5000,
]
BROKEN_JSON += [b"\xef\xbb\xbf{}", b'{"limit_bytes":1e400}', b'{"limit_bytes":99999999999999999999999}', b'{"ids":["\\u0000"]}']

HEADER_VALUES += [b"y" * 5_000, b"y" * 100_000, b"http://[", b"http://localhost:99999999", b"http://\xe2\x84\x80/"]

ODD_TEXT = st.one_of(st.text(max_size=300), st.sampled_from(NASTY_NAMES))
ODD_BYTES = st.one_of(ODD_TEXT.map(str.encode), st.binary(max_size=300), st.just(b"\xff\xfe"), st.just(b"\x80" * 50))
ONE_LINE = ODD_BYTES.map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))
NUMBERS = st.one_of(st.integers(-(2**70), 2**70).map(lambda n: str(n).encode()), st.sampled_from(NASTY_NUMBERS))
# What looks like a boundary, again and again.
LONG_CONTENT = st.integers(0, 50_000).map(lambda count: b"\r\n--" * count)


@dataclass(frozen=True)
class Hostile:
    """One request: what is written to the socket, and how."""

    pieces: tuple[bytes, ...]
    pause: float = 0.0  # seconds after each piece
    ends: bool = False  # says that nothing more will come, where less has come than was promised
    hang_up: bool = False  # closes at once, without waiting for the answer

    def __repr__(self) -> str:
        shown = b"".join(self.pieces)
        return f"{shown[:700]!r}{'...' if len(shown) > 700 else ''} in {len(self.pieces)} pieces"


FAULTS = (
    "name filename number part-header media encoding no-headers many-headers long-header boundary other-boundary ending preamble cut bytes "
    "content-type request-header many-parts gzip more less twice both none odd bad-chunks pause hang-up"
).split()
# One thing wrong at a time reaches deeper than ten, and often there is nothing wrong but what the part holds.
SOME_FAULTS = st.lists(st.sampled_from(FAULTS), max_size=2).map(frozenset)
FILENAMES = st.one_of(
    ODD_BYTES.map(lambda value: b'; filename="' + value + b'"'),
    ONE_LINE.map(lambda value: b"; filename=" + value),
    st.tuples(st.sampled_from([b"utf-8", b"iso-8859-1", b"nonsense", b"", b"utf-7"]), ONE_LINE).map(
        lambda pair: b"; filename*=" + pair[0] + b"''" + pair[1]
    ),
    st.just(b'; filename*0="a"; filename*1="b"'),
)


@st.composite
def part(draw: st.DrawFn, faults: frozenset[str], name: bytes = b"file") -> bytes:
    """One part of a form."""
    filename = draw(FILENAMES) if "filename" in faults else draw(st.sampled_from([b"", b'; filename="a.txt"', b"; filename=b"]))
    name = draw(ONE_LINE) if "name" in faults else name
    lines = [b'Content-Disposition: form-data; name="' + name + b'"' + (filename if name == b"file" else b"")]
    lines += [b"Content-Type: " + (draw(ONE_LINE) if "media" in faults else b"text/plain")] if draw(st.booleans()) else []
    lines += [draw(ONE_LINE) + b": " + draw(ONE_LINE)] if "part-header" in faults else []
    lines += [b"Content-Transfer-Encoding: base64"] if "encoding" in faults else []
    lines += [b"X: " + b"y" * 5000] if "long-header" in faults else []
    lines = lines * 12 if "many-headers" in faults else lines
    lines = (
        draw(st.sampled_from([[], [b"Content-Disposition: form-data"], [b": x"], [b"no colon"]]))
        if "no-headers" in faults
        else lines
    )
    if name == b"expires_in_seconds":
        return b"\r\n".join([*lines, b"", draw(NUMBERS) if "number" in faults else b"3600"])
    return b"\r\n".join([*lines, b"", draw(st.one_of(st.binary(max_size=400), LONG_CONTENT))])


@st.composite
def form(draw: st.DrawFn, faults: frozenset[str]) -> tuple[bytes, bytes]:
    """A content type and a body that belong together, but for the faults."""
    boundary = (
        draw(st.one_of(ONE_LINE.map(lambda value: value[:80]), st.just(b"x" * 300))) if "boundary" in faults else BOUNDARY
    )
    used = boundary + b"-" if "other-boundary" in faults else boundary
    fields = [part(faults, b"expires_in_seconds")] if "number" in faults or draw(st.booleans()) else []
    parts = [draw(field) for field in [*fields, part(faults)]] * (40 if "many-parts" in faults else 1)
    body = b"".join(b"--" + used + b"\r\n" + content + b"\r\n" for content in parts)
    ends = [b"--" + used + b"--", b"--" + used, b"", b"--" + used + b"--\r\ntrailing"]
    body += draw(st.sampled_from(ends)) if "ending" in faults else b"--" + used + b"--\r\n"
    if "preamble" in faults:
        body = draw(st.sampled_from([b"\r\n", b"preamble\r\n", b"\r\n" * 1000])) + body
    if "cut" in faults:
        body = body[: draw(st.integers(0, len(body)))]
    for _ in range(draw(st.integers(1, 5)) if body and "bytes" in faults else 0):  # single bytes that changed on the way
        at = draw(st.integers(0, len(body) - 1))
        body = body[:at] + bytes([draw(st.integers(0, 255))]) + body[at + 1 :]
    kinds = [
        b"multipart/form-data; boundary=" + boundary,
        b"multipart/form-data",
        b"multipart/mixed; boundary=" + boundary,
        b"application/json",
    ]
    kind = b'multipart/form-data; boundary="' + boundary + b'"'
    return draw(st.sampled_from(kinds)) if "content-type" in faults else kind, body


@st.composite
def uploads(draw: st.DrawFn, doors: list[tuple[bytes, bytes]]) -> Hostile:
    """POST of a form to one of these paths, with its credentials; its length told truly, falsely, twice, or in chunks."""
    path, credentials = draw(st.sampled_from(doors))
    faults = draw(SOME_FAULTS)
    kind, body = draw(form(faults))
    head = [b"POST " + path + b" HTTP/1.1", b"host: localhost", credentials, b"content-type: " + _line(kind)]
    head += draw(headers()) if "request-header" in faults else []
    chunked = "bad-chunks" in faults or (not faults & {"none", "odd", "more", "less", "twice"} and draw(st.booleans()))
    if "gzip" in faults:
        whole = gzip.compress(body + b"\r\n" * draw(st.sampled_from([0, 1, 5_000_000])))
        body = whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole
        head.append(b"content-encoding: gzip")
    length = len(body) + 100 * ("more" in faults) - min(10, len(body)) * ("less" in faults)
    if "odd" in faults:
        head.append(b"content-length: " + _line(draw(NUMBERS)))
    elif "none" not in faults and (not chunked or "both" in faults):
        head.append(b"content-length: %d" % length)
    if "twice" in faults:
        head.append(b"content-length: %d" % (length + 1))
    if chunked:
        head.append(b"transfer-encoding: chunked")
        body = _chunked(body, draw(st.integers(1, 5000)), broken="bad-chunks" in faults)
    whole = b"\r\n".join([*head, b"", b""]) + body
    cuts = draw(st.lists(st.integers(0, len(whole)), max_size=6))
    short = bool(faults & {"more", "odd", "twice", "both"})
    return Hostile(_cut(whole, cuts), pause=0.02 if "pause" in faults else 0.0, ends=short, hang_up="hang-up" in faults)


@st.composite
def headers(draw: st.DrawFn) -> list[bytes]:
    """A few header lines, of names that mean something to us, with values that do not."""
    value = st.one_of(st.sampled_from(HEADER_VALUES), NUMBERS, ONE_LINE)
    pairs = draw(st.lists(st.tuples(st.sampled_from(HEADER_NAMES), value), max_size=3))
    return [name + b": " + _line(content) for name, content in pairs]


@st.composite
def requests(
    draw: st.DrawFn, routes: list[tuple[str, str]], credentials: list[bytes], known: Mapping[str, list[str]]
) -> Hostile:
    """A route, seldom by another method; its placeholders (often an id that is there), query, headers and small body are odd.

    Credentials begin with a key, an admin's key and a browser's session, and go on with others.
    """
    faults = draw(
        st.sets(st.sampled_from(["method", "id", "query", "many-queries", "header", "key", "body", "media"]), max_size=3)
    )
    name, place = draw(st.sampled_from(routes))
    method, path = draw(st.sampled_from(METHODS)) if "method" in faults else name.upper().encode(), place.encode()
    odd = ODD_BYTES.map(lambda value: b"".join(b"%%%02x" % byte for byte in value[:120]))
    while b"{" in path:
        before, _, rest = path.partition(b"{")
        name, _, after = rest.decode().partition("}")
        there = st.sampled_from(known.get(name, ["unknown"])).map(str.encode)
        path = before + draw(odd if "id" in faults else there) + after.encode()
    keys = st.one_of(st.sampled_from(QUERY_NAMES), odd)
    values = st.one_of(odd, NUMBERS.map(lambda value: value.replace(b" ", b"+")), st.sampled_from(QUERY_VALUES))
    if faults & {"query", "many-queries"}:
        pairs = draw(st.lists(st.tuples(keys, values), min_size=1, max_size=4)) * (60 if "many-queries" in faults else 1)
        path += b"?" + b"&".join(key + b"=" + _line(value) for key, value in pairs)
    head = [method + b" " + path + b" HTTP/1.1", b"host: localhost", *(draw(headers()) if "header" in faults else [])]
    right = 1 if place.startswith("/v1/organizations") else 0 if place.startswith("/v1/") else 2
    head.append(draw(st.sampled_from([b"x: y", *credentials])) if "key" in faults else credentials[right])
    body = (
        b""
        if method in (b"GET", b"HEAD", b"DELETE") and "body" not in faults
        else draw(st.one_of(json_bodies(), st.binary(max_size=300)))
    )
    if body:
        media = draw(st.sampled_from(MEDIA)) if "media" in faults else MEDIA[0]
        head += [b"content-type: " + media, b"content-length: %d" % len(body)]
    return Hostile((b"\r\n".join([*head, b"", b""]) + body,))


def json_bodies() -> st.SearchStrategy[bytes]:
    """JSON of the wrong shape, and what is nearly JSON."""
    names = st.sampled_from(JSON_NAMES)
    leaves = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), ODD_TEXT, st.sampled_from(["read", "admin", "default"])
    )
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
    )
    shaped = st.dictionaries(names, values, max_size=6)
    return st.one_of(
        st.one_of(shaped, shaped, values).map(lambda value: json.dumps(value).encode()), st.sampled_from(BROKEN_JSON)
    )


def _line(value: bytes) -> bytes:
    return value.replace(b"\r", b"").replace(b"\n", b"")


def _chunked(body: bytes, size: int, *, broken: bool) -> bytes:
    step = max(size, len(body) // 50 + 1)
    pieces = [body[at : at + step] for at in range(0, len(body), step)]
    sent = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return sent + (b"zz\r\nFFFFFFFFFFFFFFFFF\r\n" if broken else b"0\r\n\r\n")


def _cut(whole: bytes, places: list[int]) -> tuple[bytes, ...]:
    edges = [0, *sorted(places), len(whole)]
    return tuple(whole[a:b] for a, b in itertools.pairwise(edges) if a < b)
