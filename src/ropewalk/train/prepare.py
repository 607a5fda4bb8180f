"""Everything of a run that can fail before torch is imported: its folder, its base, its tokenizer and template, its data."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.chat.template import Template
from ropewalk.config.run import Run
from ropewalk.data.dataset import Data, open_data
from ropewalk.models.hub import ensure_tokenizer, resolve_base
from ropewalk.train.folder import RunFolder, join_folder, open_folder
from ropewalk.train.questions import Questions, open_questions

if TYPE_CHECKING:
    from ropewalk.models.lens import Lens  # which needs torch


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to load its model."""

    run: Run
    base: Path
    template: Template
    data: Data | Questions  # prompts, where it is trained by rewards
    folder: RunFolder
    trusted: bool = False  # whether code that comes with the base may run; said on the command line only
    lens: Lens | None = None  # of a run on pictures

    @property
    def shows(self) -> bool:
        """Whether there is a picture to learn from; without one the text part alone is loaded."""
        return self.lens is not None and isinstance(self.data, Data) and self.data.shows


def prepare(run: Run, *, restart: bool = False, trust_remote_code: bool = False, quiet: bool = False) -> Prepared:
    """Checks and opens all that a run needs but the model; raises what the user must mend."""
    path = Path(run.output_dir)
    folder = (
        open_folder(path, run.model_dump(mode="json"), restart=restart or not run.resumes) if leads() else join_folder(path)
    )
    try:
        told = None if quiet else tell
        base = resolve_base(run.base_model, run.revision_of_model, trust_remote_code=trust_remote_code, tell=told)
        template = load_template(run, base)
        lens = open_lens(run, base)
        still = quiet or not leads()
        data = open_questions(run, template) if run.by_rewards else open_data(run, template, quiet=still, lens=lens)
        return Prepared(run, base, template, data, folder, trust_remote_code, lens)
    except BaseException:
        folder.close()
        raise


def open_lens(run: Run, base: Path) -> Lens | None:
    """How the base is shown pictures, for a run on some."""
    if not run.sees:
        return None
    from ropewalk.models.lens import Lens  # only processors know how many ids a picture has, and they need torch

    return Lens.of(base)


def load_template(run: Run, base: Path) -> Template:
    """The tokenizer and chat template of a run."""
    source = resolve_base(run.tokenizer_config) if run.tokenizer_config else base
    return Template.load(
        ensure_tokenizer(source),
        run.chat_template,
        chat_template_jinja=run.chat_template_jinja,
        special_tokens=run.special_tokens.model_dump(exclude_none=True) if run.special_tokens else None,
        tokens=run.tokens or (),
        eot_tokens=run.eot_tokens or (),
        variables=run.chat_template_kwargs,
    )


def leads() -> bool:
    """Whether this is the one process (of those torchrun started) that writes files."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str) -> None:
    print(line, file=sys.stderr)
