"""One forward pass over the ids of several requests."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ropewalk.engine.attention import NAME, register, running
from ropewalk.engine.batch import Batch, Part
from ropewalk.engine.cache import ELSEWHERE, Layout, Reading
from ropewalk.engine.crowd import Crowd
from ropewalk.engine.latent import is_latent
from ropewalk.engine.pages import Pages
from ropewalk.engine.recurrent import past_of, per_request
from ropewalk.errors import ModelError
from ropewalk.models.routing import Routing


class Runner:
    """A model whose every call serves several requests."""

    def __init__(self, model: Any) -> None:
        register()
        self.model = model.eval()
        self.layout = Layout.of(model.config.get_text_config(decoder=True))
        decoder = model.get_decoder()
        if not hasattr(decoder, "set_attn_implementation"):
            decoder = model
        decoder.set_attn_implementation(NAME)  # not that of a part that sees
        names = inspect.signature(model.forward).parameters
        self._past = "past_key_values" if "past_key_values" in names else "cache_params"
        handed = any(one.kind is one.VAR_KEYWORD for one in names.values())  # to the decoder, whatever it is
        self._places = "position_ids" in names or (handed and "position_ids" in inspect.signature(decoder.forward).parameters)
        _check(decoder, self._places or set(self.layout.kinds) <= {"recurrent", "none"})
        latents = frozenset(module.layer_idx for module in decoder.modules() if is_latent(module))
        self.layout = replace(self.layout, latents=latents)
        self._pages = Pages(self.layout)
        self._crowd: Crowd | None = None  # those who decode, as long as they are the same
        self.routing: Routing | None = None
        stateful = set[int]()
        for module in model.modules():
            past = past_of(module)
            if past:
                per_request(module, past, self.layout.config)
                stateful.add(module.layer_idx)
        if not stateful >= {number for number, has in enumerate(self.layout.states) if has}:
            raise ModelError(
                f"{decoder.config.model_type} keeps its state in its own layers, where one request sees another's; {ELSEWHERE}"
            )
        self._try()

    def _try(self) -> None:
        """Whoever cannot be served says so now."""
        try:
            self.forward([(Reading.after(self.layout, []), [0, 0])])
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"{self.layout.config.model_type} asks more of its past than this engine keeps ({error}); {ELSEWHERE}"
            ) from error

    @property
    def device(self) -> torch.device:
        return self.model.device  # type: ignore[no-any-return]

    @torch.inference_mode()
    def forward(self, work: Sequence[tuple[Reading, Sequence[int]]]) -> Tensor:
        """Reads these ids, each on its reading's end -> logits [B, V] after the last id of each, float32."""
        parts, ids, positions = [], list[int](), list[int]()
        for reading, new in work:
            assert new, "a request without ids in a step"
            parts.append(Part(reading, len(ids), len(ids) + len(new)))
            ids += new
            first = reading.position + reading.shift
            positions += range(first, first + len(new))
        batch = Batch(parts, self.device, self._together([reading for reading, new in work if len(new) == 1]))
        if batch.crowd is not None:
            batch.crowd.advance()
        with running(batch), self.routing.record() if self.routing is not None else nullcontext() as seen:
            logits = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                **({"position_ids": torch.tensor([positions], device=self.device)} if self._places else {}),
                **{self._past: batch},
                use_cache=True,
                logits_to_keep=torch.tensor([part.end - 1 for part in parts], device=self.device),
            ).logits
        missing = [
            n for n, kind in enumerate(self.layout.kinds) if kind not in ("recurrent", "none") and n not in batch.attended
        ]
        if missing:
            raise ModelError(
                f"layer {missing[0]} of {self.layout.config.model_type} attends without transformers' attention interface, "
                f"which this engine needs; {ELSEWHERE}"
            )
        for reading, new in work:
            reading.position += len(new)
        if seen is not None:
            experts = seen.selection()
            for part in parts:
                part.reading.routed.append(experts[part.begin : part.end])
        return logits[0].float()  # type: ignore[no-any-return]

    def record_routing(self) -> None:
        """From now on readings keep which experts their ids went to; ModelError where a model's routers cannot be followed."""
        self.routing = Routing(self.model, lambda ids: self.forward([(Reading.after(self.layout, []), ids)]))

    def forget(self, reading: Reading) -> None:
        """Lets go of a reading that does not go on."""
        if self._crowd is not None and any(one is reading for one in self._crowd.readings):
            self._crowd.settle()
            self._crowd = None

    def _together(self, decoding: Sequence[Reading]) -> Crowd | None:
        """Those of a step that read one id after others."""
        decoding = [reading for reading in decoding if reading.position]
        if not decoding:
            return None
        if self._crowd is None or not self._crowd.is_of(decoding):
            if self._crowd is not None:
                self._crowd.settle()
                self._crowd = None  # what only it knew is gone
            self._crowd = Crowd(decoding, self._pages, self.device)
        return self._crowd


def _check(decoder: Any, placed: bool) -> None:
    """ModelError for a model that cannot read several requests at once."""
    kind = decoder.config.model_type
    if decoder.config._attn_implementation != NAME:
        raise ModelError(f"{kind} attends without transformers' attention interface, which this engine needs; {ELSEWHERE}")
    if not placed:
        raise ModelError(f"{kind} counts positions by itself, while this engine must give them to it; {ELSEWHERE}")
