"""What could take its process down, so it has one of its own: torch, a training step, a reply, a file. A JSON line for each finding.

python -m ropewalk.doctor.probe {gpu|any} {test|look}
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

PART = "self-test"
CONFIG = """\
base_model: {base}
datasets:
  - path: {rows}
    type: chat_template
output_dir: {out}
adapter: lora
lora_r: 4
sequence_len: 256
micro_batch_size: 1
max_steps: 1
learning_rate: 1e-3
bf16: false
"""
ROW = {"messages": [{"role": "user", "content": "Which way is up?"}, {"role": "assistant", "content": "That way."}]}


def main() -> None:
    """Findings go to the standard output as they are made; whatever the work prints goes to the other one."""
    needed, what = sys.argv[1:3]
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        from ropewalk.doctor.device import device

        for finding in device(needed == "gpu"):
            print(json.dumps(finding.as_dict()), file=out, flush=True)
        if what == "test":
            with tempfile.TemporaryDirectory(prefix="ropewalk-doctor-") as folder:
                self_test(Path(folder), lambda line: print(json.dumps(line), file=out, flush=True))


def self_test(folder: Path, tell: Callable[[dict[str, str | None]], None]) -> None:
    """Each step by itself, in an empty home: of the real one nothing is read and nothing is written."""
    from ropewalk.doctor.findings import reason

    os.environ["ROPEWALK_HOME"] = str(folder / "home")
    os.environ["ROPEWALK_ROOT_KEY_FILE"] = str(folder / "root.key")
    for name in ("ROPEWALK_ROOT_KEY", "ROPEWALK_ROOT_KEY_COMMAND", "ROPEWALK_DATABASE_URL", "ROPEWALK_BLOBS"):
        os.environ.pop(name, None)
    steps: dict[str, Callable[[Path], str]] = {"file": keep_a_file, "training step": train_a_step, "reply": ask}
    for name, step in steps.items():
        tell({"begins": name})
        began = time.monotonic()
        try:
            said, state = step(folder), "ok"
        except Exception as error:  # the next step may still work
            said, state = reason(error), "broken"
        text = f"{said} ({time.monotonic() - began:.1f} s)"
        tell({"part": PART, "name": name, "state": state, "text": text, "fix": None})


def keep_a_file(folder: Path) -> str:
    """Stores a file, reads it, deletes it."""
    from ropewalk.errors import NotFound, VerificationFailed
    from ropewalk.files.local import open_local

    files, content = open_local(), os.urandom(100_000)
    file = files.put(content, "doctor.bin")
    with files.open(file.id) as opened:
        if opened.read() != content:
            raise VerificationFailed("what was read is not what was stored")
    receipt = files.delete(file.id)
    try:
        files.show(file.id)
    except NotFound:
        return f"stored, read and deleted; receipt {receipt.sequence} is signed"
    raise VerificationFailed("a deleted file is still there")


def train_a_step(folder: Path) -> str:
    """One step of LoRA on every expert of the quickstart's base; the adapter is read back and verified."""
    from ropewalk.config.run import load_run
    from ropewalk.quickstart.run import BASE
    from ropewalk.train.trainer import train

    rows, config = folder / "rows.jsonl", folder / "train.yml"
    rows.write_text(f"{json.dumps(ROW)}\n" * 4, encoding="utf-8")
    config.write_text(CONFIG.format(base=BASE, rows=rows, out=folder / "run"), encoding="utf-8")
    result = train(load_run(config), quiet=True)
    return f"loss {result.first_loss:.2f}, the adapter is verified"


def ask(folder: Path) -> str:
    """One reply of the quickstart's base, from an engine as `ropewalk serve` starts it."""
    from ropewalk.errors import VerificationFailed
    from ropewalk.home import home
    from ropewalk.quickstart.question import Asking
    from ropewalk.quickstart.run import BASE
    from ropewalk.registry import Registry

    registry = Registry(home() / "registry")
    registry.publish_base("doctor", BASE, {"origin": "shipped with Ropewalk"})
    with Asking(registry) as asking:
        (said,) = asking.answers("doctor", ["Which way is up?"], 8)
    if not said:
        raise VerificationFailed("the engine ran and said nothing")
    return f"the engine answered {len(said)} characters"


if __name__ == "__main__":
    main()
