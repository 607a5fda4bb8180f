"""Every error Ropewalk raises for its user. Each knows its HTTP status, its Claude error type and the command line's exit code.

    RopewalkError                 500 api_error               exit 1   something we promised did not happen
    ├── BadInput                  400 invalid_request_error   exit 2   what was given cannot be used
    │   ├── ConfigError                                                a key or value of a configuration file
    │   ├── DataError                                                  a row, a column or a file of training data
    │   ├── ModelError                                                 a base, a tokenizer or an adapter that cannot be used
    │   ├── OutputError           500 api_error                        a folder or bucket that cannot be written or reached
    │   ├── MissingExtra                                               an optional package that is not installed
    │   ├── QuotaExceeded                                              no room left under a limit of bytes or files
    │   ├── NotDownloadable                                            a file whose workspace keeps it from being downloaded
    │   ├── ResumeFailed          409 412 415 460                      a step of a resumable upload that does not fit
    │   ├── DocumentError                                              a file that cannot be read as a document
    │   ├── CardError                                                  a page's text that cannot be read as cards
    │   ├── NotShipped                                                 a step of shipping that failed: the alias is as it was
    │   ├── SandboxFailed                                              work that ran past its limits of time or memory
    │   └── UnreadableBody                                             a request's body that came too slowly, or encoded otherwise
    ├── AuthenticationFailed      401 authentication_error    exit 2   no key, or one that opens nothing
    ├── PermissionDenied          403 permission_error        exit 2   a key that may not do this
    ├── NotFound                  404 not_found_error         exit 2   an id or a name that nobody knows
    │   └── FileExpired                                                a file whose hour has passed
    ├── TooLarge                  413 request_too_large       exit 2   more bytes than may be sent
    ├── RateLimited               429 rate_limit_error        exit 1   too many requests in a minute
    ├── Overloaded                529 overloaded_error        exit 1   no room to work on this now
    │   └── EngineDied                                                 the process of a model that ended while it was asked
    ├── UpstreamFailed            502 api_error               exit 1   another server that was asked and did not answer as it must
    │   ├── UpstreamTimedOut      504 timeout_error                    one that was silent for too long
    │   ├── UpstreamUnknown                                            one that has no such model, or no such address
    │   └── MailFailed                                                 a mail server that did not take a mail, or did not say so
    ├── DamagedContent            500 api_error               exit 1   stored bytes that are not those that were stored
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
    error_code: str | None = None  # `error.details.error_code`, by which the SDK chooses the class it raises
    param: str | None = None  # of a request: where in it stands what is wrong


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
    """A folder or bucket that cannot be written or reached: whoever runs the program named it, not whoever sends a request."""

    status = 500
    claude_type = "api_error"


class MissingExtra(BadInput):
    """An optional package that is not installed; says what to install."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the package '{package}', which is not installed: pip install 'ropewalk[{extra}]'")


class QuotaExceeded(BadInput):
    """No room left under a limit of bytes or files."""

    error_code = "storage_quota_exceeded"


class NotDownloadable(BadInput):
    """A file whose workspace keeps it from being downloaded."""

    error_code = "file_not_downloadable"


class DocumentError(BadInput):
    """A file that cannot be read as a document; `details` goes to `error.details` beside the code."""

    def __init__(self, message: str, error_code: str | None = None, **details: int | str) -> None:
        super().__init__(message)
        self.error_code, self.details = error_code, details


class CardError(BadInput):
    """A page's text that cannot be read as cards; names the line (1-based) where reading stopped and what was expected there."""

    def __init__(self, message: str, line: int) -> None:
        self.line = line
        super().__init__(f"line {line}: {message}")


class NotShipped(BadInput):
    """A step of shipping, or of its way back, that failed: the alias points where it did."""

    def __init__(self, message: str, step: str) -> None:
        self.step = step
        super().__init__(f"{step}: {message}; the alias is as it was")


class SandboxFailed(BadInput):
    """Work that ran past its limits, or crashed; the reason is 'time', 'cpu', 'memory', 'result', 'crash', 'killed' or 'failure'."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnreadableBody(BadInput):
    """A request's body that came too slowly, or encoded otherwise than can be read."""

    def __init__(self, message: str, error_code: str) -> None:
        super().__init__(message)
        self.error_code = error_code


class ResumeFailed(BadInput):
    """A step of a resumable upload that does not fit; the status is the one that tus 1.0 gives it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}  # that the answer carries


class AuthenticationFailed(RopewalkError):
    """No key, or one that opens nothing."""

    status = 401
    claude_type = "authentication_error"
    exit_code = 2


class PermissionDenied(RopewalkError):
    """A key that may not do this."""

    status = 403
    claude_type = "permission_error"
    exit_code = 2


class NotFound(RopewalkError):
    """An id or a name that nobody knows."""

    status = 404
    claude_type = "not_found_error"
    exit_code = 2


class FileExpired(NotFound):
    """A file whose hour has passed."""

    error_code = "file_expired"


class TooLarge(RopewalkError):
    """More bytes than may be sent."""

    status = 413
    claude_type = "request_too_large"
    exit_code = 2


class RateLimited(RopewalkError):
    """Too many requests in a minute."""

    status = 429
    claude_type = "rate_limit_error"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class Overloaded(RopewalkError):
    """No room to work on this now."""

    status = 529
    claude_type = "overloaded_error"
    retry_after = 1.0  # seconds


class EngineDied(Overloaded):
    """The process of a model that ended while it was asked; the next request starts another."""


class UpstreamFailed(RopewalkError):
    """Another server that was asked and did not answer as it must."""

    status = 502


class UpstreamTimedOut(UpstreamFailed):
    """Another server that was silent for too long."""

    status = 504
    claude_type = "timeout_error"


class UpstreamUnknown(UpstreamFailed):
    """Another server that has no such model, or no such address."""


class MailFailed(UpstreamFailed):
    """A mail server that did not take a mail, or did not say so; `again` says whether trying later could help and do no harm."""

    def __init__(self, message: str, again: bool) -> None:
        super().__init__(message)
        self.again = again


class DamagedContent(RopewalkError):
    """Stored bytes that are not those that were stored."""


class TrainingStopped(RopewalkError):
    """A run that cannot go on: a NaN, a dead worker."""


class VerificationFailed(RopewalkError):
    """A result that differs from what it must equal."""
