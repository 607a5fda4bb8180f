"""One architecture, tiny, from its checkpoint into 4 bits and back: what is held, what LoRA computes on it, and what merging writes.

The weights are laid on the grid of the format first, so that the model as it was built, the base in 4 bits and the merged checkpoint stand for the
same numbers: quantising loses nothing, and whatever differs is wrong. Widths need be no multiple of a block, since the last one is filled up.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ropewalk.kernels.quant import FORMATS, Quantised
from ropewalk.models.day0 import TOKENS, TOLERANCE, build, crowd, gradients, stir, with_delta, worst
from ropewalk.models.experts import expert_modules
from ropewalk.models.layout import SharedWeight
from ropewalk.models.load import Scored, load_base, quiet
from ropewalk.models.lora import Adapter, LoraSpec, attach
from ropewalk.models.merge import merge
from ropewalk.models.quantized import to_quantise
from ropewalk.models.targets import SCORES, special, text_part
from ropewalk.models.tiny import FIRST_FREE_ID, VOCABULARY

FORMAT = "nf4"
FILE = "100KB"  # so that a tiny checkpoint has several files
HALF_PLACE = 2**-8  # of a number in bfloat16: half a unit in its last place
ROUNDING = 1e-6  # of the largest number of a tensor: the float32 in which sums are made
LOGITS = 1e-4  # relative: weights rounded to float32 once, and a forward pass


@dataclass(frozen=True)
class Held:
    """How far apart the built model, its base in 4 bits and the merged checkpoint are, and what is not in 4 bits."""

    architecture: str
    checkpoint: str  # the class that was saved
    model: str  # the class that was loaded
    files: int
    held: int  # linear layers and stacks of experts in 4 bits
    left: dict[str, int]  # other matrices: why they are not -> how many
    factors: int  # LoRA tensors compared
    dtype: str
    loaded: float  # relative difference of the logits before there is an adapter
    error: float  # of the worst gradient
    where: str
    loss: float  # relative difference
    merged: float | None  # relative difference of the merged checkpoint's logits
    rounded: float | None  # merged in bfloat16: the furthest number, as a share of what rounding the sum once may cost
    unmerged: str = ""  # why it cannot be merged
    in_float32: float | None = None  # what float32 gave, where it took float64 to pass

    @property
    def passed(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> str:
        """What is further apart than it may be."""
        found = {
            f"gradient of {self.where}": (self.error, TOLERANCE),
            "loss": (self.loss, TOLERANCE),
            "logits as loaded": (self.loaded, LOGITS),
            "logits as merged": (0.0 if self.merged is None and self.unmerged else self.merged, LOGITS),
            "merged in bfloat16, against rounding once": (0.0 if self.rounded is None and self.unmerged else self.rounded, 1.0),
        }
        wrong = [f"{what} {value}" for what, (value, most) in found.items() if value is None or not value <= most]
        return ", ".join(wrong if self.held else ["nothing is in 4 bits", *wrong])


def hold(architecture: str, kind: Any, folder: Path) -> Held:
    """Through an empty folder; in float32, and where its rounding alone is more than the tolerance, in float64."""
    torch.manual_seed(0)
    model = build(checkpoint_class(kind))
    lay_on_grid(model)
    with quiet():
        model.save_pretrained(folder / "base", max_shard_size=FILE)
    single = _hold(architecture, model, folder, torch.float32)
    return single if single.passed else replace(_hold(architecture, model, folder, torch.float64), in_float32=single.error)


def checkpoint_class(kind: Any) -> Any:
    """What is published of an architecture: of one that also sees, all of it and not its text part."""
    own = [c for c in vars(sys.modules[kind.__module__]).values() if isinstance(c, type) and c.__module__ == kind.__module__]
    seeing = [c for c in own if getattr(c, "config_class", None) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    whole = [c for c in seeing if c.__name__.endswith("ForConditionalGeneration")]
    return kind if not whole or kind.config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else whole[0]


@torch.no_grad()
def lay_on_grid(model: Any) -> None:
    """Every weight that will be quantised becomes what its quantised form stands for."""
    stir(model.parameters())
    for name in to_quantise(model):
        parameter = model.get_parameter(name)
        parameter.copy_(FORMATS[FORMAT].of(parameter).dequantize(parameter.dtype))


def _hold(architecture: str, model: Any, folder: Path, dtype: torch.dtype) -> Held:
    base, out = folder / "base", folder / str(dtype)[6:]
    held = _load(base, model, dtype, quantize=FORMAT)
    plain = _load(base, model, dtype, experts_implementation="eager")
    torch.manual_seed(2)
    ids = torch.randint(FIRST_FREE_ID, VOCABULARY, TOKENS)
    loaded = _apart(_logits(held, ids), _logits(model.to(dtype), ids))
    quantised = {name: module for name, module in held.named_modules(remove_duplicate=False) if isinstance(module, Quantised)}
    for name, module in quantised.items():
        plain.get_parameter(name).data.copy_(module.dequantize(dtype))
    left = dict(left_plain(held))
    adapter = _adapt(held, dtype)
    error, where, loss, factors = _gradients_apart(held, plain, adapter, set(quantised), ids)
    adapter.save(out / "adapter")
    merged, rounded, unmerged = None, None, ""
    try:
        merge(base, out / "adapter", out / "merged")
    except SharedWeight as reason:
        unmerged = str(reason).removeprefix(f"{base}: ")
    else:
        merged = _apart(_logits(_load(out / "merged", model, dtype), ids), _logits(held, ids))
        rounded = _in_16_bits(base, out, folder / f"{out.name}_16")
    return Held(
        architecture=architecture,
        checkpoint=type(model).__name__,
        model=type(held).__name__,
        files=len(list(base.glob("*.safetensors"))),
        held=len(set(quantised.values())),
        left=left,
        factors=factors,
        dtype=str(dtype)[6:],
        loaded=loaded,
        error=error,
        where=where,
        loss=loss,
        merged=merged,
        rounded=rounded,
        unmerged=unmerged,
    )


def _load(folder: Path, model: Any, dtype: torch.dtype, **options: Any) -> Any:
    scored = Scored(True, model.config.num_labels) if type(model).__name__.endswith("ForTokenClassification") else None
    return load_base(folder, dtype=dtype, device="cpu", attn_implementation="eager", scored=scored, **options)


def _adapt(held: Any, dtype: torch.dtype) -> Adapter:
    """Every linear layer and every stack of experts; a layer that scores whole, without which PEFT reads no adapter of such a model."""
    scoring = tuple(name for name in SCORES if hasattr(held, name))
    adapter = attach(held, LoraSpec(r=4, alpha=8, modules_to_save=scoring), seed=0, dtype=dtype)
    stir(adapter.parameters())
    with torch.no_grad():
        for parameters in adapter.trained.values():
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapter


def _gradients_apart(
    held: Any, plain: Any, adapter: Adapter, quantised: set[str], ids: Tensor
) -> tuple[float, str, float, int]:
    """The worst gradient and where, the loss, and the LoRA tensors: on the base in 4 bits, and with W + s B A written out over the plain one."""
    trained = adapter.named_parameters()
    theirs = {name: p for name, p in plain.named_parameters() if name not in quantised} | trained
    ours = {name: p for name, p in held.named_parameters() if name in theirs} | trained
    for tensor in (*ours.values(), *theirs.values()):
        tensor.requires_grad_(True)
    hooks = [m.register_forward_pre_hook(crowd, with_kwargs=True) for of in (held, plain) for _, m in expert_modules(of)]
    torch.manual_seed(1)  # some models draw noise in their forward
    our_loss, found = gradients(ours, held(input_ids=ids, use_cache=False))
    torch.manual_seed(1)
    true_loss, truth = gradients(theirs, with_delta(plain, adapter, ids))
    for hook in hooks:
        hook.remove()
    error, where = worst(found, truth)
    return error, where, abs(our_loss - true_loss) / abs(true_loss), sum(".lora_" in name for name in truth)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    torch.manual_seed(1)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _apart(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def _in_16_bits(base: Path, merged: Path, folder: Path) -> float:
    """The same merge of the checkpoint in bfloat16 -> the furthest number, as a share of what rounding the sum once may cost."""
    shutil.copytree(base, folder / "base")
    for file in (folder / "base").glob("*.safetensors"):
        save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(file).items()}, file)
    merge(folder / "base", merged / "adapter", folder / "merged", verify=False)
    worst = 0.0
    for file in base.glob("*.safetensors"):
        before, after = load_file(file), load_file(merged / "merged" / file.name)
        before_16, after_16 = load_file(folder / "base" / file.name), load_file(folder / "merged" / file.name)
        for name, tensor in before.items():
            wanted = after[name] if name.split(".")[0] in SCORES else before_16[name].double() + (after[name].double() - tensor)
            allowed = wanted.abs() * HALF_PLACE + ROUNDING * tensor.abs().max()
            worst = max(worst, float(((after_16[name] - wanted).abs() / allowed.clamp_min(1e-30)).max()))
    return worst


def left_plain(model: Any) -> Counter[str]:
    """The matrices of the part that reads text that are not in 4 bits, by what they are."""
    modules, text = dict(model.named_modules()), text_part(model)
    head, apart = model.get_output_embeddings(), special(model, modules)
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = modules[path]
        kind = type(owner).__name__
        if parameter.dim() < 2 or (text and owner is not head and not name.startswith(f"{text}.")):
            continue
        if isinstance(owner, nn.Embedding):
            found["embedding"] += 1
        elif owner is head or path in SCORES:
            found["output head"] += 1
        elif path in apart or (leaf == "weight" and re.search("router|gate$", kind.lower())):
            found["router"] += 1
        elif isinstance(owner, nn.Conv1d):
            found["convolution"] += 1
        elif leaf.endswith("bias"):
            found["bias"] += 1
        elif type(owner) is nn.Linear:
            found[f"{path.rpartition('.')[2]}, read by its owner"] += 1
        else:
            found[f"{kind}.{leaf}"] += 1
    return found
