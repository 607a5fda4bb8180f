"""The whole loop on a small model, on CPU, in minutes: file -> store -> run -> compare -> ship -> ask, and ask about a file.

Every step is what the commands do one by one; nothing here is special to the quickstart but the facts and the size of the base.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_model
from transformers import AutoConfig, AutoModelForCausalLM

from ropewalk.checks import contains, exact_match
from ropewalk.config.run import load_run
from ropewalk.errors import OutputError
from ropewalk.files.catalog import File
from ropewalk.files.local import LocalFiles, open_local
from ropewalk.files.settings import Settings
from ropewalk.quickstart import facts
from ropewalk.quickstart.comparison import Compared, compare, ship_it
from ropewalk.quickstart.comparison_page import write_comparison
from ropewalk.quickstart.facts import Country, Question
from ropewalk.quickstart.page import Mark, Page, Sample, Score, write_page
from ropewalk.quickstart.question import Asking, Dialogue
from ropewalk.quickstart.rewarded import BEGINS, Improved, improve, write_questions
from ropewalk.quickstart.telling import progress, show, tell, tell_improved
from ropewalk.registry import Registry
from ropewalk.shared_registry import open_registry
from ropewalk.train.trainer import Result, train

BASE = Path(__file__).parent / "base"
ALIAS, BASE_NAME, ADAPTER_NAME = "quickstart", "quickstart-base", "quickstart-adapter"
REWARDED_NAME = "quickstart-rewarded"


@dataclass(frozen=True)
class Size:
    """How much the quickstart does."""

    steps: int
    per_country: int  # held-out questions per held-out country
    random_control: bool
    rewarded_steps: int  # 0: nothing is trained by rewards


FULL = Size(steps=160, per_country=2, random_control=True, rewarded_steps=25)
FAST = Size(steps=80, per_country=1, random_control=False, rewarded_steps=0)

# The recipe: the rate is high because the model is tiny and the run short.
YAML = """\
# Written by `ropewalk quickstart`; train it again with: ropewalk train {path}
base_model: {base}
datasets:
  - path: {file}   # {filename}, in the file store
    type: chat_template
output_dir: {out}

adapter: lora      # experts are adapted too
lora_r: 16
lora_alpha: 32

