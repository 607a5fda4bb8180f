"""Names of files: data that is kept and shown, never a path."""

from __future__ import annotations

import mimetypes
import re

from ropewalk.errors import BadInput

LONGEST = 255
FORBIDDEN = re.compile(r'[<>:"|?*\\/\x00-\x1f]')
SURROGATE = re.compile(r"[\ud800-\udfff]")
# Where the system's table of media types knows several, or none.
EXTENSIONS = {"application/octet-stream": ".bin", "text/plain": ".txt", "image/jpeg": ".jpg", "application/jsonl": ".jsonl"}


def stored_name(given: str | None, extension: str) -> str:
    """The last component of the given name, or `unnamed` with an extension; BadInput for one that cannot be kept."""
    name = re.split(r"[/\\]", given or "")[-1]
    if not name:
        return f"unnamed{extension}"
    if len(name) > LONGEST:
        raise BadInput(f"filename: {len(name)} characters; at most {LONGEST} are allowed")
    wrong = FORBIDDEN.search(name) or SURROGATE.search(name)
    if wrong:
        raise BadInput(
            f'filename: the character {wrong.group()!a} is not allowed; names have none of < > : " | ? * \\ / and no control characters'
        )
    return name


def extension_of(media_type: str) -> str:
    """A usual extension of a media type, with its dot."""
    plain = media_type.partition(";")[0].strip()
    return EXTENSIONS.get(plain) or mimetypes.guess_extension(plain) or ".bin"
