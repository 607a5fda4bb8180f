"""The model under training, written with by a vLLM server: the protocol of train/generator.py, for a base that needs a machine of its own.

    pupil's adapter -> a folder that both see -> /v1/load_lora_adapter under a name of its own -> completions by that name

A name is never used twice, since the server keeps what it has read under it. A completion is written to its end by the adapter that
it was begun with, so all of its ids carry one version. An adapter is unloaded when a newer one is there and nothing is written with it.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ropewalk.engine.replying import Stops
from ropewalk.engine.request import Sampling
from ropewalk.errors import ConfigError, RopewalkError, UpstreamFailed, VerificationFailed
from ropewalk.train.distributed import World
from ropewalk.train.environment import Generated
from ropewalk.train.generator import Finished, Spent
from ropewalk.train.pupil import Pupil
from ropewalk.train.vllm_server import Refused, VllmServer, Written

MOMENT = 0.01  # seconds that a step waits for a completion, so that nobody's loop spins
COME_UP_SECONDS = 240.0
ALONE = World()
PROBED = 16  # ids that are written to compare the server with the trainer
# Mean differences of log-probabilities: what 16 bits and another engine's kernels make of the same weights stays below.
CLOSE = 0.3


class VllmGenerator:
    """Completions of the model as it is, written elsewhere."""

    def __init__(
        self,
        pupil: Pupil,
        *,
        url: str,
        folder: Path,
        running: int,
        longest: int,
        sampling: Sampling,
        seconds: float = COME_UP_SECONDS,
        world: World = ALONE,
    ) -> None:
        if pupil.adapter is None:
            raise ConfigError(
                "a vLLM server is given an adapter after every step, and this run trains every weight; add adapter: lora"
            )
        self.pupil, self.adapter, self.world, self.sampling = pupil, pupil.adapter, world, sampling
        self.folder, self.longest = folder, longest
        self.version = 0
        self.spent = Spent()
        self.server = VllmServer(url, at_once=running)
        self._waiting: dict[Future[Written], tuple[str, int, int, str]] = {}  # key, sample, version, adapter's name
        self._loaded: list[str] = []  # names, the newest last
        self._serial = 0
        (number,) = world.sum([float(secrets.randbits(40)) if world.leads else 0.0])
        self._run = f"{int(number):010x}"  # the same in all processes, and another in every run
        try:
            self.server.wait_until_well(seconds)
            self._fits(longest)
            self._put()
            self._compare()
        except BaseException:
            self.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return bool(self._waiting)

    def submit(
        self,
        key: str,
        ids: Sequence[int],
        *,
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        ends: Sequence[int] = (),
        stops: Stops | None = None,
    ) -> None:
        """Goes on from these ids, in so many ways, with the newest adapter; the server finds out itself what it has read before."""
        most, name = min(max_tokens, self.longest - len(ids)), self._loaded[-1]
        for sample in range(samples):
            own = replace(sampling, seed=None if sampling.seed is None else (sampling.seed + sample) % (1 << 63))
            texts = stops.texts if stops else ()
            written = self.server.complete(name, ids, max_tokens=most, sampling=own, stop_ids=stop_ids, stops=texts)
            self._waiting[written] = key, sample, self.version, name

    def cancel(self, key: str) -> None:
        """Lets go of a request."""
        for written in [one for one, (mine, *_) in self._waiting.items() if mine == key]:
            del self._waiting[written]
            written.cancel()

    def step(self, wait: bool = True) -> list[Finished]:
        """What has come to its end; waited for a moment, with `wait`."""
        begun = time.perf_counter()
        done, _ = (
            wait_for(self._waiting, MOMENT if wait else 0, FIRST_COMPLETED) if self._waiting else (set[Future[Written]](), None)
        )
        finished = []
        for written in sorted(done, key=lambda one: self._waiting[one][:2]):
            key, sample, version, _ = self._waiting.pop(written)
            found = self._result(written)
            self.spent.tokens += len(found.ids)
            finished.append((key, sample, Generated(found.ids, found.logprobs, [version] * len(found.ids), found.ended)))
        self.spent.seconds += time.perf_counter() - begun
        return finished

    def publish(self) -> None:
        """From the next request on it is the pupil's present adapter that writes."""
        self._put()
        self.version += 1
        writing = {name for *_, name in self._waiting.values()}
        for name in [name for name in self._loaded[:-1] if name not in writing]:
            self._loaded.remove(name)
            if self.world.leads:
                self._take_away(name)

    def close(self) -> None:
        """Leaves the server as it was found."""
        for written in self._waiting:
            written.cancel()
        self._waiting.clear()
        try:
            for name in self._loaded if self.world.leads else ():
                self._take_away(name)
        except RopewalkError:
            pass  # a server that is gone holds no adapter either, and why the run ended matters more
        finally:
            self._loaded.clear()
            self.server.close()

    def _put(self) -> None:
        """The present adapter, saved and read by the server under a new name."""
        self._serial += 1
        name = f"ropewalk-{self._run}-{self._serial}"
        path = (self.folder / name).resolve()
        with self.pupil.whole():
            if self.world.leads:
                self.adapter.save(path)
        if self.world.leads:
            try:
                self.server.load_adapter(name, str(path), experts=bool(self.adapter.experts))
            except Refused as refused:
                raise self._no_adapters(refused, path) from None
        self.world.wait()
        self._loaded.append(name)

    def _take_away(self, name: str) -> None:
        try:
            self.server.unload_adapter(name)
        except Refused as refused:
            raise UpstreamFailed(f"the vLLM server at {self.server.url} does not let go of {name}: {refused.said}") from None
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _no_adapters(self, refused: Refused, path: Path) -> RopewalkError:
        spec = self.adapter.spec
        rank = max(spec.r, *spec.rank_pattern.values(), 1)
        command = (
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {self.pupil.config.base_model} --enable-lora --max-loras 4 "
            f"--max-lora-rank {rank}"
        )
        if refused.status in (404, 405) and "adapter" not in refused.said.lower():
            return ConfigError(
                f"the vLLM server at {self.server.url} takes no adapters while it runs; start it with `{command}`"
            )
        return UpstreamFailed(
            f"the vLLM server at {self.server.url} does not take the adapter {path}: {refused.said}. It must see that folder, and be "
            f"started as by `{command}`"
        )

    def _fits(self, longest: int) -> None:
        """Whether texts of this length may be written there."""
        models = self.server.models()
        most = models[0].get("max_model_len") if models else None
        if isinstance(most, int) and most < longest:
            raise ConfigError(
                f"the vLLM server at {self.server.url} writes texts of up to {most} tokens, and sequence_len is {longest}; start it "
                f"with --max-model-len {longest}, or lower sequence_len"
            )

    def _compare(self) -> None:
        """A few ids are written there and read here: ids and log-probabilities must be those of the same weights."""
        rows = self.pupil.vocabulary
        prompt = [(7919 * number + 11) % rows for number in range(8)]
        asked = self.server.complete(
            self._loaded[-1], prompt, max_tokens=min(PROBED, self.longest - len(prompt)), sampling=self.sampling, stop_ids=()
        )
        found = self._result(asked)
        where = f"the vLLM server at {self.server.url}"
        if beyond := [token for token in found.ids if not 0 <= token < rows]:
            raise VerificationFailed(
                f"{where} writes the id {beyond[0]}, and this base has {rows}: it serves another base than {self.pupil.config.base_model}"
            )
        here = {heat: self._here(prompt, found.ids, heat) for heat in dict.fromkeys((self.sampling.temperature, 1.0))}
        apart = {heat: _apart(found.logprobs, values) for heat, values in here.items()}
        if 2 * apart[1.0] < apart[self.sampling.temperature] and apart[1.0] <= CLOSE:
            raise ConfigError(
                f"{where} gives log-probabilities from before the temperature {self.sampling.temperature:g}; start it with "
                "--logprobs-mode processed_logprobs, or write trl.temperature: 1"
            )
        if not apart[self.sampling.temperature] <= CLOSE:
            raise VerificationFailed(
                f"{where} and the trainer disagree about the same text: their log-probabilities differ by "
                f"{apart[self.sampling.temperature]:.3g} on the mean, not {CLOSE:g}; it serves other weights than "
                f"{self.pupil.config.base_model}, or truncates with --logprobs-mode processed_logprobs"
            )

    def _here(self, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> Tensor:
        """log p of the ids behind the prompt, as the trainer computes it."""
        model = self.pupil.model
        text = torch.tensor([[*prompt, *ids]], device=model.device)
        labels = text.clone()
        labels[:, : len(prompt)] = -100
        places = torch.arange(text.shape[1], device=model.device)[None]
        with self.pupil.quietly():
            found = self.pupil.head.log_probs_at(model, text, labels, places, temperature=temperature or 1.0)
        return found.of_labels[0, len(prompt) :].cpu()

    def _result(self, written: Future[Written]) -> Written:
        try:
            return written.result(self.server.completion_seconds + 60)
        except Refused as refused:
            raise UpstreamFailed(f"the vLLM server at {self.server.url} answers {refused.status}: {refused.said}") from None


def _apart(one: Sequence[float], other: Tensor) -> float:
    return float((torch.tensor(one) - other.float()).abs().mean())
