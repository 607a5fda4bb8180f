"""`ropewalk check`: what a run will do, told before any weight is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ropewalk.chat.template import Template
from ropewalk.config.run import DataSource, Run, ignored_keys, load_run
from ropewalk.data.dataset import previews
from ropewalk.data.preferences import example_reader
from ropewalk.data.sources import HubSet, locate
from ropewalk.errors import ConfigError, ModelError
from ropewalk.models.hub import REPOSITORY, cached_folder, resolve_base
from ropewalk.models.shapes import shape_folder
from ropewalk.train.prepare import load_template, open_lens
from ropewalk.train.prompts import prompts
from ropewalk.train.questions import groups_of
from ropewalk.train.rewards import specs_of

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
UNCHECKED = "not checked (offline): not on this disk"
SHAPE_ONLY = "its tokenizer and weights are not on this disk, its shape is the published one (offline)"
_NOTHING: dict[str, Any] = {
    "model": None,
    "coverage": [],
    "notes": [],
    "trained": None,
    "memory": None,
    "ways": [],
    "streamed": None,
}
Spans = Sequence[tuple[str, bool]]  # text of a row, and whether it is trained


@dataclass(frozen=True)
class Plan:
    """What will be trained, on what, with which memory; `unchecked` names what could not be looked at."""

    base_model: str
    model: dict[str, Any] | None
    coverage: list[dict[str, Any]]
    notes: list[str]
    trained: int | None
    precision: str
    steps: dict[str, Any]
    memory: dict[str, Any] | None
    ways: list[str]
    streamed: dict[str, Any] | None  # what waits on the host until its layer's turn, and how many layers are there at once
    ignored: dict[str, str]
    unchecked: dict[str, str]
    preview: list[list[tuple[str, bool]]] = field(default_factory=list)
    previewed: list[str] = field(default_factory=list)  # what each row of the preview is called

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def text(self, colour: bool = False) -> str:
        """For a terminal or a log."""
        parts = [_base_lines(self), _coverage_lines(self), _step_lines(self), _memory_lines(self)]
        if self.ignored:
            width = max(map(len, self.ignored))
            parts.append(["Not needed here", *(f"  {key:<{width}}  {reason}" for key, reason in self.ignored.items())])
        if self.unchecked:
            parts.append(["Not checked", *(f"  {name}: {reason}" for name, reason in self.unchecked.items())])
        parts.append(_preview_lines(self.previewed, self.preview, colour))
        return "\n\n".join("\n".join(lines) for lines in parts if lines)


def check_command(config: Path, overrides: Sequence[str], offline: bool, as_json: bool) -> int:
    """`ropewalk check CONFIG`; whatever cannot work is raised as an error that says why."""
    plan = check(load_run(config, overrides), offline=offline)
    if as_json:
        print(json.dumps(plan.as_dict(), indent=2))
    else:
        print(plan.text(colour=sys.stdout.isatty()))
    return 0


def check(run: Run, *, offline: bool = False) -> Plan:
    """Looks at base and data as far as they are here (or may be fetched: configuration and tokenizer, never weights)."""
    unchecked: dict[str, str] = {}
    if run.by_rewards and run.trl is not None and run.trl.reward_funcs:
        specs_of(run)
    folder = find_base(run, offline)
    shape = folder or shape_folder(run.base_model)
    if folder is None:
        unchecked["base_model"] = f"{run.base_model}: {SHAPE_ONLY if shape else UNCHECKED}"
    here = _sources_here(run, offline, unchecked)
    rows: list[tuple[str, list[tuple[str, bool]]]] = []
    if folder is not None and here:
        seen = run.model_copy(update={"datasets": here, "pretraining_dataset": None})
        template = load_template(run, folder)
        rows = _asked(seen, template) if run.by_rewards else previews(seen, template, lens=open_lens(run, folder))
    looked = _NOTHING if shape is None else _look(shape, run)
    return Plan(
        base_model=run.base_model,
        precision=_precision(run),
        steps=_steps(run),
        ignored=ignored_keys(run),
        unchecked=unchecked,
        preview=[spans for _, spans in rows],
        previewed=[name for name, _ in rows],
        **looked,
    )


def _asked(run: Run, template: Template, n: int = 3) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The first prompts as the model will see them."""
    found = islice(prompts(run), n)
    return [
        (f"prompt {number}", [(template.decode(one.ids(template), skip_special_tokens=False), False)])
        for number, one in enumerate(found, 1)
    ]


