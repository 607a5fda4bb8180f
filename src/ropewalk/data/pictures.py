"""Pictures of training rows: where each lies, how large it is, and its pixels when they are wanted. No torch.

A row says where its pictures lie as OpenAI, Claude, transformers and LLaVA say it. What is kept of a row names its pictures and holds
those that stand in the data itself; files of this machine are only named.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ropewalk.errors import DataError, DocumentError, NotFound, SandboxFailed
from ropewalk.files import local
from ropewalk.files.local import is_id, open_local

if TYPE_CHECKING:
    from PIL import Image  # which most rows have no need of

TYPES = ("image", "image_url", "input_image")  # of a part of a message
NAMED = ("image_url", "image", "source", "file_id", "file", "path", "url", "base64", "data", "bytes")  # what says where it lies
COLUMNS = ("images", "image")  # of a row whose messages only say that there is a picture
MARKER = "<image>"  # says so within a text
MOST = 100  # pictures of a row


class Lens(Protocol):
    """How a model is shown pictures; models/lens.py.  train -> data"""

    @property
    def token_id(self) -> int:
        """What the chat template writes for a picture."""
        ...

    @property
    def feature_id(self) -> int:
        """What stands for a part of one."""
        ...

    @property
    def digest(self) -> str:
        """Changes when what it makes of a picture does."""
        ...

    def ids(self, width: int, height: int) -> tuple[int, ...]:
        """What stands for a picture of this size; BadInput where the model takes none of that shape."""
        ...


@dataclass(frozen=True)
class Shown:
    """One picture of a row: a path, an id of the file store, or bytes that stand in the row."""

    row: str  # the row's file and line
    place: str  # '' for bytes
    data: bytes | None = None
    width: int = 0  # as models are shown it
    height: int = 0

    @property
    def name(self) -> str:
        return f"the picture '{self.place}'" if self.place else "a picture within the row"

    def sized(self) -> Shown:
        """The same with its size; DataError where it cannot be shown."""
        picture = self.decode()
        return replace(self, width=picture.width, height=picture.height)

    def decode(self) -> Image.Image:
        """As models see it: upright, on white, no longer on a side than they look at."""
        try:
            # What a job reads comes from strangers, so it is decoded where it can do no harm.
            picture = _decoded(self._bytes()) if local.granted is None else _confined(self._bytes())
        except (NotFound, FileNotFoundError, IsADirectoryError) as error:
            raise DataError(f"{self.row}: {self.name} is not there") from error
        except (DocumentError, SandboxFailed) as error:
            raise DataError(f"{self.row}: {self.name} cannot be shown: {str(error).removeprefix('image: ')}") from error
        except Exception as error:  # Pillow's errors over broken bytes have no common class of their own
            raise DataError(
                f"{self.row}: {self.name} is damaged, or neither PNG, JPEG, GIF nor WebP ({type(error).__name__})"
            ) from error
        if self.width and picture.size != (self.width, self.height):
            raise DataError(
                f"{self.row}: {self.name} is {picture.width} by {picture.height} pixels, and was {self.width} by {self.height} when the "
                "rows were prepared; name another folder in dataset_prepared_path"
            )
        return picture

    def _bytes(self) -> bytes:
        if self.data is not None:
            return self.data
        with open_local().open(self.place) if is_id(self.place) else open(self.place, "rb") as file:
            return file.read()


def is_picture(part: Any) -> bool:
    """Whether a part of a message is one."""
    if not isinstance(part, Mapping):
        return False
    kind = part.get("type")
    return kind in TYPES or (kind is None and not part.get("text") and any(part.get(name) for name in NAMED[:2]))


def named_in(part: Mapping[str, Any]) -> Any:
    """What a part says of where its picture lies; None: the row's column says it."""
    return next(({name: part[name]} for name in NAMED if part.get(name)), None)


def in_column(row: Mapping[str, Any]) -> list[Any]:
    """What the row's own column says."""
    found = next((row[name] for name in COLUMNS if row.get(name) is not None), None)
    if found is None:
        return []
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str | bytes) else [found]


def find(said: Any, row: str, folder: Path | None) -> Shown:
    """The picture that is named; `folder`: where the row's own file lies, None where a row may name no path."""
    if isinstance(said, bytes | bytearray):
        return Shown(row, "", bytes(said))
    if isinstance(said, Mapping):
        data = said.get("bytes") or said.get("data") or said.get("base64")
        if isinstance(data, bytes | bytearray):
            return Shown(row, "", bytes(data))
        if isinstance(data, str):
            return Shown(row, "", _of_base64(data))
        inner = next((said[name] for name in NAMED if said.get(name)), None)
        if inner is not None:
            return find(inner, row, folder)
    if hasattr(said, "save") and hasattr(said, "convert"):  # decoded already, by the `datasets` library
        out = io.BytesIO()
        said.convert("RGB").save(out, "PNG")
        return Shown(row, "", out.getvalue())
    if not isinstance(said, str) or not said:
        raise DataError(
            f"expected a picture as a path, a data URL, an id of the file store or bytes, found {type(said).__name__}"
        )
    if said.startswith("data:"):
        return Shown(row, "", _of_base64(said.partition(",")[2]))
    if is_id(said):
        if local.granted is not None:
            raise DataError(f"the picture '{said}': a job reads its own files alone; write pictures into the row as data URLs")
        return Shown(row, said)
    if said.startswith(("http://", "https://")):
        raise DataError(
            f"the picture '{said[:200]}' is not fetched while training; download it, and name its path, or write it as a data URL"
        )
    if folder is None:
        raise DataError(
            f"the picture '{said[:200]}': a row of a stored file or of a data set of the hub names no path; write it as a data URL"
        )
    return Shown(row, str((folder / Path(said.removeprefix("file://")).expanduser()).absolute()))


def kept(pictures: Sequence[Shown]) -> bytes:
    """The pictures of a row as they lie in the cache: the row's place, a line of JSON, then what stands in the row itself."""
    if not pictures:
        return b""
    about = [[p.place, len(p.data or b""), p.width, p.height] for p in pictures]
    lines = pictures[0].row.encode(), json.dumps(about).encode(), b"".join(p.data or b"" for p in pictures)
    return b"\n".join(lines)


def content_of(blob: bytes) -> bytes:
    """The same without the place of the row."""
    return blob.partition(b"\n")[2]


def read_kept(blob: bytes) -> tuple[Shown, ...]:
    """The way back."""
    return tuple(_of_kept(blob)) if blob else ()


def _of_kept(blob: bytes) -> Iterator[Shown]:
    row, about, rest = blob.split(b"\n", 2)
    at = 0
    for place, size, width, height in json.loads(about):
        yield Shown(row.decode(), place, None if place else rest[at : at + size], width, height)
        at += size


def _of_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"a picture within the row is not base64: {error}") from error


def _decoded(data: bytes) -> Image.Image:
    from ropewalk.files.pictures import LONGEST_SIDE
    from ropewalk.files.readers.picture import pixels

    return pixels(data, LONGEST_SIDE)[0]


def _confined(data: bytes) -> Image.Image:
    from PIL import Image

    from ropewalk.files.pictures import check_size, pixels_of

    check_size(len(data))
    found = asyncio.run(pixels_of(data, None, "image"))
    return Image.frombytes("RGB", (found.width, found.height), found.rows)
