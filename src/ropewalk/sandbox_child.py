"""The process that sandbox.py starts: reads its request, confines itself, calls one function, sends what it returned, ends.

Run by path under `python -I -S`, so nothing but the standard library can be imported until the request has said where the rest lies.
What it sends: a letter once it is ready for the call, then a letter for the kind of answer, eight bytes of length, the payload. Only
JSON and bytes go back, never a pickle: whoever took over this process could write one.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys

RESULT, ERROR, MEMORY, FAILURE, BROKEN, UNCONFINED = b"J", b"E", b"M", b"F", b"S", b"C"
BYTES = b"B"
READY = b"R"
HEADER = len(READY) + 9


def main() -> None:
    request_file, result_pipe, data_file = (int(word) for word in sys.argv[1:])
    request = pickle.loads(_read_all(request_file))
    sys.path += request["path"]
    kind, payload = _answer(request, result_pipe, data_file)
    frame = memoryview(kind + struct.pack(">Q", len(payload)) + payload)
    while frame:
        frame = frame[os.write(result_pipe, frame) :]
    os._exit(0)  # a library's exit handlers are of no use to anyone


def _answer(request: dict[str, object], result_pipe: int, data_file: int) -> tuple[bytes, bytes]:
    from ropewalk import confinement

    try:
        active = confinement.confine(**request["limits"])  # type: ignore[arg-type]
        # A change of capabilities may undo it, so it comes last.
        confinement.die_with_parent(request["parent"])  # type: ignore[arg-type]
    except (confinement.CannotConfine, OSError, ValueError) as error:
        os.write(result_pipe, READY)
        return UNCONFINED, str(error).encode()
    os.write(result_pipe, READY)
    if request["function"] == "containment":
        return RESULT, json.dumps(active).encode()
    try:
        module, _, name = str(request["function"]).partition(":")
        function = getattr(__import__(module, fromlist=[name]), name)
        arguments = pickle.loads(request["arguments"])  # type: ignore[arg-type]
    except (ImportError, AttributeError, pickle.UnpicklingError) as error:
        return BROKEN, f"{type(error).__name__}: {error}".encode()
    try:
        if data_file >= 0:
            arguments = (_read_all(data_file), *arguments)
        value = function(*arguments)
        return (BYTES, value) if isinstance(value, bytes) else (RESULT, json.dumps(value).encode())
    except MemoryError:
        return MEMORY, b""
    except Exception as error:
        return _error(error)


def _error(error: Exception) -> tuple[bytes, bytes]:
    """An error meant for the user keeps its class; any other is a failure of the function."""
    from ropewalk.errors import BadInput

    said = {"class": type(error).__name__, "message": str(error)}
    if isinstance(error, BadInput):
        said |= {key: value for key, value in vars(error).items() if key in ("error_code", "details")}
    return ERROR if isinstance(error, BadInput) else FAILURE, json.dumps(said).encode()


def _read_all(file: int) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(0)
        return opened.read()


if __name__ == "__main__":
    main()
