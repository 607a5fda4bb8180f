"""AdamW over parameters laid end to end: a step goes over pieces of equal size, however many tensors there are.

Its moments are float32, or 8 bits between the steps (kernels/eight_bits.py) but for small tensors. What is trained in
16 bits has a float32 master here, or is rounded stochastically: up or down with the chance that makes the mean right. Those chances
follow from a number's place and step alone, so that a run gone on with, or stepped in another order, gives the same bits.
Legend: n numbers of a piece; a lane is what shares device, dtype, moments and options.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.errors import ModelError
from ropewalk.kernels.eight_bits import BLOCK, SMALL, Book, book, dequantise, quantise

PIECE = {"cpu": 2**16, "cuda": 2**22}  # numbers at a time: within a core's cache; few launches, and buffers of 16 MB


@dataclass(frozen=True)
class Segment:
    """A stretch of one parameter within a piece."""

    parameter: int
    start: int  # in the parameter
    place: int  # in the piece
    count: int


@dataclass(frozen=True)
class Piece:
    """Some neighbouring numbers of a lane, all of one step."""

    start: int  # in the lane
    count: int
    step: int  # the one that is taken, from 1
    segments: tuple[Segment, ...]


@dataclass
class Moment:
    """One of the two moments of a lane: float32, or codes and scales."""

    values: Tensor
    scales: Tensor | None = None
    book: Book | None = None

    @classmethod
    def zeros(cls, size: int, device: torch.device, *, few_bits: bool, signed: bool) -> Moment:
        if not few_bits:
            return cls(torch.zeros(size, device=device))
        found = book(signed, device)
        codes = torch.full((size,), found.zero, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(size // BLOCK, device=device), found)

    def read(self, start: int, count: int, room: Tensor) -> Tensor:
        """A stretch in float32: the moment itself, or made in `room`."""
        part = self.values[start : start + count]
        if self.book is None or self.scales is None:
            return part
        return dequantise(part, self.scales[start // BLOCK : (start + count) // BLOCK], self.book, room[:count])

    def write(self, start: int, changed: Tensor) -> None:
        """The way back for what `read` gave; it is used up where it has to be quantised."""
        if self.book is not None and self.scales is not None:
            end = start + changed.numel()
            quantise(changed, self.values[start:end], self.scales[start // BLOCK : end // BLOCK], self.book)

    def tensors(self) -> list[Tensor]:
        return [self.values] if self.scales is None else [self.values, self.scales]


@dataclass
class Lane:
    """Parameters of one device, dtype and group, and their state laid end to end."""

    group: dict[str, Any]
    parameters: list[nn.Parameter]
    few_bits: bool
    number: int
    starts: list[int] = field(init=False)
    steps: list[int] = field(init=False)

    def __post_init__(self) -> None:
        place, self.starts = 0, []
        for parameter in self.parameters:
            self.starts.append(place)
            place += self._room(parameter)
        self.steps = [0] * len(self.parameters)
        first = self.parameters[0]
        self.device, self.dtype = first.device, first.dtype
        self.means = Moment.zeros(place, self.device, few_bits=self.few_bits, signed=True)
        self.squares = Moment.zeros(place, self.device, few_bits=self.few_bits, signed=False)
        self.master: Tensor | None = None

    def _room(self, parameter: Tensor) -> int:
        return -(-parameter.numel() // BLOCK) * BLOCK if self.few_bits else parameter.numel()

    def keep_master(self) -> None:
        """From now on the parameters are rounded from float32 numbers that lie here."""
        self.master = torch.zeros(self.starts[-1] + self._room(self.parameters[-1]), device=self.device)
        for start, parameter in zip(self.starts, self.parameters):
            self.master[start : start + parameter.numel()] = parameter.detach().flatten()

    def pieces(self, most: int) -> Iterator[Piece]:
        """All numbers that have a gradient; neighbours of one step together, cut into pieces of at most `most`."""
        run: list[int] = []
        for number, parameter in enumerate(self.parameters):
            if run and (parameter.grad is None or self.steps[number] != self.steps[run[-1]]):
                yield from self._cut(run, most)
                run = []
            if parameter.grad is not None:
                run.append(number)
        if run:
            yield from self._cut(run, most)

    def _cut(self, run: Sequence[int], most: int) -> Iterator[Piece]:
        step = self.steps[run[0]] + 1
        begin, end = self.starts[run[0]], self.starts[run[-1]] + self._room(self.parameters[run[-1]])
        at = 0
        for start in range(begin, end, most):
            count, segments = min(most, end - start), []
            while at < len(run) and self.starts[run[at]] < start + count:
                number = run[at]
                first = max(0, start - self.starts[number])
                place = self.starts[number] + first - start
                size = min(self.parameters[number].numel() - first, count - place)
                if size > 0:
                    segments.append(Segment(number, first, place, size))
                if self.starts[number] + self._room(self.parameters[number]) > start + count:
                    break
                at += 1
            yield Piece(start, count, step, tuple(segments))
        for number in run:
            self.steps[number] = step

    def tensors(self) -> dict[str, Tensor]:
        """All that a later process needs, by name; `means` and the like are the state's own memory."""
        found = {"steps": torch.tensor(self.steps)}
        for name, moment in (("means", self.means), ("squares", self.squares)):
            found |= {name if at == 0 else f"{name}_scales": tensor for at, tensor in enumerate(moment.tensors())}
        return found if self.master is None else {**found, "master": self.master}


