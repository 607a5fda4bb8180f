"""The rewards of a run: from its configuration to one number for each completion.

reward_functions.py  what a function is, and its form    reward_builtins.py  those that need no code; judge and model beside it
reward_worker.py     what runs in a process               reward_pool.py       that process, with a limit of time
reward_check.py      `ropewalk rewards check`            environment.py      replies over several turns

`combine` adds them up, on [B, K] arrays of B samples and K rewards, where NaN says "does not apply"; advantages.py goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ropewalk.config.run import Run
from ropewalk.errors import BadInput, ConfigError
from ropewalk.train.outage import Outage
from ropewalk.train.reward_builtins import SECONDS, RewardSpec, read_spec
from ropewalk.train.reward_functions import Sample, Score
from ropewalk.train.reward_pool import RewardPool, Scores

Array = NDArray[np.float64]


def specs_of(run: Run) -> tuple[RewardSpec, ...]:
    """The rewards that a configuration names; no code of a user's is run for it."""
    trl = run.trl
    if trl is None or not (trl.reward_funcs or trl.environment or trl.harness):
        raise ConfigError(
            f"{run.where('trl')}no reward is named; add trl.reward_funcs, such as [rewards.correct] or [{{kind: numeric}}]"
        )
    folders = tuple(dict.fromkeys([run.folder, "."]))
    seconds = trl.reward_seconds or SECONDS
    specs: list[RewardSpec] = []
    for number, entry in enumerate(trl.reward_funcs or ()):
        try:
            spec = read_spec(entry, folders, seconds)
        except BadInput as error:
            raise ConfigError(f"{run.where('trl', 'reward_funcs', number)}key 'trl.reward_funcs': {error}") from None
        name = spec.name
        again = sum(one.name.rpartition("#")[0] == name or one.name == name for one in specs)
        weight = trl.reward_weights[number] if trl.reward_weights else spec.weight
        specs.append(RewardSpec(f"{name}#{again + 1}" if again else name, spec.kind, spec.params, float(weight), spec.seconds))
    return tuple(specs)


class Rewards:
    """The rewards of a run, computed by processes of their own; use as a context."""

    def __init__(self, specs: Sequence[RewardSpec], workers: int = 1) -> None:
        self.specs = tuple(specs)
        self.weights: Array = np.array([spec.weight for spec in self.specs])
        self.pool = RewardPool(self.specs, workers)
        self.failures = [0] * len(self.specs)  # of each reward, in all
        self._outages = [Outage(f"reward '{spec.name}'", "times") for spec in self.specs]

    def __enter__(self) -> Rewards:
        self.pool.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """All rewards of all samples, in their order, waited for."""
        return self.seen(self.pool.score(samples))

    def seen(self, scores: Scores) -> Scores:
        """Counts failures, of scores that `pool.submit` gave too; a reward that does nothing but fail stops the run with its error."""
        for row in scores:
            for number, score in enumerate(row):
                outage = self._outages[number]
                if not score.error:
                    outage.worked()
                    continue
                self.failures[number] += 1
                outage.failed(score.error)
                outage.check()
        return scores


def as_array(scores: Scores) -> Array:
    """[B, K]"""
    return np.array([[np.nan if one.value is None else one.value for one in row] for row in scores], dtype=np.float64)


def combine(values: Array, weights: Array) -> Array:
    """[B, K] -> [B]: the weighted sum of the rewards that apply; NaN where none does."""
    applies = ~np.isnan(values)
    total: Array = np.where(applies, values, 0.0) @ weights
    return np.where(applies.any(axis=1), total, np.nan)


__all__ = ["RewardSpec", "Rewards", "Sample", "Score", "Scores", "as_array", "combine", "specs_of"]
