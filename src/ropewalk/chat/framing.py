"""How a model was trained to see documents: a small file in its folder, `documents.json`, for those that need another form than ours.

{"tags": false, "numbers": false}      the bare text before the question, as in {passage}, blank line, {question}
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from ropewalk.errors import ModelError

FILE = "documents.json"


@dataclass(frozen=True)
class Framing:
    """What stands around a document's text, and within."""

    tags: bool = True  # <document title="...">, so that a model can tell documents apart
    numbers: bool = True  # [3] before every citable sentence, where citations are wanted
    # Keeps the reply from writing markers that name nothing. Off by default: such markers are left out anyway, every token costs the
    # time of a mask, and a reply about code cannot say x[0].
    steered: bool = False


def framing(folder: str) -> Framing:
    """Of the model whose tokenizer lies in this folder; '': a tokenizer without one."""
    path = Path(folder) / FILE
    if not folder or not path.is_file():
        return Framing()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    known = {field.name for field in fields(Framing)}
    if not isinstance(values, dict) or not values.keys() <= known or not all(isinstance(v, bool) for v in values.values()):
        raise ModelError(
            f"{path} holds {json.dumps(values)[:200]}; expected an object with {', '.join(sorted(known))}, true or false"
        )
    return Framing(**values)
