"""base + adapter -> a plain checkpoint, file by file: no more than one parameter's change is in memory at a time.

Every file keeps its layout and its untouched bytes. Sums are made in float32 and rounded once to the checkpoint's own type. The
result is compared with base and adapter through PEFT before it gets its name.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ropewalk.errors import ModelError, OutputError, VerificationFailed
from ropewalk.models.adapter_folder import CONFIG, through_peft
from ropewalk.models.changes import Changes, UnknownParameter
from ropewalk.models.folder import INDEX, check_folder, read_header
from ropewalk.models.layout import Layout
from ropewalk.models.load import Scored, auto_class, load_base, load_config, quiet, text_prefixes
from ropewalk.models.stored import stored_as

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_16 = 3e-2  # of the logits' norm: the adapter is rounded into 16 bits once, and close routing may tip over
BESIDES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "README.md")


def merge(base: Path, adapter: Path, out: Path, *, verify: bool = True) -> float:
    """Write the merged checkpoint to `out`, which must not exist -> how far its logits are from base and adapter's."""
    files = check_folder(base)
    if out.exists():
        raise OutputError(f"{out} exists already; name a folder that does not")
    if stored_as(base) is not None:
        with _plainly(base, out) as plain:
            return merge(plain, adapter, out, verify=verify)
    plan = _plan(base, adapter)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
        _make_room(temporary, files)
        for file in files:
            _rewrite(file, temporary / file.name, plan)
        if plan.waiting:
            raise AssertionError(f"no file held {sorted(plan.waiting)[:3]}")
        for path in _besides(base):
            shutil.copy2(path, temporary / path.name)
        difference = _verify(base, adapter, temporary, plan) if verify else 0.0
        temporary.rename(out)
        return difference
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}; free space or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _plainly(base: Path, out: Path) -> Iterator[Path]:
    """A base that is stored in few bits as a plain checkpoint, which a change can be added to; it is wholly in memory once."""
    whole = AutoConfig.from_pretrained(base).model_type != load_config(base).model_type
    model = load_base(base, device="cpu", experts_implementation=None, whole=whole)
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_room(out.parent, 2 * sum(parameter.nbytes for parameter in model.parameters()))  # with what is merged
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".plain", dir=out.parent) as folder:
        for path in _besides(base):
            if path.name != INDEX:  # of other files than these
                shutil.copy2(path, folder)
        with quiet():
            model.save_pretrained(folder)
        del model
        gc.collect()
        yield Path(folder)


@dataclass
class _Plan:
    """Which tensors on disk change, and the pieces of changes that are waiting for theirs to be read."""

    changes: Changes
    layout: Layout
    groups: dict[str, tuple[str, ...]]  # tensor on disk -> the parameters that lie in it
    waiting: set[str]
    whole: bool  # the adapter is for all of a multimodal model, not for its text part
    scored: Scored | None  # the base scores instead of writing
    pieces: dict[str, Tensor]

    def new_value(self, name: str, old: Tensor) -> Tensor:
        """What replaces the tensor `name` of the files."""
        self.waiting.discard(name)
        group = self.groups[name]
        first = self.changes.by_parameter.get(group[0])
        if first is not None and first.needs_weight:
            if len(group) > 1 or old.shape != self.layout.model.get_parameter(group[0]).shape:
                raise ModelError(f"{name} holds several layers, and DoRA cannot be merged into a part of it")
            return self.changes.with_magnitude(group[0], old)
        if name not in self.pieces:
            self._make(group)
        piece = self.pieces.pop(name)
        if piece.shape != old.shape:
            raise ModelError(f"{name} is {tuple(old.shape)} in the base and {tuple(piece.shape)} in the adapter")
        return piece if first is not None and "whole" in first.keys else old.float() + piece

    def _make(self, group: tuple[str, ...]) -> None:
        """Compute the change of a group and cut it as the files do."""
        changes = {}
        for parameter in group:
            known = parameter in self.changes.by_parameter
            value = self.changes.whole(parameter) if known else torch.zeros(self.layout.model.get_parameter(parameter).shape)
            changes[parameter] = self.changes.delta(parameter) if value is None else value
        made = self.layout.on_disk(changes)
        assert made is not None
        self.pieces |= made