class FlatAdamW:
    """AdamW (Loshchilov & Hutter 2019) for the given groups of parameters."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        few_bits: bool,
        master: bool = False,
        piece: int | None = None,
        **options: Any,
    ) -> None:
        self.param_groups: list[dict[str, Any]] = [{**options, **group} for group in groups]
        self.lanes: list[Lane] = []
        self.piece = piece
        for group in self.param_groups:
            alike: dict[Any, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if not parameter.is_contiguous():
                    parameter.data = parameter.data.contiguous()
                alike.setdefault((parameter.device, parameter.dtype, few_bits and parameter.numel() >= SMALL), []).append(
                    parameter
                )
            for (_, dtype, packed), parameters in alike.items():
                self.lanes.append(Lane(group, parameters, packed, len(self.lanes)))
                if master and dtype.itemsize == 2:
                    self.lanes[-1].keep_master()
        self._rooms: dict[torch.device, list[Tensor]] = {}

    @property
    def state(self) -> dict[Any, Any]:
        """As torch's optimizers have it: tensors by parameter."""
        return {
            parameter: {name: tensor for name, tensor in lane.tensors().items() if name != "steps"} if at == 0 else {}
            for lane in self.lanes
            for at, parameter in enumerate(lane.parameters)
        }

    @torch.no_grad()
    def step(self) -> None:
        """Moves every parameter that has a gradient, and no other."""
        for lane in self.lanes:
            most = self.piece or PIECE.get(lane.device.type, PIECE["cuda"])
            for piece in lane.pieces(most):
                _move(lane, piece, self._room(lane.device, most))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Lets go of every gradient."""
        assert set_to_none, "gradients come anew in every step"
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints; tensors only."""
        return {"flat_adamw": [lane.tensors() for lane in self.lanes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave for the same parameters."""
        saved = state.get("flat_adamw")
        own = [lane.tensors() for lane in self.lanes]
        if saved is None or [_shapes(part) for part in saved] != [_shapes(part) for part in own]:
            raise ModelError(
                "the optimizer state of this checkpoint is of another optimizer, or of other parameters; go on with the configuration "
                "and the packages that the run began with, or begin anew with --restart"
            )
        for lane, mine, part in zip(self.lanes, own, saved):
            lane.steps = [int(step) for step in part["steps"]]
            for name, tensor in mine.items():
                if name != "steps":
                    tensor.copy_(part[name])

    def _room(self, device: torch.device, most: int) -> list[Tensor]:
        if device not in self._rooms:
            self._rooms[device] = [torch.empty(most, device=device) for _ in range(4)]
        return self._rooms[device]


def _shapes(part: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in part.items()}


def _move(lane: Lane, piece: Piece, rooms: Sequence[Tensor]) -> None:
    """One step of the numbers of a piece."""
    group, (beta1, beta2), n = lane.group, lane.group["betas"], piece.count
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    gradient = _gathered(lane, piece, rooms[0])
    means = lane.means.read(piece.start, n, rooms[1]).lerp_(gradient, 1 - beta1)
    squares = lane.squares.read(piece.start, n, rooms[2]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    size = torch.sqrt(squares, out=rooms[3][:n]).div_(math.sqrt(1 - beta2**piece.step)).add_(group["eps"])
    kept, step = 1 - rate * decay, -rate / (1 - beta1**piece.step)
    own = [lane.parameters[s.parameter].view(-1)[s.start : s.start + s.count] for s in piece.segments]
    spans = [slice(s.place, s.place + s.count) for s in piece.segments]
    if lane.dtype.itemsize == 4:
        if decay:
            torch._foreach_mul_(own, kept)
        torch._foreach_addcdiv_(own, [means[span] for span in spans], [size[span] for span in spans], step)
    else:
        wide = rooms[0][:n] if lane.master is None else lane.master[piece.start : piece.start + n]
        if lane.master is None:
            torch._foreach_copy_([wide[span] for span in spans], own)
        if decay:
            wide.mul_(kept)
        wide.addcdiv_(means, size, value=step)
        if lane.master is None:
            round_stochastically(wide, piece.start, piece.step, lane.number)
        torch._foreach_copy_(own, [wide[span] for span in spans])
    lane.means.write(piece.start, means)
    lane.squares.write(piece.start, squares)


def _gathered(lane: Lane, piece: Piece, room: Tensor) -> Tensor:
    """The gradients of a piece end to end in float32; zeros where a block is filled up."""
    gradients = [lane.parameters[s.parameter].grad for s in piece.segments]
    parts = [g.reshape(-1)[s.start : s.start + s.count] for g, s in zip(gradients, piece.segments) if g is not None]
    if len(parts) == 1 and parts[0].numel() == piece.count and parts[0].dtype == torch.float32:
        return parts[0]
    whole = room[: piece.count]
    if sum(part.numel() for part in parts) < piece.count:
        whole.zero_()
    torch._foreach_copy_([whole[s.place : s.place + s.count] for s in piece.segments], parts)
    return whole


def round_stochastically(x: Tensor, start: int, step: int, lane: int) -> None:
    """x [n] float32, the numbers from `start` on, to ones that bfloat16 has: the chance to go up is the part that is cut off."""
    x.view(torch.int32).add_(chances(x.numel(), start, step, lane, x.device)).bitwise_and_(-65536)


def chances(count: int, start: int, step: int, lane: int, device: torch.device) -> Tensor:
    """[n] evenly distributed over 0 .. 65535: a number's place, step and lane, mixed (the finaliser of MurmurHash3)."""
    key = (step * 0x9E3779B1 + lane * 0x27D4EB2F + start) & 0x7FFFFFFF
    x = torch.arange(key, key + count, dtype=torch.int64, device=device).to(torch.int32)
    for shift, factor in ((16, -2048144789), (13, -1028477387)):  # 0x85EBCA6B and 0xC2B2AE35
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)
        x *= factor
    x ^= (x >> 16) & 0xFFFF
    return x.bitwise_and_(0xFFFF)
