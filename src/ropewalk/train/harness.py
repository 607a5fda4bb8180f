"""Episodes that outside code drives: it asks the model under training over HTTP, and what it asked is learnt from; use as a context.

question -> a session and its key -> the harness, in a process of its own -> calls of the endpoint, recorded -> its reward -> Episode
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ropewalk.chat.template import Template
from ropewalk.config.run import Run
from ropewalk.engine.request import Sampling
from ropewalk.errors import ConfigError
from ropewalk.train.environment import Failed, Playing
from ropewalk.train.environment_pool import limits_of
from ropewalk.train.harness_pool import HarnessPool
from ropewalk.train.harness_worker import HarnessSpec
from ropewalk.train.questions import Question
from ropewalk.train.sessions import Sessions
from ropewalk.train.shared_writer import Opened, Opens

NAME = "policy"  # of the model, whatever is trained
ADDRESS = "127.0.0.1:0"  # whatever port is free


class Harness:
    """What the rollouts play."""

    def __init__(self, run: Run, spec: HarnessSpec, template: Template) -> None:
        trl = run.trl
        assert trl is not None
        self.pool = HarnessPool(spec, trl.reward_num_workers)
        self.template = template
        self.sessions = Sessions(
            asked=Sampling(trl.temperature, trl.top_p, trl.top_k, trl.min_p),
            most=trl.max_completion_length,
            longest=min(limits_of(run).tokens, run.sequence_len),
            read=lambda ids: template.decode(ids, skip_special_tokens=False),
        )
        self._url = ""

    def __enter__(self) -> Harness:
        self.pool.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def open(self, opens: Opens | None, version: Callable[[], int]) -> Opened:
        """Begins to listen for what rollouts ask."""
        if opens is None:
            raise ConfigError(
                f"trl.harness: {self.pool.spec.name} is run by the command `ropewalk train`; run it, or remove the key"
            )
        sessions = self.sessions
        opened = opens(ADDRESS, name=NAME, template=self.template, longest=sessions.longest, version=version, sessions=sessions)
        self._url = opened.url
        return opened

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which a reply ends."""
        return self.template.stop_ids

    @property
    def patience(self) -> float:
        """Seconds after which a rollout must have ended."""
        return self.pool.slowest()

    def room(self, ids: Sequence[int]) -> int:
        """How many more ids a sequence of these may have."""
        return self.sessions.longest - len(ids)

    def play(self, question: Question, sampling: Sampling) -> Playing:
        """One episode: a rollout that is given the question's row, and asks with this sampling."""
        session = self.sessions.begin(sampling)
        try:
            said = yield self.pool.run(question.prompt.row, self._url, session.key)
        finally:
            self.sessions.end(session)
        if isinstance(said, Failed):
            return session.end(0.0, {}, "failed", said.error)
        return session.end(said.reward, said.metrics, "done")
