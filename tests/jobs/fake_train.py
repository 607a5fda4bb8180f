"""`python fake_train.py run.yml --granted`: what `ropewalk train` is to its server, without a model.

Reads its files as they are granted, locks its run's folder, writes events and checkpoints, stops at SIGTERM with a checkpoint, goes on
from the newest. A row {"do": ...} of the data says what shall go wrong.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from ropewalk.files.granted import accept
from ropewalk.files.local import open_local

STEP_SECONDS = 0.03


def main():
    accept(sys.stdin.buffer)
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    run = Path(config["output_dir"])
    run.mkdir(exist_ok=True)
    lock = (run / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    rows = [json.loads(line) for line in open_local().open(config["datasets"][0]["path"])]
    prepared = Path(config["dataset_prepared_path"])
    prepared.mkdir(exist_ok=True)
    (prepared / "tokens.bin").write_text(json.dumps(rows))
    wrong = {row["do"] for row in rows if "do" in row}
    if "fail" in wrong:
        print("ropewalk: rows.jsonl:1: key 'messages': is missing; found 'a secret word'", file=sys.stderr)
        return 2
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    done = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
    print(f"goes on from step {done}", flush=True)
    told = run / "events.jsonl"
    known = told.read_text().splitlines() if done and told.exists() else []
    kept = [line for line in known if json.loads(line)["step"] <= done]
    fresh = run / "events.new"
    fresh.write_text("".join(line + "\n" for line in kept))
    fresh.replace(run / "events.jsonl")
    with (run / "events.jsonl").open("a") as events:
        tell = lambda **values: events.write(json.dumps(values) + "\n") and events.flush()
        if not done:
            tell(event="start", step=0, steps=config["max_steps"], rows=len(rows))
        for step in range(done + 1, config["max_steps"] + 1):
            time.sleep(STEP_SECONDS)
            tell(event="step", step=step, loss=1 / step, learning_rate=0.1, tokens=10 * step)
            if "short" in wrong and step == 3 and not Path("short").exists():
                Path("short").touch()
                print("ropewalk: the disk is full", file=sys.stderr)
                return 2
            if "crash" in wrong and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            if step % 2 == 0 or stopping:
                checkpoint(run / "checkpoints", f"step-{step:08d}")
                tell(event="checkpoint", step=step, path=f"checkpoints/step-{step:08d}")
            if stopping:
                print("ropewalk: stopped", file=sys.stderr)
                return 1
    adapter(run / "adapter")
    (run / "run.json").write_text(json.dumps({"state": "finished", "versions": {"fake": "1"}}))
    return 0


def checkpoint(folder, name):
    aside = folder / f".writing-{name}"
    adapter(aside)
    (aside / "optimizer.pt").write_text("what only a run needs that goes on")
    if not (folder / name).exists():
        aside.rename(folder / name)


def adapter(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")


if __name__ == "__main__":
    sys.exit(main())
