"""An adapter as a folder in PEFT's layout: adapter_model.safetensors and adapter_config.json.

Stacks of experts lie on disk as PEFT wants them: lora_A [E*r, in] with the expert slowest, lora_B [out, r*E] with the expert FASTEST.
PEFT nests one wrapper per adapted parameter of a module, in the order the module registers them, so the last one's keys are the
module's own and each one before lies one `base_layer` deeper. Legend: E experts, r rank.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ropewalk.errors import ModelError, OutputError, VerificationFailed
from ropewalk.models.experts import expert_modules

if TYPE_CHECKING:
    from ropewalk.models.lora import Adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_RENAMED = (
    "PEFT takes this architecture's keys for those of an old checkpoint, renames some and so loses them: "
    "the saved adapter is right, but serve it merged, or with Ropewalk, until PEFT reads it"
)
_ONCE_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def to_disk(name: str, tensor: Tensor) -> Tensor:
    """A factor as it lies in memory -> as PEFT lays it: experts' A [E, r, in] -> [E*r, in], B [E, out, r] -> [out, r*E]."""
    if tensor.dim() == 3 and name.endswith("lora_A"):
        return tensor.reshape(-1, tensor.shape[2]).contiguous()
    if tensor.dim() == 3 and name.endswith("lora_B"):
        return tensor.permute(1, 2, 0).reshape(tensor.shape[1], -1).contiguous()
    return tensor.contiguous()


