"""Runs that are trained by rewards, for tests: a reward that a tiny model can learn, and what their logs say."""

from ropewalk.config.run import load_run
from ropewalk.train.progress import read_events
from ropewalk.train.trainer import train

# What it rewards is the later half of the vocabulary.
REWARD = """
def late(completion, completion_ids):
    return sum(id > 130 for id in completion_ids) / 8
"""


def keys_of(folder, trl=None, **keys):
    """The keys of a run with that reward, whose module is written into the folder."""
    (folder / "rewards.py").write_text(REWARD)
    block = {
        "reward_funcs": [f"{folder}/rewards.py:late"],
        "num_generations": 4,
        "generation_batch_size": 16,
        "max_completion_length": 8,
    } | (trl or {})
    return {"rl": "grpo", "trl": block, "sample_packing": None, "max_steps": 3, "learning_rate": 0.03} | keys


def fit(path):
    return train(load_run(path), quiet=True)


def events(folder, kind):
    return [e for e in read_events(folder / "events.jsonl") if e["event"] == kind]


def steps(folder):
    return events(folder, "step")


def told(folder, *names):
    return [[e[name] for name in names] for e in steps(folder)]
