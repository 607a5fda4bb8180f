"""An environment over several turns: the model guesses a number and is told whether to go higher or lower.

A row of the data holds the number: {"number": 42, "most": 100}
"""

import re

from ropewalk.train.environment import Step


class GuessNumber:
    """One game."""

    def reset(self, row):
        self.number, self.guesses = row["number"], 0
        return [{"role": "user", "content": f"I think of a number from 1 to {row.get('most', 100)}. Guess it."}]

    def step(self, reply):
        self.guesses += 1
        found = re.findall(r"\d+", reply)
        if not found:
            return Step([{"role": "user", "content": "That is no number. Guess again."}], reward=-0.1)
        guess = int(found[-1])
        if guess == self.number:
            return Step(reward=1.0, done=True)
        return Step([{"role": "user", "content": "higher" if guess < self.number else "lower"}])