def from_disk(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """The way back, into the shape of `like`."""
    if like.dim() == 3 and name.endswith("lora_A"):
        return tensor.reshape(like.shape[0], -1, tensor.shape[1])
    if like.dim() == 3 and name.endswith("lora_B"):
        return tensor.reshape(tensor.shape[0], -1, like.shape[0]).permute(2, 0, 1)
    return tensor


def keys(adapter: Adapter) -> dict[str, str]:
    """Our name of every trained tensor -> PEFT's key on disk."""
    named = {}
    for name in adapter.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            named[name] = f"{_PREFIX}{_nested(adapter, layer)}.{leaf}.weight"
        else:
            named[name] = _PREFIX + name
    return named


def _nested(adapter: Adapter, layer: str) -> str:
    """experts.gate_up_proj -> experts.base_layer where down_proj is adapted too; a linear layer keeps its name."""
    module, _, projection = layer.rpartition(".")
    if module not in adapter.experts:
        return layer
    order = _registered(adapter, module)
    return module + ".base_layer" * (len(order) - 1 - order.index(projection))


def _registered(adapter: Adapter, module: str) -> list[str]:
    """The adapted stacks of a module in the order in which it registers its parameters."""
    owner = adapter.model.get_submodule(module)
    names = [n for n in (*owner._parameters, *owner._buffers, *owner.__dict__) if n in adapter.experts[module].scales]
    return names or list(adapter.experts[module].scales)


def config(adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json, with only what differs from PEFT's defaults and what readers look for."""
    spec = adapter.spec
    modules, parameters = _targets(adapter)
    ranks, alphas = dict(spec.rank_pattern), dict(spec.alpha_pattern)
    for name in parameters if spec.expert_r else ():
        if name.rpartition(".")[0].rpartition(".")[2] and name.endswith("_proj"):
            ranks.setdefault(name, spec.rank(name, expert=True))
            alphas.setdefault(name, spec.effective_alpha(name, expert=True))
    return {
        "peft_type": "LORA",
        "task_type": _task(adapter.model),
        "base_model_name_or_path": adapter.model.config._name_or_path or None,
        "inference_mode": True,
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0 if parameters else spec.dropout,  # PEFT refuses dropout beside parameters, even to read one
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "exclude_modules": None,
        "modules_to_save": list(adapter.wholes) or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "alora_invocation_tokens": list(spec.alora_invocation_tokens) if spec.alora_invocation_tokens else None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _task(model: Any) -> str | None:
    """What PEFT calls what a model does."""
    classes = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    named = next((task for ending, task in classes.items() if type(model).__name__.endswith(ending)), None)
    return named or ("CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None)


def _targets(adapter: Adapter) -> tuple[list[str], list[str]]:
    """target_modules and target_parameters, as suffixes where they say exactly what is covered, else as whole names."""
    linears = list(adapter.linears)
    as_parameters: list[str] = []
    if next(expert_modules(adapter.model), None) is not None and not adapter.spec.linear_only:
        # PEFT takes these names for the experts of checkpoints before transformers 5, so they are given as parameters
        as_parameters = [f"{n}.weight" for n in linears if n.rpartition(".")[2] in _ONCE_EXPERTS]
        linears = [n for n in linears if f"{n}.weight" not in set(as_parameters)]
    everything = [n for n, _ in adapter.model.named_modules()]
    parameters = [n for n, _ in adapter.model.named_parameters()]
    stacks = [f"{n}.{p}" for n, stack in adapter.experts.items() for p in stack.scales]
    return _shortened(linears, everything), _shortened(stacks, parameters, 2) + _shortened(as_parameters, parameters, 3)


def _shortened(names: list[str], everything: list[str], parts: int = 1) -> list[str]:
    """Each name's last parts, unless they would also match something that is not meant."""
    meant, result = set(names), []
    for name in names:
        suffix = ".".join(name.split(".")[-parts:])
        matched = {n for n in everything if n == suffix or n.endswith(f".{suffix}")}
        result.append(suffix if matched <= meant else name)
    return sorted(set(result))


def save(adapter: Adapter, folder: Path) -> None:
    """Write into a folder beside it and rename, so that a torn adapter is never read."""
    tensors = {key: to_disk(name, adapter.state_dict()[name]).cpu() for name, key in keys(adapter).items()}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config(adapter), indent=2, sort_keys=True) + "\n")
        _replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"the adapter cannot be written to {folder}: {error}; free space or name another folder") from error


def _replace(temporary: Path, folder: Path) -> None:
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists():
        for file in temporary.iterdir():  # the weights first: they fit either configuration, which names the same targets
            os.replace(file, folder / file.name)
        temporary.rmdir()
    else:
        os.rename(temporary, folder)


def load(adapter: Adapter, folder: Path) -> None:
    """Read a folder in PEFT's layout into an adapter with the same targets."""
    path = folder / WEIGHTS
    if not path.exists():
        raise ModelError(f"{folder} holds no {WEIGHTS}; an adapter folder has it beside {CONFIG}")
    named, state = adapter.named_parameters(), {}
    with safe_open(path, framework="pt") as file:
        there, wanted = set(file.keys()), keys(adapter)
        strange = sorted(there ^ set(wanted.values()))
        if strange:
            where = "only in the folder" if strange[0] in there else "missing in the folder"
            raise ModelError(
                f"{folder} is an adapter for other targets: {strange[0]!r} is {where} ({len(strange)} keys differ)"
            )
        for name, key in wanted.items():
            state[name] = from_disk(name, file.get_tensor(key), named[name])
    adapter.load_state_dict(state)


def zero_factors(folder: Path) -> Iterator[str]:
    """Keys of factors that are zero everywhere: such an adapter would do nothing there."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if ".lora_" in key and not file.get_tensor(key).any():
                yield key


@torch.no_grad()
def verify_saved(adapter: Adapter, folder: Path, probe_ids: Tensor) -> float:
    """Load the folder through PEFT over the same base in memory and compare logits on probe_ids [B, T] -> the largest difference.

    In float32 every token must agree to 1e-4 of its logits. In 16 bits PEFT rounds W + delta once more than we do, which can send single
    tokens to other experts, so half of the tokens must agree to 3e-2. Over a base in fewer bits, to whose weights PEFT cannot add a
    product, it ends with comparing tensors.
    """
    _verify_alive(adapter, folder)
    _verify_tensors(adapter, folder)
    if _is_packed(adapter):
        return 0.0
    training = adapter.model.training
    adapter.model.eval()
    ours = adapter.model(input_ids=probe_ids, use_cache=False).logits.float()
    adapter.detach()
    try:
        theirs = _through_peft(adapter, folder, probe_ids)
    finally:
        adapter.reattach()
        adapter.model.train(training)
    share = (ours - theirs).norm(dim=-1) / ours.norm(dim=-1).clamp_min(1e-30)
    found, limit = (share.max(), 1e-4) if adapter.model.dtype == torch.float32 else (share.median(), 3e-2)
    if not found.item() <= limit:
        raise VerificationFailed(
            f"{folder} gives other logits through PEFT than in training: they differ by {found.item():.2g} of their size, not {limit:g}"
        )
    return float((ours - theirs).abs().max())


def verify_parts(adapter: Adapter, folder: Path, held: Sequence[Mapping[str, str]]) -> None:
    """The same of an adapter that is sharded: what each process holds, by rank the digests of `held`, stands where it belongs in the folder.

    PEFT cannot compute over a base of which every process holds a part.
    """
    from ropewalk.models.sharded import digest, part  # only where a model is sharded

    _verify_alive(adapter, folder)
    _verify_tensors(adapter, folder)
    named = adapter.named_parameters()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name, key in keys(adapter).items():
            tensor = from_disk(name, file.get_tensor(key), named[name])
            for rank, digests in enumerate(held):
                if name in digests and digest(part(tensor, named[name], rank)) != digests[name]:
                    raise VerificationFailed(f"{folder}: {key} lacks what process {rank} has trained of it")


def _verify_alive(adapter: Adapter, folder: Path) -> None:
    trained = {key for name, key in keys(adapter).items() if name not in adapter.untouched}
    dead = [key for key in zero_factors(folder) if key in trained]
    if dead:
        raise VerificationFailed(f"{folder}: {dead[0]} is zero everywhere although it was trained ({len(dead)} such factors)")


def _through_peft(adapter: Adapter, folder: Path, probe_ids: Tensor) -> Tensor:
    peft, lost = through_peft(adapter.model, folder)
    if lost:
        adapter.notes = (*adapter.notes, _RENAMED)
    try:
        return peft(input_ids=probe_ids, use_cache=False).logits.float()  # type: ignore[no-any-return]
    finally:
        peft.unload()


def through_peft(model: Any, folder: Path) -> tuple[Any, bool]:
    """The folder over a base as PEFT reads it, and whether it lost keys.

    Where PEFT's conversion of old checkpoints loses keys of this architecture, they are given to it by name.
    """
    from peft import PeftModel  # slow to import, and needed only here

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(model, str(folder))
    lost = any("missing adapter keys" in str(w.message) for w in caught)
    if lost:
        theirs = dict(peft.named_parameters())
        for key, tensor in load_file(folder / WEIGHTS).items():
            layer, _, leaf = key.rpartition(".lora_")
            if layer:
                theirs[f"{layer}.lora_{leaf.replace('.weight', '')}.default.weight"].data.copy_(tensor)
    return peft, lost


def _is_packed(adapter: Adapter) -> bool:
    """Whether some adapted weight is kept in fewer bits, which PEFT cannot add a product to."""
    linears = (adapter.model.get_submodule(n).weight for n in adapter.linears)
    stacks = (getattr(adapter.model.get_submodule(n), p) for n, stack in adapter.experts.items() for p in stack.scales)
    return any(not isinstance(w, Tensor) or not w.is_floating_point() for w in (*linears, *stacks))


def _verify_tensors(adapter: Adapter, folder: Path) -> None:
    """Every tensor of the folder, read back into our layout, equals the one in memory."""
    state = adapter.state_dict()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name, key in keys(adapter).items():
            if not torch.equal(from_disk(name, file.get_tensor(key), state[name]), state[name].cpu()):
                raise VerificationFailed(f"{folder}: {key} differs from the factor that was trained")
