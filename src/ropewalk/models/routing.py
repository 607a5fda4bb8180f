"""Which experts each token goes to: recorded in one forward pass, replayed in another.

    with routing.record() as seen:             seen.selection()  int16 [T, layers, k], of the last pass
        model(...)
    with routing.replay(selection):            also around backward, where layers may be computed again
        model(...).backward()

Only which experts are picked is replayed. Their scores are the live ones, so that a router goes on learning from what it was used for.
Routers pick by `topk`: which call of which module it is, is seen in one pass (routers.py) and proven by three more.
Legend: T tokens, k experts per token, E what a router picks from, G groups of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ropewalk.models.routers import Router, arguments, find_routers

PROBE = 8  # tokens that a model is tried with
CLOSE = 1e-2  # weights of the same experts in another order, in 16 bits

Forward = Callable[[Sequence[int]], Any]  # ids to one forward pass over them


class Recorded:
    """What the routers picked."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = routers
        self._rows: list[Tensor | None] = [None] * len(routers)

    def put(self, number: int, rows: Tensor) -> None:
        """rows [T, k] of one router."""
        self._rows[number] = rows

    def selection(self) -> Tensor:
        """int16 [T, layers, k]; -1 in the columns that a router with a smaller k does not have."""
        rows = [row for row in self._rows if row is not None]
        assert len(rows) == len(self._rows), "no pass was recorded"
        widest = max(router.k for router in self._routers)
        padded = [nn.functional.pad(row.to(torch.int16), (0, widest - row.shape[1]), value=-1) for row in rows]
        return torch.stack(padded, dim=1)


