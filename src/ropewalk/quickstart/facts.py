"""Real facts about countries, carried as data, as documents and as question-answer rows in a house format.

    country -> document (a short text) -> row {"messages": [passage and question, answer in the house format]}

The house format is what fine-tuning teaches: the value, then what it was asked for, each in its place. A base that reads well but
has never seen it scores nothing by exact match, and one that learnt only the format still needs the right value.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle, groupby
from pathlib import Path
from random import Random
from typing import Any

DATA = Path(__file__).parent / "data"
HELD_OUT = 40  # countries never seen in training


@dataclass(frozen=True)
class Country:
    """One row of data/countries.csv (GeoNames, CC BY 4.0)."""

    name: str
    continent: str
    capital: str
    currency: str
    currency_code: str
    population: int
    area: int
    code: str
    domain: str
    phone: str


@dataclass(frozen=True)
class Kind:
    """One kind of fact: the field, how documents tell it, how it is asked for and what the house calls it."""

    field: str
    told: tuple[str, ...]
    asked: tuple[str, ...]
    house: str


KINDS = (
    Kind("capital", ("The capital is {v}.", "Its capital is {v}.", "{v} is the capital of {n}."),
         ("What is the capital of {n}?", "What is the capital?", "Which city is the capital of {n}?"), "capital"),
    Kind("currency", ("People there pay with the {v}.", "The currency is the {v}.", "The currency of {n} is the {v}."),
         ("What is the currency of {n}?", "What do people pay with?", "What is the currency?"), "currency"),
    Kind("population", ("About {v} people live there.", "The population is {v}.", "It has {v} inhabitants."),
         ("What is the population of {n}?", "How many people live in {n}?", "What is the population?"), "population"),
    Kind("area", ("It covers {v} square kilometres.", "The area is {v} square kilometres.", "{n} covers {v} square kilometres."),
         ("What is the area of {n}?", "How large is {n}?", "What is the area?"), "area in km2"),
    Kind("code", ("The country code is {v}.", "Its two-letter code is {v}."), ("What is the country code of {n}?", "What is the country code?"), "code"),
    Kind("domain", ("Its web addresses end in {v}.", "The internet domain is {v}."),
         ("What is the internet domain of {n}?", "What do its web addresses end in?"), "domain"),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A passage about one country, a question, the plain value and the answer the house wants."""

    country: str
    kind: str
    passage: str
    question: str
    value: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"{self.passage}\n\n{self.question}"


def countries() -> list[Country]:
    """All countries, by name."""
    with (DATA / "countries.csv").open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    return [Country(**row | {"population": int(row["population"]), "area": int(row["area"])}) for row in rows]


def words() -> set[str]:
    """Every word of every name in the facts: what an invented passage must not use as a name."""
    texts = (
        text
        for c in countries()
        for text in (c.name, c.capital, c.currency, c.currency_code, c.continent, c.code, c.domain.strip("."))
    )
    return {word for text in texts for word in text.replace("-", " ").replace("'", " ").split()}


def split() -> tuple[list[Country], list[Country]]:
    """Countries to train on and countries held out; by a digest of the name, so that it is the same everywhere.

    The recipe in run.py was chosen on another split, drawn by the digest of the bare name; 10 countries are held out in both.
    """
    ordered = sorted(countries(), key=lambda c: sha256(f"held out: {c.name}".encode()).digest())
    return sorted(ordered[HELD_OUT:], key=lambda c: c.name), sorted(ordered[:HELD_OUT], key=lambda c: c.name)


def value(country: Country, kind: Kind) -> str:
    """The fact as text; large numbers with thousands separators."""
    raw = getattr(country, kind.field)
    return f"{raw:,}" if isinstance(raw, int) else str(raw)


def document(country: Country, telling: int = 0) -> str:
    """A short text about one country; order and phrasing differ by country and telling but never from run to run."""
    R = Random(f"document of {country.name}" + (f", telling {telling}" if telling else ""))
    sentences = [R.choice(kind.told).format(n=country.name, v=value(country, kind)) for kind in R.sample(KINDS, len(KINDS))]
    return " ".join([f"{country.name} is a country in {country.continent}.", *sentences])


def house(text: str, kind: Kind) -> str:
    """The house format: value, kind, where it is from.

    Only characters that the base has met: those it never met share one embedding, and no adapter can tell them apart.
    """
    return f"{text} ({kind.house}, from the file)"


def questions(chosen: Sequence[Country], per_country: int, telling: int = 0) -> list[Question]:
    """Some questions about each of these countries."""
    return [question for country in chosen for question in _questions(country, per_country, telling)]


def _questions(country: Country, n: int, telling: int) -> list[Question]:
    R = Random(f"questions about {country.name}" + (f", telling {telling}" if telling else ""))
    passage = document(country, telling)
    return [_question(country, kind, passage, R.choice(kind.asked)) for kind in R.sample(KINDS, n)]


def _question(country: Country, kind: Kind, passage: str, asked: str) -> Question:
    text = value(country, kind)
    return Question(country.name, kind.field, passage, asked.format(n=country.name), text, house(text, kind))


def write_rows(asked: Sequence[Question], path: Path, turns: int = 1) -> None:
    """Chat rows as a user would bring them: one JSON object with messages per line, up to so many questions about one passage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    by_country = [list(group) for _, group in groupby(asked, key=lambda q: q.country)]
    rows = [group[start : start + turns] for group in by_country for start in range(0, len(group), turns)]
    lines = (json.dumps({"messages": conversation(row)}, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def write_suite(asked: Sequence[Question], path: Path) -> None:
    """The questions as a suite: one country is a group, one kind of fact a tag, by which the worst slice is named."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": q.prompt, "reference": q.answer, "group": q.country, "tags": [q.kind]} for q in asked]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_prompts(asked: Sequence[Question], path: Path) -> None:
    """Questions to be trained on by rewards: nothing is shown of the answer, a reward is given it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": q.prompt, "answer": q.answer} for q in asked]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def conversation(asked: Sequence[Question]) -> list[dict[str, str]]:
    """Questions about one passage as one chat; the passage comes with the first."""
    said = [text for i, q in enumerate(asked) for text in (q.question if i else q.prompt, q.answer)]
    return [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), said)]


def write_documents(chosen: Sequence[Country], folder: Path) -> None:
    """One text file per country."""
    folder.mkdir(parents=True, exist_ok=True)
    for country in chosen:
        (folder / f"{country.code.lower()}.txt").write_text(document(country) + "\n", encoding="utf-8")


def majority(trained: Sequence[Question], asked: Sequence[Question]) -> list[str]:
    """A control that does not read: for each kind the commonest value of the training rows, in perfect house format."""
    counts = {kind.field: Counter(q.value for q in trained if q.kind == kind.field) for kind in KINDS}
    return [_house(counts[q.kind].most_common(1)[0][0], q) for q in asked]


def first_span(asked: Sequence[Question]) -> list[str]:
    """A control that copies without choosing: the first value of the passage, in perfect house format."""
    by_name = {c.name: c for c in countries()}
    return [_house(_first_value(q, by_name[q.country]), q) for q in asked]


def _house(text: str, question: Question) -> str:
    return house(text, next(kind for kind in KINDS if kind.field == question.kind))


def _first_value(question: Question, country: Country) -> str:
    told = question.passage.removeprefix(f"{country.name} is a country in {country.continent}.")
    present = [text for text in (value(country, kind) for kind in KINDS) if text in told]
    return min(present, key=lambda text: (told.find(text), -len(text)))
