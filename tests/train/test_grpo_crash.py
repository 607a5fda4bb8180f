"""A training by rewards that is killed goes on as if nothing had happened, and leaves no process behind."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ropewalk.config.run import load_run
from ropewalk.train.progress import read_events
from ropewalk.train.trainer import train

REWARD = """
def late(completion, completion_ids):
    return sum(id > 130 for id in completion_ids) / 8
"""
PATIENCE = 120.0  # seconds; a busy machine is no fault of a run
TOLD = {
    "step": ("step", "loss", "gradient_norm", "tokens", "reward", "reward_std", "rewards/late", "length", "ended", "entropy", "varied"),
    "samples": ("step", "samples"),
    "eval": ("step", "reward", "length"),
    "checkpoint": ("step",),
}  # fmt: skip


def story(folder):
    """What an event log says, without what a clock says."""
    return [
        [e["event"], *(e[name] for name in TOLD[e["event"]])]
        for e in read_events(folder / "events.jsonl")
        if e["event"] in TOLD
    ]


def descendants(pid):
    """Of all processes below this one: their numbers, and when each began, as numbers are given again."""
    found, waiting = {}, [pid]
    while waiting:
        for path in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                children = [int(word) for word in path.read_text().split()]
            except OSError:
                continue
            found |= {child: began for child in children if (began := alive(child))}
            waiting += children
    return found


def alive(pid):
    """When it began; nothing where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc")
def test_a_killed_run_goes_on_as_if_nothing_had_happened_and_leaves_no_worker(config, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)
    trl = {"reward_funcs": [f"{tmp_path}/rewards.py:late"], "num_generations": 4, "generation_batch_size": 16}
    trl |= {"max_completion_length": 8, "reward_num_workers": 2}
    keys = {"rl": "grpo", "trl": trl, "sample_packing": None, "max_steps": 16, "learning_rate": 0.03, "save_steps": 2}
    keys |= {"val_set_size": 4, "eval_steps": 4, "save_total_limit": 2}
    train(load_run(config(**keys, output_dir=str(tmp_path / "peace"))), quiet=True)
    path, log = config(**keys), tmp_path / "run" / "events.jsonl"
    R, killed = random.Random(3), []
    for least in (R.randint(1, 4), R.randint(6, 9)):
        with (tmp_path / "log.txt").open("ab") as out:
            command = [sys.executable, "-m", "ropewalk", "train", str(path)]
            process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
        until(lambda: max((e.get("step", 0) for e in read_events(log)), default=0) >= least or process.poll() is not None)  # noqa: B023
        time.sleep(R.uniform(0, 0.05))
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        below = descendants(process.pid)
        assert len(below) >= 2  # the workers of the reward
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.append(max(e.get("step", 0) for e in read_events(log)))
        until(lambda: not any(alive(pid) == began for pid, began in below.items()))  # noqa: B023
    assert killed[0] < killed[1] < 16  # it went on, and was not at its end
    train(load_run(path), quiet=True)
    assert story(tmp_path / "run") == story(tmp_path / "peace")
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "peace")]
    assert adapters[0] == adapters[1]
    assert (tmp_path / "run" / "samples.html").exists()
