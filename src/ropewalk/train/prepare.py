"""Everything of a run that can fail before torch is imported: its folder, its base, its tokenizer and template, its data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ropewalk.chat.template import Template
from ropewalk.models.hub import resolve_base
from ropewalk.train.config import Run
from ropewalk.train.data import Data, open_data
from ropewalk.train.folder import RunFolder, open_folder


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to load its model."""

    run: Run
    base: Path
    template: Template
    data: Data
    folder: RunFolder


def prepare(run: Run, *, restart: bool = False, quiet: bool = False) -> Prepared:
    """Checks and opens all that a run needs but the model; raises what the user must mend."""
    base = resolve_base(run.base_model, revision=run.revision_of_model)
    path = Path(run.output_dir)
    folder = open_folder(path, run.model_dump(mode="json"), restart=restart) if leads() else RunFolder(path)
    template = Template.load(base, run.chat_template)
    return Prepared(run, base, template, open_data(run, template, quiet=quiet), folder)


def leads() -> bool:
    """Whether this is the one process (of those torchrun started) that writes files."""
    return os.environ.get("RANK", "0") == "0"