sequence_len: 1024
sample_packing: true
micro_batch_size: 2
max_steps: {steps}
learning_rate: 1e-2
lr_scheduler: cosine
warmup_steps: 10
save_steps: {saves}     # training by rewards begins at the first of them
logging_steps: 10
seed: 7
bf16: false
"""


def quickstart(fast: bool = False, folder: Path = Path("runs/quickstart")) -> Path:
    """Runs the loop into a folder and returns the page that shows the result."""
    began, size, console = time.monotonic(), FAST if fast else FULL, Console(highlight=False)
    trained_on, held_out = facts.split()
    rows, asked = facts.questions(trained_on, len(facts.KINDS)), facts.questions(held_out, size.per_country)
    files, settings = open_local(), Settings()
    registry = open_registry(settings.data, settings.database_url)

    console.rule("1  file -> store")
    write_data(folder, [*trained_on, *held_out], rows, asked)
    file = keep(files, folder / "train.jsonl")
    console.print(
        f"{len(rows)} questions about {len(trained_on)} countries are {file.id}; {len(held_out)} other countries are held out"
    )

    with Asking(registry) as asking:
        console.rule("2  run")
        registry.publish_base(BASE_NAME, BASE, {"origin": "shipped with Ropewalk, see base.json"})
        registry.ship(ALIAS, BASE_NAME)
        result = fine_tune(folder / "train.yml", BASE, file, folder / "run", size.steps)
        registry.publish_adapter(ADAPTER_NAME, result.adapter, BASE_NAME, {"file": file.id, "run": str(result.folder)})

        console.rule("3  compare")
        suite = keep(files, folder / "held-out.jsonl").id
        with progress(console) as told:
            compared = compare(asking, suite, BASE_NAME, ADAPTER_NAME, told)
        before, after, verdict = compared.before, compared.after, compared.verdict
        console.print(f"{verdict.state}: {compared.headline}", markup=False)

        console.rule("4  ship, ask")
        if verdict.may_ship:
            with progress(console) as told:
                replay = ship_it(asking, compared, ALIAS, told).replay
            console.print(f"{replay.equal} of {replay.asked} recorded questions asked again are answered letter for letter")
        question = asked[0]
        (said,) = asking.answers(ALIAS, [question.prompt])
        console.print(f"alias '{ALIAS}' points at {registry.resolve(ALIAS).name}")
        console.print(
            f"asked: {question.question}  (about {question.country}, never seen in training)\nsays:  {said}", markup=False
        )

        scores = score(before, after, rows, asked)
        if size.random_control:
            console.rule("5  a control: the same run on a random model")
            scores.append(random_control(folder, file, size, registry, asking, asked))

        improved = None
        if size.rewarded_steps:
            console.rule("6  rewards instead of answers")
            improved = by_rewards(folder, size, result, registry)
            tell_improved(console, improved)

        console.rule(f"{5 + size.random_control + bool(size.rewarded_steps)}  a file, asked about twice")
        country, questions = two_questions(asked, after if verdict.may_ship else before)
        document = keep(files, folder / "documents" / f"{country.code.lower()}.txt")
        dialogue = asking.about(ALIAS, document.id, questions)
    tell(console, dialogue)
    seconds = time.monotonic() - began
    samples = [Sample(q.passage, q.question, q.answer, b, mark(b, q), a, mark(a, q)) for q, b, a in zip(asked, before, after)]
    write_comparison(compared, asked, samples, folder / "comparison.html")
    page = write_page(
        make_page(scores, compared, samples, result, file, dialogue, improved, seconds, fast),
        folder / "index.html",
    )
    write_summary(folder / "summary.json", scores, compared, result, dialogue, improved, len(asked), seconds, fast)
    show(console, scores, compared, page, folder, seconds)
    return page


def write_data(folder: Path, about: Sequence[Country], rows: Sequence[Question], asked: Sequence[Question]) -> None:
    """Documents and rows as files, as a user would bring them."""
    try:
        facts.write_documents(about, folder / "documents")
        facts.write_rows(rows, folder / "train.jsonl", turns=3)
        facts.write_suite(asked, folder / "held-out.jsonl")
        write_questions(folder, *facts.split())
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; name another folder with --dir") from error


def keep(files: LocalFiles, path: Path) -> File:
    """The file in the store; running the quickstart again finds the same bytes and puts no second one."""
    digest = sha256(path.read_bytes()).hexdigest()
    same = [file for file in files.list() if (file.sha256, file.filename, file.expired) == (digest, path.name, False)]
    return same[0] if same else files.put(path)


def fine_tune(config: Path, base: Path, file: File, out: Path, steps: int) -> Result:
    """Writes the configuration and trains it; what an earlier quickstart left in the output folder goes."""
    config.write_text(
        YAML.format(path=config, base=base, file=file.id, filename=file.filename, out=out, steps=steps, saves=BEGINS),
        encoding="utf-8",
    )
    if out.exists():
        shutil.rmtree(out)
    return train(load_run(config))


def two_questions(asked: Sequence[Question], answers: Sequence[str]) -> tuple[Country, list[str]]:
    """A held-out country that was answered right about, and two questions: citations are shown where there is something to cite."""
    right = [q for q, a in zip(asked, answers) if contains(a, q.value)] or list(asked)
    country = next(country for country in facts.countries() if country.name == right[0].country)
    others = [kind.asked[0].format(n=country.name) for kind in facts.KINDS if kind.field != right[0].kind]
    return country, [right[0].question, *[q.question for q in right[1:2] if q.country == country.name], *others][:2]


def passes(answers: Sequence[str], asked: Sequence[Question]) -> list[bool]:
    """Which answers are the expected ones, letter for letter."""
    return [exact_match(a, q.answer) for a, q in zip(answers, asked)]


def mark(text: str, question: Question) -> Mark:
    """How the page marks one answer."""
    if exact_match(text, question.answer):
        return "right"
    return "value" if contains(text, question.value) else "wrong"


def exact(answers: Sequence[str], asked: Sequence[Question]) -> float:
    """The share of answers that are exactly the expected ones."""
    return sum(passes(answers, asked)) / len(asked)


def lenient(answers: Sequence[str], asked: Sequence[Question]) -> float:
    """The share of answers that hold the right value, whatever stands around it."""
    return sum(contains(a, q.value) for a, q in zip(answers, asked)) / len(asked)


def score(before: Sequence[str], after: Sequence[str], rows: Sequence[Question], asked: Sequence[Question]) -> list[Score]:
    """Before and after, and the controls that explain the gain away if anything can."""
    majority, first = facts.majority(rows, asked), facts.first_span(asked)
    return [
        Score("before", "the base, exact match", exact(before, asked)),
        Score("after", "base and adapter, exact match", exact(after, asked)),
        Score("before_lenient", "control: the base, right value in any format", lenient(before, asked)),
        Score("majority", "control: the commonest value of the training rows, in house format", exact(majority, asked)),
        Score("first_span", "control: the first value of the passage, in house format", exact(first, asked)),
    ]


def random_control(
    folder: Path, file: File, size: Size, registry: Registry, asking: Asking, asked: Sequence[Question]
) -> Score:
    """The same run on a randomly initialised model of the same shape: what fine-tuning alone teaches."""
    base = folder / "random-base"
    shutil.copytree(BASE, base, dirs_exist_ok=True)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32)
    save_model(model, str(base / "model.safetensors"), metadata={"format": "pt"})
    result = fine_tune(folder / "random.yml", base, file, folder / "random-run", size.steps)
    registry.publish_base("quickstart-random", base, {"origin": "random initialisation"})
    registry.publish_adapter("quickstart-random-adapter", result.adapter, "quickstart-random", {"file": file.id})
    answers = asking.answers("quickstart-random-adapter", [q.prompt for q in asked])
    return Score("random_init", "control: a random model after the same run, exact match", exact(answers, asked))


def by_rewards(folder: Path, size: Size, result: Result, registry: Registry) -> Improved:
    """Goes on from the run's first checkpoint by rewards alone, and publishes what came of it."""
    begun = result.folder / "checkpoints" / f"step-{BEGINS:08d}"
    improved = improve(folder, BASE, begun, size.rewarded_steps)
    registry.publish_adapter(REWARDED_NAME, improved.adapter, BASE_NAME, {"run": str(improved.adapter.parent)})
    return improved