def _plan(base: Path, adapter: Path) -> _Plan:
    """Resolve the adapter against the text part, or else against the whole of a multimodal model; nothing is read yet."""
    text, whole = load_config(base), AutoConfig.from_pretrained(base)
    scored = _scored(adapter, text)
    try:
        model = _skeleton(text, scored)
        changes = Changes(adapter, model)
        prefixes, is_whole = text_prefixes(base, text), False
    except UnknownParameter:
        if whole.model_type == text.model_type:
            raise
        model = _skeleton(whole)
        changes, prefixes, is_whole = Changes(adapter, model), {}, True
    layout = Layout(base, model, prefixes)
    groups: dict[str, tuple[str, ...]] = {}
    for parameter in changes.by_parameter:
        group = tuple(layout.group(parameter))
        names = layout.on_disk({name: torch.empty(model.get_parameter(name).shape, device="meta") for name in group})
        groups |= dict.fromkeys(names or (), group)
    return _Plan(changes, layout, groups, set(groups), is_whole, scored, {})


def _scored(adapter: Path, config: PretrainedConfig) -> Scored | None:
    """What an adapter's base gives instead of text, if its folder says so."""
    path = adapter / CONFIG
    task = json.loads(path.read_text()).get("task_type") if path.is_file() else None
    return Scored(task == "TOKEN_CLS", config.num_labels) if task in ("SEQ_CLS", "TOKEN_CLS") else None


def _skeleton(config: PretrainedConfig, scored: Scored | None = None) -> PreTrainedModel:
    maker = scored.maker(config) if scored else auto_class(config)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = maker.from_config(config)
    return model


def _make_room(temporary: Path, files: list[Path]) -> None:
    temporary.mkdir(parents=True)
    _check_room(temporary.parent, sum(file.stat().st_size for file in files))


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"the merged checkpoint needs {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free")


def _besides(base: Path) -> set[Path]:
    """What a checkpoint has besides its weights."""
    return {path for pattern in BESIDES for path in base.glob(pattern) if path.is_file()}


def _rewrite(source: Path, target: Path, plan: _Plan) -> None:
    """Copy a safetensors file with the planned tensors replaced; names, shapes, types and order stay, so its table does too."""
    header = read_header(source)
    with source.open("rb") as reading, target.open("wb") as writing:
        table = 8 + int.from_bytes(reading.read(8), "little")
        reading.seek(0)
        writing.write(reading.read(table))
        for name, entry in sorted(header.items(), key=lambda item: int(item[1]["data_offsets"][0])):
            start, end = entry["data_offsets"]
            reading.seek(table + start)
            if name in plan.groups:
                old = _tensor(source, name, entry, reading.read(end - start))
                writing.write(_bytes(plan.new_value(name, old).to(old.dtype)))
            else:
                _copy(reading, writing, end - start)
        writing.flush()
        os.fsync(writing.fileno())


def _tensor(file: Path, name: str, entry: dict[str, Any], data: bytes) -> Tensor:
    if entry["dtype"] not in FLOATS:
        raise ModelError(f"{file}: '{name}' is stored as {entry['dtype']}, and a merge needs the unquantised checkpoint")
    return torch.frombuffer(bytearray(data), dtype=FLOATS[entry["dtype"]]).view(entry["shape"])


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _copy(reading: BinaryIO, writing: BinaryIO, count: int) -> None:
    while count:
        data = reading.read(min(count, 1 << 24))
        writing.write(data)
        count -= len(data)


@torch.no_grad()
def _verify(base: Path, adapter: Path, merged: Path, plan: _Plan) -> float:
    """Compare logits with those of base and adapter through PEFT, one model in memory at a time -> |difference| / |logits|."""
    model = _load(base, plan)
    ids = (torch.arange(16).unsqueeze(0) * 7919 + 3) % model.get_input_embeddings().weight.shape[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = through_peft(model, adapter)[0].eval()(input_ids=ids, use_cache=False).logits.float()
    dtype = model.dtype
    del model
    gc.collect()
    found = _load(merged, plan)(input_ids=ids, use_cache=False).logits.float()
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference <= TOLERANCE.get(dtype, TOLERANCE_16):
        raise VerificationFailed(
            f"the merged checkpoint's logits differ from those of {base} with {adapter} by {difference:.2g} of their size, where "
            f"at most {TOLERANCE.get(dtype, TOLERANCE_16):.0e} comes from rounding; nothing was written"
        )
    return difference


def _load(folder: Path, plan: _Plan) -> PreTrainedModel:
    if plan.whole:
        model: PreTrainedModel = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, use_safetensors=True)
        return model.eval()
    return load_base(folder, device="cpu", experts_implementation="eager", scored=plan.scored)
