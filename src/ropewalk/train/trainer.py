"""A training, top to bottom: `train(run)` prepares, loads, steps, evaluates, saves, verifies.

A killed run goes on from its last checkpoint with the same numbers: the batches of an epoch are a function of (seed, epoch), what
is random inside a step is drawn from (seed, step, rank), and weights and optimizer come from the checkpoint.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ropewalk.config.parallel import WAIT_SECONDS
from ropewalk.config.run import Run
from ropewalk.config.scoring import scored
from ropewalk.errors import ConfigError, TrainingStopped
from ropewalk.models.hub import push
from ropewalk.train.checkpoint import Checkpoints, Position, read_position, restore_optimizer
from ropewalk.train.distributed import World, join_world
from ropewalk.train.headlines import end_line
from ropewalk.train.in_backward import in_backward
from ropewalk.train.lessons import Examined, Lessons, Taught
from ropewalk.train.objective import Measures
from ropewalk.train.optim import make_optimizer, rate_factor, remarks, set_rate
from ropewalk.train.prepare import Prepared, leads, prepare, tell
from ropewalk.train.process import asked_to_stop, own_device, peak_memory, set_threads, step_seed
from ropewalk.train.progress import EventLog, Screen, read_events, write_plots
from ropewalk.train.pupil import Pupil
from ropewalk.train.questions import Questions
from ropewalk.train.reinforcement import Rewarded
from ropewalk.train.shared_writer import Opens
from ropewalk.train.shares import Shares
from ropewalk.train.trackers import Tracker, start_trackers


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    folder: Path
    adapter: Path  # the result: adapter/, or model/ after full fine-tuning
    steps: int
    first_loss: float
    last_loss: float
    evaluation_loss: float | None
    tokens: int
    tokens_per_second: float
    seconds: float
    peak_memory: int  # bytes: of the device's allocator, or resident on CPU


def train(run: Run, *, restart: bool = False, quiet: bool = False) -> Result:
    """Runs (or goes on with) a training and gives its result; `restart` moves an earlier run in the folder aside."""
    return fit(prepare(run, restart=restart, quiet=quiet), quiet=quiet)


def fit(prepared: Prepared, *, quiet: bool = False, opens: Opens | None = None) -> Result:
    """Trains what `prepare` made ready; `opens` opens the address at which a model under training is asked, where the run has one."""
    if prepared.folder.finished:
        prepared.folder.close()
        if not quiet and leads():
            tell(f"{prepared.folder.path} holds this run, finished; --restart moves it aside and trains anew")
        return Result(**prepared.folder.record["result"] | _paths(prepared))
    device = own_device()
    with join_world(device, prepared.run.ddp_timeout or WAIT_SECONDS) as world:
        set_threads(prepared, world)
        try:
            lessons = lessons_of(prepared, device, world, opens)
            return Fit(prepared, lessons, device, world, quiet=quiet or not world.leads).run()
        finally:
            prepared.folder.close()


class Fit:
    """One run under way: the pupil, its optimizer, its position, and where all of it is told."""

    def __init__(self, prepared: Prepared, lessons: Lessons, device: torch.device, world: World, *, quiet: bool) -> None:
        self.config, self.folder, self.device, self.world = prepared.run, prepared.folder, device, world
        self.prepared = prepared
        config = self.config
        self.lessons = lessons
        self.checkpoints = Checkpoints(self.folder.checkpoints)
        newest = Path(config.resume_from_checkpoint) if config.resume_from_checkpoint else self.checkpoints.newest()
        self.position = read_position(newest) if newest else Position()
        total, rows = self.lessons.total, self.lessons.rows
        self.screen = Screen(self.folder.path.name, total, every=config.logging_steps or 1, quiet=quiet)
        self.screen.say(f"{total} steps, {rows} rows; loading {prepared.base}")
        self.pupil = Pupil.load(prepared, device, resume=newest, world=world)
        for notice in (*prepared.data.notices, *self.pupil.notices):
            self.screen.say(notice)
        self.shares = Shares(self.pupil.trainable(), world)
        self.optimizer = make_optimizer(
            config.moved_by,
            self.shares.named,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            loraplus_ratio=config.loraplus_lr_ratio,
            embedding_lr=config.loraplus_lr_embedding,
            master=config.float32_master,
        )
        for remark in remarks(config.moved_by, self.optimizer, master=config.float32_master):
            self.screen.say(remark)
        self.stepping = in_backward(config, self.optimizer, self.shares.parameters, world)
        if newest:
            restore_optimizer(newest, self.shares.whole(self.optimizer))
            self.screen.say(f"going on from step {self.position.step} ({newest})")
        self.saves_every = config.save_every(self.lessons.per_epoch, total)
        self.evaluates_every = config.eval_every(self.lessons.per_epoch, total)
        self.high_losses = 0  # in a row, above loss_watchdog_threshold
        self.log: EventLog | None = None
        self.trackers: list[Tracker] = []

    def run(self) -> Result:
        try:
            self.lessons.start(self.pupil, self.position.step, self.position.data)
            self._open_logs()
            return self._train()
        finally:
            self._close_logs()

    def _train(self) -> Result:
        started = time.monotonic()
        tokens_before = self.position.tokens
        with self.screen, asked_to_stop() as asked:
            if self.position.step == 0 and self.config.by_rewards and self.lessons.examines:
                self._tell_evaluation(self.lessons.examine(), best=False)  # before anything is learnt
            self.screen.begin(self.position.step)
            for number in range(self.position.step, self.lessons.total):
                if self._out_of_patience():
                    break
                self._step(number)
                self._after_step()
                if self.world.sum([len(asked)])[0]:
                    self._save()
                    total = self.lessons.total
                    raise TrainingStopped(f"stopped at step {number + 1} of {total}; the same command goes on from there")
        return self._finish(time.monotonic() - started, self.position.tokens - tokens_before)

    def _step(self, number: int) -> None:
        """One optimizer step over this process's share of the step's micro-batches."""
        begun = time.perf_counter()
        self.pupil.choose_layers(number)
        torch.manual_seed(step_seed(self.config.seed, number, self.world.rank))
        (tokens,) = self.world.sum([self.lessons.begin(number)])
        factor = self._rate_factor(number)
        set_rate(self.optimizer, factor)
        loss = 0.0
        for batch, part in enumerate(self.lessons.losses()):
            if not math.isfinite(value := float(part.detach())):
                raise TrainingStopped(self._not_finite(number, f"the loss of {self.lessons.name(batch)} is {value}"))
            part.backward()  # type: ignore[no-untyped-call]
            loss += value
        if self.stepping is None:
            self.shares.collect()
        (loss,) = self.world.sum([loss])
        norm = self.shares.clip(self.config.max_grad_norm) if self.stepping is None else self.stepping.finish()
        if not math.isfinite(norm):
            raise TrainingStopped(self._not_finite(number, "its gradients are not finite"))
        if self.stepping is None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.lessons.learnt()
        first = self.position.first_loss if self.position.step else loss
        tokens_seen = self.position.tokens + int(tokens)
        self.position = replace(
            self.position, step=number + 1, tokens=tokens_seen, first_loss=first, data=self.lessons.position()
        )
        if number == 0 and self.config.rl is None:
            self._judge_first_loss(loss)
        self._watch(loss)
        self._tell_step(self.lessons.measured(), loss, norm, factor, int(tokens), time.perf_counter() - begun)

    def _after_step(self) -> None:
        """Evaluates and saves where due."""
        step, config = self.position.step, self.config
        last = step == self.lessons.total
        if self.lessons.examines and (last or _due(step, self.evaluates_every)):
            self._evaluate()
        best = self.position.best_step == step
        wanted = best if config.save_strategy == "best" else _due(step, self.saves_every)
        if last or self._out_of_patience() or wanted or (step == 1 and config.save_first_step) or (best and self._takes_best()):
            self._save()

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.position.bad_evaluations >= patience

    def _takes_best(self) -> bool:
        return self.config.load_best_model_at_end or self.config.early_stopping_patience is not None

    def _evaluate(self) -> None:
        found = self.lessons.examine()
        loss = found.loss
        best = self.position.best_loss is None or loss < self.position.best_loss
        self.position = (
            replace(self.position, best_loss=loss, best_step=self.position.step, bad_evaluations=0)
            if best
            else replace(self.position, bad_evaluations=self.position.bad_evaluations + 1)
        )
        self._tell_evaluation(found, best)

    def _tell_evaluation(self, found: Examined, best: bool) -> None:
        values = {"step": self.position.step, "loss": found.loss, "best": best, **found.told}
        told = {"eval/loss": found.loss} | {f"eval/{name}": float(value) for name, value in found.told.items()}
        self._tell("eval", values, told)
        self._tell_more()
        self.screen.evaluated(values)

    def _save(self) -> None:
        optimizer = None if self.config.save_only_model else self.shares.whole(self.optimizer).gather()
        with self.pupil.whole():
            path = self.checkpoints.save(self.position, optimizer, self.pupil.save_weights) if self.world.leads else None
        if path is not None:
            self.checkpoints.prune(self.config.save_total_limit, but=self.position.best_step)
            self._tell("checkpoint", {"step": self.position.step, "path": str(path.relative_to(self.folder.path))}, {})
            write_plots(self.folder.events, self.folder.plots)
        self.world.wait()

    def _finish(self, seconds: float, tokens: int) -> Result:
        best = self.position.best_step
        if self._takes_best() and best is not None and best != self.position.step:
            self.pupil.load_weights(self.checkpoints.folder / f"step-{best:08d}")
            self.screen.say(f"taking the best checkpoint, of step {best}")
        del self.optimizer, self.stepping, self.shares
        steps = [e for e in read_events(self.folder.events) if e["event"] == "step"] if self.world.leads else []
        result = Result(
            steps=self.position.step,
            first_loss=float(self.position.first_loss or 0.0),
            last_loss=steps[-1]["loss"] if steps else math.nan,
            evaluation_loss=self.position.best_loss,
            tokens=self.position.tokens,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            seconds=seconds,
            peak_memory=peak_memory(self.device),
            **_paths(self.prepared),
        )
        with self.pupil.whole(digested=True):
            if self.world.leads:
                self.pupil.save_result(result.adapter, self.prepared.template, self.lessons.probe().to(self.device))
        if self.world.leads:
            write_plots(self.folder.events, self.folder.plots)
            self._tell("end", {"step": self.position.step, "seconds": seconds}, {})
            self.folder.write_record(state="finished", result=asdict(result))
            if self.config.hub_model_id:
                self.screen.say(f"uploaded to {push(result.adapter, self.config.hub_model_id, self.config.hub_revision)}")
        self.screen.say(
            f"done: {end_line(steps)}, {seconds:.0f} s; the result is in {result.adapter}, its plots in {self.folder.plots}"
        )
        if kind := scored(self.config):
            named = "model" if kind == "answers" else "process_model"
            self.screen.suggest(f"trl: {{reward_funcs: [{{kind: {named}, path: {result.adapter}}}]}}   in a run by rewards")
        elif self.config.adapter and self.world.leads:
            self.screen.suggest(
                f"ropewalk merge {self.config.base_model} {result.adapter} {result.folder / 'merged'}",
                f"ropewalk models add base {self.prepared.base}",
                f"ropewalk models add {result.folder.name} {result.adapter} --base base",
                f"ropewalk chat {result.folder.name}",
            )
        self.world.wait()
        return result

    def _rate_factor(self, number: int) -> float:
        config, total = self.config, self.lessons.total
        floor, constant = config.cosine_min_lr_ratio or 0.0, config.cosine_constant_lr_ratio or 0.0
        return rate_factor(config.schedule, number, total, config.warmup(total), floor=floor, constant_share=constant)

    def _judge_first_loss(self, loss: float) -> None:
        """The untouched base's loss beside that of guessing, ln V: far above it, template or tokenizer do not fit the base."""
        guess = math.log(self.pupil.vocabulary)
        far = loss > guess + 1.0
        advice = "  This is worse than guessing: check chat_template and tokenizer." if far else ""
        self.screen.say(f"loss of the untouched base {loss:.4f}; guessing would give ln V = {guess:.4f}.{advice}")

    def _watch(self, loss: float) -> None:
        """Stops a run whose loss stays above `loss_watchdog_threshold`."""
        limit, patience = self.config.loss_watchdog_threshold, self.config.loss_watchdog_patience or 3
        self.high_losses = self.high_losses + 1 if limit is not None and loss > limit else 0
        if limit is not None and self.high_losses >= patience:
            raise TrainingStopped(
                f"step {self.position.step}: the loss {loss:.4f} is above loss_watchdog_threshold {limit:g} for the "
                f"{patience}th time in a row; lower learning_rate, or raise the threshold"
            )

    def _not_finite(self, number: int, where: str) -> str:
        newest = self.checkpoints.newest()
        return (
            f"step {number + 1}: {where}. Lower learning_rate or max_grad_norm, or look at the batch with "
            f"`ropewalk check`; last good checkpoint: {newest.name if newest else 'none'}"
        )

    def _tell_step(self, measured: Measures, loss: float, norm: float, factor: float, tokens: int, seconds: float) -> None:
        values = {
            "step": self.position.step,
            "epoch": self.lessons.epoch_after(self.position.step),
            "loss": loss,
            "learning_rate": self.config.learning_rate * factor,
            "gradient_norm": norm,
            "tokens": self.position.tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "memory": peak_memory(self.device),
            **measured,
        }
        numbers = {
            f"train/{k}": float(values[k]) for k in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", *measured)
        }
        self._tell("step", values, numbers)
        self._tell_more()
        self.screen.step(values)

    def _tell_more(self) -> None:
        for event, more in self.lessons.told():
            values = {"step": self.position.step, **more}
            self._tell(event, values, {})
            if event == "failures":
                self.screen.failed(values)

    def _tell(self, event: str, values: dict[str, Any], numbers: dict[str, float]) -> None:
        if self.log:
            self.log.write(event, **values)
        for tracker in self.trackers:
            if numbers:
                tracker.log(self.position.step, numbers)

    def _open_logs(self) -> None:
        if self.world.leads:
            self.checkpoints.clear_unfinished()
            self.log = EventLog(self.folder.events, keep_to_step=self.position.step or None)
            self.trackers = start_trackers(self.config.trackers, self.folder.path, self.config.model_dump(mode="json"))
            if self.position.step == 0:
                self.log.write("start", step=0, steps=self.lessons.total, rows=self.lessons.rows)
                for row in self.prepared.data.bad:
                    self.log.write("bad_row", step=0, **asdict(row))

    def _close_logs(self) -> None:
        self.lessons.close()
        if self.log:
            self.log.close()
        for tracker in self.trackers:
            tracker.close()


def lessons_of(prepared: Prepared, device: torch.device, world: World, opens: Opens | None = None) -> Lessons:
    """What the run learns from."""
    began = _began(prepared, world)
    if isinstance(prepared.data, Questions):
        return Rewarded(prepared, prepared.data, device, world, opens)
    return Taught(prepared.run, prepared.data, device, world, began)


def _began(prepared: Prepared, world: World) -> int:
    """The number of processes that the run began with; its steps hold as much data with any other number."""
    began = world.gather([int(prepared.folder.record.get("processes", world.size))])[0]
    run = prepared.run
    if began != world.size and (run.by_rewards or run.streams):
        kind = f"rl: {run.rl}" if run.by_rewards else "streaming"
        raise ConfigError(
            f"output_dir {run.output_dir} holds a run that began with {began} processes, and {kind} goes on with as many only, not "
            f"{world.size}; start {began}, or begin anew with --restart"
        )
    if world.leads and "processes" not in prepared.folder.record:
        prepared.folder.write_record(processes=world.size)
    return began


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _paths(prepared: Prepared) -> dict[str, Path]:
    folder = prepared.folder.path
    return {"folder": folder, "adapter": folder / ("adapter" if prepared.run.adapter else "model")}