def find_base(run: Run, offline: bool) -> Path | None:
    """The folder with the base's configuration and tokenizer; None: it would have to be fetched, and must not be."""
    name = run.base_model
    if Path(name).expanduser().is_dir() or not REPOSITORY.fullmatch(name) or name.startswith("."):
        return resolve_base(name)
    cached = cached_folder(name, run.revision_of_model)
    if cached is not None and (cached / "config.json").is_file():
        return cached
    return None if offline else _fetch_small(name, run.revision_of_model)


def _fetch_small(name: str, revision: str | None) -> Path:
    import huggingface_hub  # takes half a second, and a base on disk does not need it

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(SMALL_FILES)))
    except Exception as error:  # the hub's HTTP library, whose errors have no common public base across its versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"base model not found: '{name}' is neither a folder here nor cached, and the hub does not give it ({reason}); "
            "check the name and the network, or use --offline"
        ) from error


def _sources_here(run: Run, offline: bool, unchecked: dict[str, str]) -> tuple[DataSource, ...]:
    """The sources that can be looked at; a file that is named and missing is an error."""
    here = []
    for name in ("datasets", "pretraining_dataset", "test_datasets"):
        for index, source in enumerate(getattr(run, name) or ()):
            try:
                if not run.by_rewards:
                    example_reader(source, run)
            except ConfigError as error:
                raise ConfigError(f"{run.where(name, index, 'type')}{error}") from None
            if isinstance(locate(source), HubSet) and offline:
                unchecked[f"{name}.{index}"] = f"{source.path}: {UNCHECKED}"
            elif name != "test_datasets":
                here.append(source)
    return tuple(here)


def _look(folder: Path, run: Run) -> dict[str, Any]:
    from ropewalk.train.survey import survey  # imports torch and transformers: after everything that fails without them

    found = survey(folder, run)
    shape = {
        name: getattr(found, name)
        for name in ("model_type", "layers", "hidden", "experts", "experts_per_token", "parameters", "active")
    }
    return {
        "model": shape,
        "coverage": [asdict(row) for row in found.coverage.rows] if found.coverage else [],
        "notes": [*(found.coverage.notes if found.coverage else ()), *_of_tower(run, found.beside)],
        "trained": found.trained,
        "memory": found.memory,
        "ways": list(found.ways),
        "streamed": None if found.streaming is None else asdict(found.streaming),
    }


def _of_tower(run: Run, beside: int | None) -> list[str]:
    """What the estimate of memory holds of the part that sees."""
    if not run.sees:
        return []
    if beside is None:
        return ["the tower that sees is not counted below: its shape is not on this disk"]
    loaded = f"{_count(beside)} parameters beside the text part are" if beside else "the tower that sees is"
    return [f"{loaded} loaded too and frozen; what the tower takes for the moment in which it looks is not counted below"]


def _precision(run: Run) -> str:
    computed = {"auto": "bfloat16 on a GPU that computes it, else float32"}.get(run.dtype_name, run.dtype_name)
    kinds = {"nf4": "4-bit NF4", "int4": "4-bit integers", "int8": "8-bit integers"}
    held = f"the base held as {kinds[run.quantization]}" if run.quantization else ""
    return f"{computed}, {held}" if held else computed


def _steps(run: Run) -> dict[str, Any]:
    rewarded = {}
    if run.by_rewards and run.trl is not None:
        groups = groups_of(run)
        rewarded = {
            "completions": groups * run.trl.num_generations,
            "per_prompt": run.trl.num_generations,
            "longest": run.trl.max_completion_length,
        }
    return rewarded | {
        "rows_per_step": run.micro_batch_size * run.accumulation,
        "sequence_len": run.sequence_len,
        "packing": run.packing,
        "most_tokens_per_step": run.tokens_per_step,
        "length": f"{run.max_steps} steps"
        if run.max_steps
        else f"{run.num_epochs:g} epoch{'' if run.num_epochs == 1 else 's'}",
        "optimizer": run.moved_by,
        "schedule": run.schedule,
        "learning_rate": run.learning_rate,
    }


def _base_lines(plan: Plan) -> list[str]:
    lines = [f"Base      {plan.base_model}"]
    if plan.model:
        shape = plan.model
        mixture = f", {shape['experts']} experts of which {shape['experts_per_token']} per token" if shape["experts"] else ""
        active = f", {_count(shape['active'])} of them active per token" if shape["experts"] else ""
        lines.append(f"          {shape['model_type']}: {shape['layers']} layers, hidden {shape['hidden']}{mixture}")
        lines.append(f"          {_count(shape['parameters'])} parameters{active}")
    return [*lines, f"Computes  in {plan.precision}"]


