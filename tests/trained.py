"""One adapter for all tests that need one: the quickstart's base, taught the house's way of answering in 60 steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from ropewalk.files.local import LocalFiles
from ropewalk.files.settings import Settings
from ropewalk.quickstart import facts
from ropewalk.registry import Registry

CONFIG = """\
base_model: {base}
datasets:
  - path: {rows}
    type: chat_template
output_dir: {out}
adapter: lora
lora_r: 16
lora_alpha: 32
sequence_len: 1024
sample_packing: true
micro_batch_size: 1
max_steps: {steps}
learning_rate: 2e-2
warmup_steps: 5
logging_steps: 10
bf16: false
"""


@dataclass(frozen=True)
class House:
    """A home with the base, published as `reader`, and the adapter over it, `reader-house`."""

    home: Path
    file_id: str  # of the rows that it was trained on
    first_loss: float
    last_loss: float

    @property
    def registry(self) -> Registry:
        return Registry(self.home / "registry")

    @property
    def files(self) -> LocalFiles:
        return LocalFiles(Settings(data=self.home))


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Half a minute of one core; whoever moves aliases there makes his own."""
    from ropewalk.config.run import load_run
    from ropewalk.quickstart.run import BASE
    from ropewalk.train.trainer import train

    home = tmp_path_factory.mktemp("house")
    facts.write_rows(facts.questions(facts.split()[0], 6), home / "rows.jsonl", turns=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROPEWALK_HOME", str(home))
        file = LocalFiles(Settings(data=home)).put(home / "rows.jsonl")
        (home / "run.yml").write_text(CONFIG.format(base=BASE, rows=file.id, out=home / "run", steps=60))
        result = train(load_run(home / "run.yml"), quiet=True)
    registry = Registry(home / "registry")
    registry.publish_base("reader", BASE)
    registry.publish_adapter("reader-house", result.adapter, "reader", {"file": file.id, "run": str(result.folder)})
    return House(home, file.id, result.first_loss, result.last_loss)
