"""A model whose parameters are sharded over all processes (FSDP2): each process holds its part of every one of them.

    shard(model, mesh, ...)      every decoder layer by itself, what is around them together
    whole(parameter)             all of it, asked for by all processes together
    part(tensor, parameter)      of a whole tensor what this process holds of the parameter
    fill(parameter, tensor)      a whole tensor put into the parameter, or this process's part of it

A parameter is cut along its first dimension, as torch.chunk would: process i of n holds the i-th ceil(rows / n) rows, the last ones
fewer or none. What is frozen and what learns, 32 and 16 bits, and the codes of a base held in fewer bits are cut alike; only codes that
lie in fewer rows than there are processes are cut along their second dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ropewalk.errors import ModelError
from ropewalk.kernels.quant import Quantised
from ropewalk.models.recompute import decoder_layers


def shard(
    model: nn.Module,
    device: torch.device,
    *,
    apart: Iterable[nn.Parameter] = (),
    reshard: bool = True,
    offload: bool = False,
) -> None:
    """Cuts every parameter but those `apart`, which every process holds whole; one layer at a time goes to the device.

    With `offload` each process's part stays in the host's memory. Gradients are added up in float32 and not averaged.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(f"{type(model).__name__} has no decoder layers that could be sharded; leave the keys of fsdp out")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _codes_as_parameters(model)
    held = set(apart) | {p for p in model.parameters() if not p.dim()}  # a single number cannot be cut
    for parameter in held:
        parameter.data = parameter.data.to(device)
    on_host = offload and device.type != "cpu"
    policy = CPUOffloadPolicy() if on_host else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": policy,
        "ignored_params": held,
        "shard_placement_fn": _across(mesh.size()),
    }
    try:
        for layer in layers:
            fully_shard(layer, reshard_after_forward=reshard, **options)
        fully_shard(model, **options)
    except ValueError as error:
        raise ModelError(
            f"{type(model).__name__} cannot be sharded: {str(error).splitlines()[0]}; leave the keys of fsdp out"
        ) from error
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def settle(model: nn.Module) -> None:
    """Gives back whatever a forward pass has gathered and no backward pass has given back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was here."""
    return isinstance(model, FSDPModule)


def local(parameter: Tensor) -> Tensor:
    """What this process holds: its part, or all of a parameter that is not cut; of the parameter's own storage."""
    found: Any = parameter.detach()
    here: Tensor = found.to_local() if isinstance(found, DTensor) else found
    return here


def whole(parameter: Tensor, held: Tensor | None = None, *, keep: bool = True) -> Tensor:
    """All of a parameter, in the host's memory; or of a tensor that is cut like it, of which `held` is this process's part.

    A process that does not `keep` it takes part and gets nothing.
    """
    here = local(parameter) if held is None else held
    if not isinstance(parameter, DTensor):
        return here.cpu()
    mesh, shape = parameter.device_mesh, parameter.shape
    stride = torch.empty(shape, device="meta").stride()
    cut = DTensor.from_local(here.to(mesh.device_type), mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
    found = cut.full_tensor()
    return found.cpu() if keep else torch.empty(0)


def part(tensor: Tensor, parameter: Tensor, rank: int | None = None) -> Tensor:
    """Of a whole tensor the rows that this process, or another, holds of the parameter."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh: DeviceMesh = parameter.device_mesh
    rows = -(-tensor.shape[0] // mesh.size())
    first = rows * (mesh.get_local_rank() if rank is None else rank)
    return tensor[first : first + rows]


@torch.no_grad()
def fill(parameter: Tensor, tensor: Tensor) -> None:
    """Puts a whole tensor into a parameter."""
    local(parameter).copy_(part(tensor, parameter))


def digests(named: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """By rank and name, the digest of what each process holds of a parameter."""
    mine = {name: digest(local(parameter)) for name, parameter in named.items() if isinstance(parameter, DTensor)}
    every: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    return every


def digest(tensor: Tensor) -> str:
    """Of shape, type and every bit."""
    data = tensor.detach().contiguous().cpu()
    raw = data.view(torch.uint8).numpy() if data.numel() else b""
    return hashlib.sha256(repr((tuple(data.shape), data.dtype)).encode() + bytes(raw)).hexdigest()


def _across(size: int) -> Callable[[nn.Parameter], Shard | None]:
    def place(parameter: nn.Parameter) -> Shard | None:
        few = not parameter.requires_grad and parameter.dim() > 1 and parameter.shape[0] < size
        return Shard(1) if few and parameter.shape[1] % size == 0 else None

    return place


def _codes_as_parameters(model: nn.Module) -> None:
    """The codes and scales of a base in fewer bits become frozen parameters, for buffers are not cut."""
    for module in model.modules():
        if isinstance(module, Quantised):
            for name, buffer in list(module.named_buffers(recurse=False)):
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
