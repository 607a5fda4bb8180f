"""The quickstart's training by rewards: the run's adapter as it was after so many steps, improved without being shown an answer.

It begins there and not at the run's end, from which neither rewards nor more rows have led further: what the adapter still gets wrong
then is what this small base misreads by itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.config.run import load_run
from ropewalk.quickstart import facts, reward
from ropewalk.quickstart.facts import Country
from ropewalk.train.progress import read_events
from ropewalk.train.trainer import train

BEGINS = 60  # steps of the run; it writes a checkpoint there
NEAR = 5  # steps at either end over which what was sampled is told

# examples/grpo-tiny.yml is the same recipe; a test holds them together.
YAML = """\
# Written by `ropewalk quickstart`; train it again with: ropewalk train {path} --restart
base_model: {base}
lora_model_dir: {begun}   # the run's adapter, after {begins} steps
datasets:
  - path: {folder}/rewarded.jsonl   # questions about the countries of the run, told another way; the answers go to the reward alone
    type: chat_template
test_datasets:
  - path: {folder}/examined.jsonl   # about countries that are held out
    type: chat_template
output_dir: {folder}/grpo

rl: grpo
trl:
  reward_funcs: [reward.correct, reward.value]   # reward.py, beside this file
  reward_weights: [1, 0]                         # the second is only watched
  num_generations: 8
  generation_batch_size: 128
  max_completion_length: 32

adapter: lora
lora_r: 16
lora_alpha: 32

sequence_len: 512
micro_batch_size: 8
max_steps: {steps}
learning_rate: {rate}
lr_scheduler: cosine
warmup_steps: 3
eval_steps: 13
logging_steps: 5
seed: 7
bf16: false
"""
RATE = "4e-3"


@dataclass(frozen=True)
class Improved:
    """What rewards alone have brought: shares of answers that are right, letter for letter."""

    before: float  # greedy, held-out countries
    after: float
    sampled_before: float  # while training, first and last steps
    sampled_after: float
    questions: int
    steps: int
    seconds: float
    adapter: Path
    curve: str  # SVG, ours
    begins: int = BEGINS

    def as_dict(self) -> dict[str, Any]:
        names = ("before", "after", "sampled_before", "sampled_after")
        return {name: round(getattr(self, name), 4) for name in names} | {
            "questions": self.questions, "steps": self.steps, "begins_at_step": self.begins, "seconds": round(self.seconds, 1),
        }  # fmt: skip


def write_questions(folder: Path, trained: Sequence[Country], held_out: Sequence[Country]) -> None:
    """What is asked while training, what at evaluations, and the reward of both."""
    facts.write_prompts(facts.questions(trained, len(facts.KINDS), telling=1), folder / "rewarded.jsonl")
    facts.write_prompts(facts.questions(held_out, len(facts.KINDS)), folder / "examined.jsonl")
    shutil.copyfile(Path(reward.__file__), folder / "reward.py")


def improve(folder: Path, base: Path, begun: Path, steps: int, recipe: str = YAML) -> Improved:
    """Writes the configuration and trains it; what an earlier quickstart left in the output folder goes."""
    config, out = folder / "grpo.yml", folder / "grpo"
    given = {"path": config, "base": base, "begun": begun, "begins": BEGINS, "folder": folder, "steps": steps, "rate": RATE}
    config.write_text(recipe.format(**given), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    result = train(load_run(config))
    log = read_events(out / "events.jsonl")
    examined = [event["reward"] for event in log if event["event"] == "eval"]
    sampled = [event["reward"] for event in log if event["event"] == "step"]
    return Improved(
        before=examined[0],
        after=examined[-1],
        sampled_before=sum(sampled[:NEAR]) / len(sampled[:NEAR]),
        sampled_after=sum(sampled[-NEAR:]) / len(sampled[-NEAR:]),
        questions=len((folder / "examined.jsonl").read_text(encoding="utf-8").splitlines()),
        steps=result.steps,
        seconds=result.seconds,
        adapter=result.adapter,
        curve=(result.folder / "plots" / "reward.svg").read_text(encoding="utf-8"),
    )
