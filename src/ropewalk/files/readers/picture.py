"""PNG, JPEG, GIF, WebP: no text, one picture; of an animation the first frame."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from ropewalk.errors import DocumentError
from ropewalk.files.readers.draft import Draft

MAX_SIDE = 8000  # pixels; as the Claude API has it
LONGEST_SIDE = 1568  # of what is drawn: what models take without scaling it down themselves


def read(data: bytes, draft: Draft) -> None:
    """Decoded whole, so that a picture that is kept is one that can be shown."""
    picture = _open(data)
    draft.media_type = _media_type(picture)  # names of files, and so what is declared, are often wrong
    draft.image(*picture.size)


def render(data: bytes, number: int) -> bytes:
    """The picture as PNG, no larger than a page would be drawn."""
    if number != 1:
        raise DocumentError(f"there is no picture {number}; this file is picture 1", "document_no_such_page")
    picture = _open(data)
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    output = io.BytesIO()
    picture.save(output, "PNG")
    return output.getvalue()


def pixels(data: bytes, longest: int) -> tuple[Image.Image, dict[str, object]]:
    """The picture as it is meant to be seen: upright, on white, no longer than so on a side; and what it was before."""
    picture = _open(data)
    before: dict[str, object] = {"media_type": _media_type(picture), "before": list(picture.size)}
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.thumbnail((longest, longest))
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "RGBA":
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        picture = white
    return picture, before


def _media_type(picture: Image.Image) -> str:
    return f"image/{(picture.format or '').lower()}"


def _open(data: bytes) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = None  # the side is checked below, before any pixel is decoded
    picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "GIF", "WEBP"))
    width, height = picture.size
    if max(width, height) > MAX_SIDE:
        raise DocumentError(
            f"this picture is {width:,} by {height:,} pixels; at most {MAX_SIDE:,} on a side are allowed: scale it down",
            "image_dimensions_too_large",
            max_side_length_pixels=MAX_SIDE,
        )
    picture.load()
    return picture
