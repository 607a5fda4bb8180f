"""Pictures as pixels: upright, on white, not too large; and what is none is refused in words."""

import asyncio
import io

import pytest
from PIL import Image

from files import papers
from ropewalk.errors import BadInput, DocumentError, SandboxFailed
from ropewalk.files import pictures
from ropewalk.files.pictures import LONGEST_SIDE, MAX_BYTES, check_size, pixels_of


def decoded(data: bytes, media_type: str | None = None) -> pictures.Pixels:
    return asyncio.run(pixels_of(data, media_type, "picture"))


def saved(image: Image.Image, kind: str, **how) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "JPEG"])
def test_a_picture_is_rows_of_its_pixels(kind):
    found = decoded(papers.picture(kind))
    assert (found.media_type, found.before, found.width, found.height) == (f"image/{kind.lower()}", (30, 20), 30, 20)
    assert len(found.rows) == 30 * 20 * 3
    assert found.rows[0] > 240
    assert found.rows[1] < 15


def test_a_picture_is_turned_as_its_camera_was():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise: what is at the left comes to the top
    found = decoded(saved(image, "PNG", exif=exif))
    assert (found.width, found.height) == (20, 40)
    assert found.rows[:3] == bytes([0, 0, 255])
    assert found.rows[-3:] == bytes([255, 0, 0])


def test_what_is_transparent_is_white():
    assert decoded(saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")).rows == b"\xff" * 48


def test_a_large_picture_is_scaled_down():
    found = decoded(papers.picture("PNG", 4096, 1024))
    assert (found.width, found.height, found.before) == (LONGEST_SIDE, 512, (4096, 1024))
    assert found.scaled
    assert not decoded(papers.picture("PNG", LONGEST_SIDE, 8)).scaled


def test_of_an_animation_the_first_frame_is_seen():
    assert decoded(papers.animation()).before == (8, 6)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "document_damaged"),
        (papers.picture("PNG")[:60], "document_damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "document_damaged"),
        (papers.claimed_png(8001, 10), "image_dimensions_too_large"),
        (papers.claimed_png(8000, 8000), "document_damaged"),
    ],
    ids=["empty", "cut", "zeros", "too wide", "nothing in it"],
)
def test_what_cannot_be_seen_is_refused(data, code):
    with pytest.raises(DocumentError) as caught:
        decoded(data, "image/png")
    assert caught.value.error_code == code


def test_a_text_is_no_picture():
    with pytest.raises(DocumentError, match="text/plain"):
        decoded(b"Only words.", "text/plain")


def test_too_many_bytes_are_not_read():
    with pytest.raises(BadInput, match="10,000,001"):
        check_size(MAX_BYTES + 1)


@pytest.mark.parametrize(
    "made", [b"", b"{}\n", b'{"media_type": "x", "before": [1, 1], "width": 2, "height": 2}\n123', b"[" * 100_000]
)
def test_a_process_that_was_taken_over_gives_no_picture(monkeypatch, made):
    async def confined(*_: object) -> bytes:
        return made

    monkeypatch.setattr(pictures, "confined", confined)
    with pytest.raises(SandboxFailed):
        decoded(b"x")
