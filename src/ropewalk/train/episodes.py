"""Episodes of a run over several turns: its environment, in processes of its own, asked the run's questions; use as a context."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.chat.template import Template
from ropewalk.config.run import Run
from ropewalk.engine.request import Sampling
from ropewalk.train.environment import Playing, play
from ropewalk.train.environment_pool import EnvironmentPool, limits_of
from ropewalk.train.environment_worker import EnvironmentSpec
from ropewalk.train.questions import Question
from ropewalk.train.talk import TemplateTalk


class Episodes:
    """What the rollouts play."""

    def __init__(self, run: Run, spec: EnvironmentSpec, template: Template) -> None:
        assert run.trl is not None
        self.pool = EnvironmentPool(spec, run.trl.reward_num_workers)
        self.template, self.limits = template, limits_of(run)

    def __enter__(self) -> Episodes:
        self.pool.start()
        self.talk = TemplateTalk(self.template, self.pool.tools)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which a reply ends, or a call of a tool."""
        return self.talk.stop_ids

    def room(self, ids: Sequence[int]) -> int:
        """How many more ids an episode of these may have."""
        return self.limits.tokens - len(ids)

    @property
    def patience(self) -> float:
        """Seconds within which some environment must have answered."""
        return self.pool.slowest()

    def play(self, question: Question, sampling: Sampling | None = None) -> Playing:
        """One episode, whose environment is given the question's row; it is the rollouts that sample."""
        environment = self.pool.begin()
        try:
            return (yield from play(environment, question.prompt.row, self.talk, self.limits))
        finally:
            environment.close()