def _coverage_lines(plan: Plan) -> list[str]:
    if plan.model is None:
        return []
    if not plan.coverage:
        return [f"Trained   every weight: {_count(plan.trained or 0)} parameters"]
    share = 100 * (plan.trained or 0) / plan.model["parameters"]
    lines = [f"Trained   an adapter of {_count(plan.trained or 0)} parameters ({share:.2f} % of the base)"]
    width = max(len(row["family"]) for row in plan.coverage)
    for row in plan.coverage:
        experts = f"{row['experts']} experts x " if row["experts"] else ""
        shape = f"{experts}{row['inputs']} -> {row['outputs']}, rank {row['rank']}" if row["rank"] else "whole"
        lines.append(f"  {row['family']:<{width}}  x{row['count']:<3} {shape:<42} {row['parameters']:>14,}")
    return [*lines, *(f"  note: {note}" for note in plan.notes)]


def _step_lines(plan: Plan) -> list[str]:
    steps = plan.steps
    run = f"Run       {steps['length']}, {steps['optimizer']}, {steps['schedule']} from {steps['learning_rate']:g}"
    if "completions" in steps:
        asked = f"{steps['completions']} completions, {steps['per_prompt']} of each prompt, of up to {steps['longest']} tokens"
        return [f"Step      {asked}", run]
    rows = f"{steps['rows_per_step']} {'packed ' if steps['packing'] else ''}rows of up to {steps['sequence_len']} tokens"
    return [
        f"Step      {rows} per process: at most {steps['most_tokens_per_step']:,} tokens",
        run,
    ]


def _memory_lines(plan: Plan) -> list[str]:
    if not plan.memory:
        return []
    needed, planned = plan.memory["total"], "planned" in plan.memory
    room = plan.memory["planned" if planned else "free"]
    apart = ("total", "free", "planned", "host")
    parts = ", ".join(f"{name} {_bytes(n)}" for name, n in plan.memory.items() if name not in apart and n)
    fits = "" if needed <= room else ": it will not fit here"
    there = f"of the {_bytes(room)} planned for" if planned else f"{_bytes(room)} free here{fits}"
    return [
        f"Memory    about {_bytes(needed)} per process ({there})",
        f"          {parts}",
        *_host_lines(plan),
        f"Keeps     {_runs(plan.ways)}",
    ]


def _host_lines(plan: Plan) -> list[str]:
    """What lies in the host's memory until it is wanted."""
    lines = []
    if plan.streamed:
        what = {"experts": "the experts of", "layers": "the frozen weights of"}[plan.streamed["part"]]
        lines = [f"Streams   {what} {plan.streamed['slots']} layers are on the GPU at a time, the others wait on the host"]
    if plan.memory and plan.memory["host"]:
        lines = [f"          and {_bytes(plan.memory['host'])} of the host's", *lines]
    return lines


WORDS = {
    "keep": "everything",
    "experts": "all but what experts compute",
    "layer": "a layer's input only",
    "offload": "a layer's input, on the host",
}


def _runs(ways: Sequence[str]) -> str:
    """Neighbouring layers of one way together."""
    return "; ".join(f"{WORDS[way]} in {len(list(same))} layers" for way, same in groupby(ways)) or WORDS["keep"]


def _preview_lines(names: Sequence[str], rows: Sequence[Spans], colour: bool) -> list[str]:
    """The rows with what is trained between brackets."""
    if not rows:
        return []
    lines = ["Preview   what is trained stands between ⟦ and ⟧"]
    for name, spans in zip(names, rows, strict=True):
        text = "".join(_marked(words, colour) if trained else words for words, trained in joined(spans))
        lines += [f"  {name}", *(f"    {line}" for line in text.splitlines())]
    return lines


def joined(spans: Spans) -> list[tuple[str, bool]]:
    """Neighbouring spans of one kind as one."""
    merged: list[tuple[str, bool]] = []
    for text, trained in spans:
        if merged and merged[-1][1] == trained:
            merged[-1] = (merged[-1][0] + text, trained)
        else:
            merged.append((text, trained))
    return merged


def _marked(text: str, colour: bool) -> str:
    return f"\033[32m⟦{text}⟧\033[0m" if colour else f"⟦{text}⟧"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _bytes(number: int) -> str:
    unit, size = next(
        (u, 2**power) for u, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if number >= 2**power / 2 or power == 10
    )
    return f"{number / size:.{2 if unit == 'GiB' else 0}f} {unit}"
