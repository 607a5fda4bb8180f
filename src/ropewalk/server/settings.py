"""What the server itself is told: where it listens, and what it takes from a client before it gives up."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ropewalk.config.mail import Mail
from ropewalk.config.serving import Serving


@dataclass(frozen=True)
class ServerSettings:
    """One process that answers requests; where files are kept is in files/settings.py."""

    host: str = "127.0.0.1"
    port: int = 8700
    tls_cert: Path | None = None
    tls_key: Path | None = None
    requests_per_minute: int | None = None  # of each workspace that has no limit of its own; None: as many as come
    idle_seconds: float = 30.0  # a body of which nothing comes for so long is given up
    slow_seconds: float = 120.0  # so long a body may take ...
    slowest_bytes_per_second: int = 16_384  # ... and longer only as long as it comes at least at this rate
    drain_seconds: float = 30.0  # requests in progress may finish for so long after the signal to stop
    drain_notice_seconds: float = 0.0  # /ready says no for so long before the server stops listening
    sweep_seconds: float = 60.0  # between two rounds that erase what nobody refers to any more
    scrub_bytes_per_second: float = 1e6  # at which stored bytes are read and verified, each content once a week; 0: not at all
    batch_requests: int = 4  # of batches that are answered at once, while nobody else waits
    batch_lease_seconds: float = 20.0  # so long after a process has died, another takes up what it was answering
    jobs_at_once: int = 1  # trainings that this process runs; 0: they wait for another process
    jobs_running: int = 1  # of one workspace, in all processes together
    jobs_queued: int = 20  # of one workspace that have not ended, those that run included
    jobs_file_bytes: int = 2_000_000_000  # of the files of all these
    job_lease_seconds: float = 20.0  # so long after a process has died, another takes up what it was training
    job_grace_seconds: float = 30.0  # for a training that is to stop to finish its step and write a checkpoint
    connections: int = 1000  # at once; more are answered 503
    mail: Mail | None = None  # how mail is sent; None: there is none
    digest_seconds: float = 300.0  # between two looks whether a digest is due
    serving: Serving = field(default_factory=Serving)  # which models, and what their engines may use

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{self.port}"
