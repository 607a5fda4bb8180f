"""A picture as rows of pixels: decoded in a confined process, upright, on white, and no larger than models look at."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable
from dataclasses import dataclass, field

from ropewalk.errors import DocumentError, SandboxFailed
from ropewalk.files.catalog import File
from ropewalk.files.documents import DRAW_CPU_SECONDS, confined
from ropewalk.files.reading import HEADER_BYTES, READERS

VERSION = 1  # of what decoding makes of the same bytes
MAX_BYTES = 10_000_000
LONGEST_SIDE = 2_048  # pixels; larger pictures are scaled down


@dataclass(frozen=True)
class Pixels:
    """A decoded picture."""

    media_type: str
    before: tuple[int, int]  # width and height as it came
    width: int
    height: int
    rows: bytes = field(repr=False)  # red, green, blue

    @property
    def scaled(self) -> bool:
        """Whether it was made smaller."""
        return max(self.before) > LONGEST_SIDE


def is_picture(file: File) -> bool:
    """Whether a file is shown to models as a picture."""
    return READERS.get(file.mime_type.partition(";")[0].strip()) == "picture"


async def pixels_of(data: bytes | AsyncIterable[bytes], media_type: str | None, name: str) -> Pixels:
    """The pixels of a picture; DocumentError where these bytes are none."""
    made = await confined(data, DRAW_CPU_SECONDS, "decode_picture", media_type, name, LONGEST_SIDE)
    end = made.find(b"\n", 0, HEADER_BYTES)
    try:
        said = json.loads(made[: max(0, end)])
        width, height = int(said["width"]), int(said["height"])
        before = int(said["before"][0]), int(said["before"][1])
        found = Pixels(str(said["media_type"]), before, width, height, made[end + 1 :])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SandboxFailed("the process that read this picture gave none", "crash") from error
    if len(found.rows) != 3 * width * height or not 0 < max(width, height) <= LONGEST_SIDE or min(width, height) < 1:
        raise SandboxFailed("the process that read this picture gave none", "crash")
    return found


def check_size(size: int) -> None:
    """DocumentError for a picture of more bytes than are read."""
    if size > MAX_BYTES:
        raise DocumentError(
            f"image: {size:,} bytes are more than the {MAX_BYTES:,} of the largest picture that is read", "image_too_large"
        )
