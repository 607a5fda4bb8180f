"""Every error Ropewalk raises for its user. Each knows its HTTP status, its Claude error type and the command line's exit code.

    RopewalkError                 500 api_error               exit 1   something we promised did not happen
    ├── BadInput                  400 invalid_request_error   exit 2   what was given cannot be used
    │   ├── ConfigError                                                a key or value of a configuration file
    │   ├── DataError                                                  a row, a column or a file of training data
    │   ├── ModelError                                                 a base, a tokenizer or an adapter that cannot be used
    │   ├── OutputError                                                a folder that cannot be written
    │   └── MissingExtra                                               an optional package that is not installed
    ├── NotFound                  404 not_found_error         exit 2   an id or a name that nobody knows
    ├── TrainingStopped                                       exit 1   a run that cannot go on: a NaN, a dead worker
    └── VerificationFailed                                    exit 1   a result that differs from what it must equal

A message is one sentence or two: it names the value, what was expected and the way out. The command line prints it as its last
line, without a traceback. Anything that is not a RopewalkError is our own fault and is shown with its traceback.
"""

from __future__ import annotations

from pathlib import Path


class RopewalkError(Exception):
    """Something we promised did not happen."""

    status = 500
    claude_type = "api_error"
    exit_code = 1


class BadInput(RopewalkError):
    """What was given cannot be used."""

    status = 400
    claude_type = "invalid_request_error"
    exit_code = 2


class ConfigError(BadInput):
    """A key or value of a configuration file; names the file and the line where they are known."""

    def __init__(self, message: str, *, path: Path | str | None = None, line: int | None = None) -> None:
        self.path, self.line = path, line
        where = f"{path}:{line}: " if path and line else f"{path}: " if path else ""
        super().__init__(where + message)


class DataError(BadInput):
    """A row, a column or a file of training data; names the file, the line (1-based) and the key where they are known."""

    def __init__(
        self, message: str, *, path: Path | str | None = None, line: int | None = None, key: str | None = None
    ) -> None:
        self.path, self.line, self.key = path, line, key
        where = f"{path}:{line}: " if path and line else f"{path}: " if path else ""
        super().__init__(where + (f"key '{key}': " if key else "") + message)


class ModelError(BadInput):
    """A base, a tokenizer or an adapter that cannot be used."""


class OutputError(BadInput):
    """A folder that cannot be written."""


class MissingExtra(BadInput):
    """An optional package that is not installed; says what to install."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the package '{package}', which is not installed: pip install 'ropewalk[{extra}]'")


class NotFound(RopewalkError):
    """An id or a name that nobody knows."""

    status = 404
    claude_type = "not_found_error"
    exit_code = 2


class TrainingStopped(RopewalkError):
    """A run that cannot go on: a NaN, a dead worker."""


class VerificationFailed(RopewalkError):
    """A result that differs from what it must equal."""