class Routing:
    """The routers of a model; ModelError where they cannot be proven to do what is replayed."""

    def __init__(self, model: Any, forward: Forward | None = None) -> None:
        forward = forward or partial(_plain_forward, model)
        ids = [id % model.config.get_text_config(decoder=True).vocab_size for id in range(5, 5 + PROBE)]
        training = [module for module in model.modules() if module.training]
        model.eval()  # noise in a router would be taken for a difference
        try:
            with torch.no_grad():
                self.routers = find_routers(model, partial(forward, ids), PROBE)
                self._prove(partial(forward, ids))
        finally:
            for module in training:
                module.training = True

    @property
    def layers(self) -> int:
        """How many routers there are."""
        return len(self.routers)

    @property
    def k(self) -> int:
        """The most experts of a token in a layer."""
        return max(router.k for router in self.routers)

    @contextmanager
    def record(self) -> Iterator[Recorded]:
        """Notes what is picked."""
        recorded = Recorded(self.routers)
        with self._answering(lambda number, router: _Recording(router, partial(recorded.put, number))):
            yield recorded

    @contextmanager
    def replay(self, selection: Tensor) -> Iterator[None]:
        """selection [T, layers, k]: what is picked; a row of -1 leaves it to the router."""
        if selection.shape[1:] != (self.layers, self.k):
            raise ValueError(f"a selection of shape {tuple(selection.shape)}; expected [tokens, {self.layers}, {self.k}]")
        selection = selection.to(next(self.routers[0].experts.parameters()).device)  # once, not in every layer
        with self._answering(lambda number, router: _Replaying(router, selection[:, number, : router.k])):
            yield

    @contextmanager
    def _answering(self, mode: Callable[[int, Router], _Answering]) -> Iterator[None]:
        """A mode of its own around every router's forward."""
        with ExitStack() as stack:
            for number, router in enumerate(self.routers):
                entered: list[_Answering] = []

                def enter(
                    module: nn.Module,
                    args: Any,
                    entered: list[_Answering] = entered,
                    number: int = number,
                    router: Router = router,
                ) -> None:
                    entered.append(mode(number, router))
                    entered[-1].__enter__()  # type: ignore[no-untyped-call]

                def leave(module: nn.Module, args: Any, output: Any, entered: list[_Answering] = entered) -> None:
                    entered.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

                stack.callback(router.module.register_forward_pre_hook(enter).remove)
                stack.callback(router.module.register_forward_hook(leave, prepend=True, always_call=True).remove)
            yield

    def _prove(self, forward: Callable[[], Any]) -> None:
        """What is replayed is what the experts get: others than the router picks, and the same in another order, with its weights."""
        with self.record() as recorded:
            live = self._given(forward)
        selection = recorded.selection().long()
        other = selection.clone()
        turned = selection.clone()
        for number, router in enumerate(self.routers):
            own = selection[:, number, : router.k]
            other[:, number, : router.k] = (own + 1) % len(router.experts.down_proj)  # type: ignore[arg-type]
            turned[:, number, : router.k] = own.flip(1)
        with self.replay(other):
            others = self._given(forward)
        with self.replay(turned):
            turns = self._given(forward)
        for number, router in enumerate(self.routers):
            ids, weights = live[number]
            if not torch.equal(others[number][0], other[:, number, : router.k].to(ids)):
                raise router.refused("picks other experts than those it is told")
            again, turned_weights = turns[number]
            if not torch.equal(again, ids.flip(1)) or not torch.allclose(
                turned_weights.flip(1), weights, rtol=5 * CLOSE, atol=CLOSE
            ):
                raise router.refused("weighs other experts than those it is told")

    def _given(self, forward: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
        """Ids and weights [T, k] that each router's experts get."""
        given: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            _, ids, weights = arguments(args, kwargs)
            given[module] = ids.clone(), weights.float().clone()

        with ExitStack() as stack:
            for router in self.routers:
                stack.callback(router.experts.register_forward_pre_hook(note, with_kwargs=True).remove)
            forward()
        return [given[router.experts] for router in self.routers]


class _Answering(TorchFunctionMode):
    """Around one forward of a router: what becomes of its calls of topk."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router, self.calls = router, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        picked = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "topk":
            return picked
        number, self.calls = self.calls, self.calls + 1
        if number == self.router.call:
            return self.picked(args[0], picked)
        return self.grouped(args[0], picked) if number < self.router.call else picked

    def picked(self, scores: Tensor, picked: Any) -> Any:
        """The experts: scores [..., E], what was picked of them [..., k]."""
        raise NotImplementedError

    def grouped(self, scores: Tensor, picked: Any) -> Any:
        """What a router picks before: the groups that it takes experts from."""
        return picked


class _Recording(_Answering):
    def __init__(self, router: Router, put: Callable[[Tensor], None]) -> None:
        super().__init__(router)
        self.put = put

    def picked(self, scores: Tensor, picked: Any) -> Any:
        self.put(picked.indices.reshape(-1, self.router.k))
        return picked


class _Replaying(_Answering):
    def __init__(self, router: Router, rows: Tensor) -> None:
        super().__init__(router)
        self.rows = rows

    def picked(self, scores: Tensor, picked: Any) -> Any:
        rows = self._rows(scores, picked.indices.numel() // self.router.k).view_as(picked.indices)
        indices = torch.where(rows < 0, picked.indices, rows)
        return torch.return_types.topk((scores.gather(-1, indices), indices))

    def grouped(self, scores: Tensor, picked: Any) -> Any:
        """Those of the experts to come: some routers take the weights from scores that are 0 outside of the groups."""
        groups, size = scores.shape[-1], self.router.choices // max(scores.shape[-1], 1)
        if scores.dim() != 2 or not 1 < groups < self.router.choices or groups * size != self.router.choices:
            return picked
        rows = self._rows(scores, len(scores))
        wanted = torch.zeros_like(scores, dtype=torch.int32)
        wanted.scatter_(1, picked.indices, 1)  # where there is room, those that it would have taken
        wanted.scatter_(1, rows.clamp(min=0) // size, 2)
        indices = wanted.topk(picked.indices.shape[1], dim=-1).indices
        indices = torch.where(rows[:, :1] < 0, picked.indices, indices)
        return torch.return_types.topk((scores.gather(-1, indices), indices))

    def _rows(self, scores: Tensor, tokens: int) -> Tensor:
        if len(self.rows) != tokens:
            raise ValueError(f"the experts of {len(self.rows)} tokens, for a pass over {tokens}")
        return self.rows.to(scores.device, torch.int64)


def _plain_forward(model: Any, ids: Sequence[int]) -> Any:
    return model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