def make_page(
    scores: list[Score], compared: Compared, samples: list[Sample], result: Result, file: File, dialogue: Dialogue,
    improved: Improved | None, seconds: float, fast: bool,
) -> Page:  # fmt: skip
    """What the page shows; the samples are the first ten held-out questions, not chosen ones."""
    plot = (result.folder / "plots" / "loss.svg").read_text(encoding="utf-8")
    steps = f"loss {result.first_loss:.2f} to {result.last_loss:.2f} in {result.steps} steps, {result.tokens_per_second:,.0f} tokens/s"
    return Page(scores, compared, samples[:10], plot, steps, len(samples), file, dialogue, improved, round(seconds), fast)


def write_summary(
    path: Path, scores: list[Score], compared: Compared, result: Result, dialogue: Dialogue, improved: Improved | None, asked: int,
    seconds: float, fast: bool,
) -> None:  # fmt: skip
    """The numbers as JSON."""
    values, verdict = {s.key: round(s.value, 4) for s in scores}, compared.verdict
    summary = {
        "before": values.pop("before"), "after": values.pop("after"), "seconds": round(seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1), "train_seconds": round(result.seconds, 1), "held_out_questions": asked,
        "second_question": dialogue.as_dict(), "controls": values, "comparison": verdict.as_dict(),
        "verdict": {"state": verdict.state, "low": verdict.low, "high": verdict.high, "url": compared.url},
        "first_loss": result.first_loss, "last_loss": result.last_loss,
        "threads": torch.get_num_threads(), "fast": fast,
    } | ({"grpo": improved.as_dict()} if improved else {})  # fmt: skip
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
