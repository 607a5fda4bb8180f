"""Parts of a body: the same whatever its chunks, exact in their bytes, bounded in what they may ask for."""

import itertools
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ropewalk.errors import BadInput
from ropewalk.server.multipart import MAX_HEADER_BYTES, MAX_PARTS, Begin, Data, End, Multipart

BOUNDARY = b"XyZ"
CONTENT_TYPE = "multipart/form-data; boundary=XyZ"
# Bytes that look like the beginning of a boundary are what a parser gets wrong at the edges of chunks.
TRICKY = st.lists(
    st.sampled_from(
        [b"\r", b"\n", b"\r\n", b"-", b"--", b"\r\n--", b"\r\n--Xy", b"\r\n--XyQ", b"XyZ", b"--XyZ", b"\0", b"data", b"\xff"]
    ),
    max_size=12,
).map(b"".join)
CONTENTS = st.one_of(TRICKY, st.binary(max_size=64)).filter(lambda content: b"\r\n--XyZ" not in b"\r\n" + content + b"\r\n--X")


def written(parts: list[tuple[bytes, bytes]]) -> bytes:
    """Parts, each its headers and its content, as every client writes them."""
    return b"".join(b"--XyZ\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + b"--XyZ--\r\n"


def parts_of(body: bytes, cuts: list[int]) -> list[tuple[Begin, bytes]]:
    """The parts that come out when the body goes in cut at these places."""
    form, found = Multipart(CONTENT_TYPE), []
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, end in itertools.pairwise(edges):
        for event in form.feed(body[start:end]):
            match event:
                case Begin():
                    found.append([event, b"", False])
                case Data(data):
                    assert data
                    found[-1][1] += data
                case End():
                    found[-1][2] = True
    form.close()
    assert all(complete for _, _, complete in found)
    return [(begin, content) for begin, content, _ in found]


@given(st.lists(CONTENTS, min_size=1, max_size=4), st.lists(st.integers(0, 2000), max_size=12))
@example([b"\r\n--Xy", b""], list(range(2000)))  # one byte at a time
def test_any_chunking_of_any_body_gives_the_same_parts(contents, cuts):
    heads = [
        b'Content-Disposition: form-data; name="file"',
        b'content-disposition:form-data; name="file"; filename="a.txt"\r\nContent-Type: text/plain',
    ]
    body = written([(heads[number % 2], content) for number, content in enumerate(contents)])
    found = parts_of(body, cuts)
    assert [content for _, content in found] == contents
    for (begin, content), expected in zip(found, contents):
        if begin.offset is None:
            assert content == b""
        else:
            assert body[begin.offset : begin.offset + len(expected)] == expected
    assert [begin for begin, _ in found] == [begin for begin, _ in parts_of(body, [])]


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=6))
def test_no_body_raises_anything_but_bad_input(body, cuts):
    with suppress(BadInput):
        assert parts_of(body, cuts)


@given(st.text(st.characters(max_codepoint=255), max_size=80))  # headers are read as Latin-1
def test_no_content_type_raises_anything_but_bad_input(content_type):
    with suppress(BadInput):
        assert Multipart(content_type).feed(b"") == []


def test_a_part_without_a_filename_is_a_part_like_any_other():
    [(begin, content)] = parts_of(written([(b'Content-Disposition: form-data; name="file"', b"abc")]), [])
    assert (begin.name, begin.filename, begin.media_type, content) == ("file", None, None, b"abc")


def test_what_follows_the_content_has_the_length_that_is_told():
    body = written([(b'Content-Disposition: form-data; name="file"', b"abc")])
    [(begin, _)] = parts_of(body, [])
    assert len(body) - begin.offset - Multipart(CONTENT_TYPE).closing == 3


def test_names_are_utf_8_and_quotes_are_taken_off():
    head = 'Content-Disposition: form-data; name="file"; filename="Bär \\"é\\".pdf"\r\nContent-Type: Text/Plain; charset=utf-8'
    [(begin, _)] = parts_of(written([(head.encode(), b"")]), [])
    assert (begin.filename, begin.media_type) == ('Bär "é".pdf', "text/plain")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"--XyZ\r\nContent-Disposition: form-data; name=a\r\n\r\nabc", "cut short"),
        (b"--XyZ\r\nContent-Disposition: form-data; name=a\r\n\r\nabc\r\n--XyZ\r\n", "cut short"),
        (b"", "cut short"),
        (b"nothing of the kind", "not multipart/form-data"),
        (b"\r\n" * 2000, "does not begin with the boundary"),
        (b"--XyZ\r\nContent-Type: text/plain\r\n\r\nabc\r\n--XyZ--\r\n", "Content-Disposition"),
        (b'--XyZ\r\nContent-Disposition: attachment; name="a"\r\n\r\nabc\r\n--XyZ--\r\n', "Content-Disposition"),
        (b'--XyZ\r\nContent-Disposition: form-data; name="a"; filename="\xff"\r\n\r\nabc\r\n--XyZ--\r\n', "not UTF-8"),
        (b"--XyZ\r\nX: " + b"a" * (MAX_HEADER_BYTES + 1) + b"\r\n\r\nabc\r\n--XyZ--\r\n", "Maximum header size"),
        (b"--XyZ\r\n" + b"X: a\r\n" * 9 + b"\r\nabc\r\n--XyZ--\r\n", "Maximum header count"),
        (written([(b"Content-Disposition: form-data; name=a", b"")] * (MAX_PARTS + 1)), "more than 64 parts"),
        (written([(b"Content-Disposition: form-data; name=a\r\nContent-Transfer-Encoding: base64", b"YQ==")]), "base64"),
    ],
)
def test_a_body_that_cannot_be_used_says_why(body, said):
    with pytest.raises(BadInput, match=said):
        parts_of(body, [])
