"""Invented passages with questions: what the shipped base learnt to read from.

Nothing here is real. Every name is drawn letter by letter or syllable by syllable, and a word that the quickstart's real
facts use is never drawn, so that a base trained on these passages has met neither a row nor an entity of the quickstart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from random import Random

Message = dict[str, str]

ONSETS = "b br c ch cl d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl st t th tr v w x y z".split()
VOWELS = "a a a e e e i i i o o u u y ai au ea ee ei ia ie oa ou ua".split()
CODAS = ["", "", "", "", "", *"b d g k l ll m n n ng nt p r r rd rk s s ss st t th x z".split()]
ACCENTS = dict(zip("aaaaaceeeiinooooouuyszg", "áãåäâçéèêíïñóöôõøúüýšžğ"))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
THINGS = (
    "place island town region harbour state valley ship company animal plant metal machine star book school team river moon temple"
).split()
WORDS = """red green silver iron wool salt copper amber barley linen marble cedar granite rye glass tin cotton honey oak coal
ginger pepper olives tea fish timber leather paper cheese silk wine pearls resin clay slate cork wheat mint ivory brass""".split()


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: what it is called, how its values look, and its own ways of being told and asked."""

    name: str
    value: str
    told: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """One attribute of one invented thing."""

    attribute: Attribute
    value: str


TOLD = (
    "The {k} of {n} is {v}.", "{n} has the {k} {v}.", "Its {k} is {v}.", "The {k} is {v}.", "{v} is the {k} of {n}.", "{v} is its {k}.",
    "{n}'s {k} is {v}.", "Its {k} is called {v}.", "As for the {k}, it is {v}.", "The {k} is known to be {v}.", "For {k}, {n} has {v}.",
    "Everyone knows {v} as the {k}.", "The {k} ({v}) is well known.",
)  # fmt: skip
ASKED = (
    "What is the {k}?", "What is the {k}?", "What is the {k} of {n}?", "What is the {k} of {n}?", "What is {n}'s {k}?", "Which {k} does {n} have?",
    "Tell me the {k} of {n}.", "Name the {k}.", "Give the {k} of {n}.", "{K}?", "According to the text, what is the {k}?", "What is its {k}?",
    "Find the {k} in the passage.", "And the {k}?", "Which {k} does it have?",
)  # fmt: skip
ATTRIBUTES = (
    Attribute("capital", "name", ("It is governed from its capital, {v}.", "The capital city is {v}.", "Its capital city is {v}."),
              ("What is the capital city?", "Which city is the capital of {n}?", "Which city is the capital?")),
    Attribute("currency", "name", ("People there pay with the {v}.", "The money is the {v}.", "Its money is called the {v}."),
              ("What do people pay with?", "What is the money called?", "Which money is used in {n}?")),
    Attribute("population", "number", ("{v} people live there.", "About {v} people live in {n}.", "It has {v} inhabitants.",
               "It is home to {v} people."),
              ("How many people live there?", "How many people live in {n}?", "How many inhabitants does it have?")),
    Attribute("area", "number", ("It covers {v} square kilometres.", "{n} covers {v} km2.", "Its area is {v} square kilometres.",
               "It spreads over {v} hectares."),
              ("How large is it?", "How large is {n}?", "What area does it cover?", "How many square kilometres does it cover?")),
    Attribute("country code", "code", ("Its two-letter code is {v}.", "On maps it is marked {v}."), ("What is the code?", "Which code does {n} have?")),
    Attribute("currency code", "code", ("Banks write {v} for its money.",), ("What do banks write?",)),
    Attribute("internet domain", "domain", ("Its web addresses end in {v}.", "Web pages there end in {v}."), ("What do its web addresses end in?",)),
    Attribute("telephone prefix", "prefix", ("To call it, dial {v}.", "Callers dial {v} first."), ("What does one dial to call {n}?", "What do callers dial?")),
    Attribute("continent", "name", ("It lies in {v}.", "{n} is a {t} in {v}."), ("Where is it?", "Where is {n}?", "In which part of the world is {n}?")),
    Attribute("ruler", "person", ("It is ruled by {v}.", "{v} rules {n}."), ("Who rules {n}?", "Who rules it?")),
    Attribute("founder", "person", ("It was founded by {v}.", "{v} founded {n}."), ("Who founded {n}?", "Who founded it?")),
    Attribute("year of founding", "year", ("It was founded in {v}.", "It goes back to {v}."), ("When was it founded?", "When was {n} founded?")),
    Attribute("height", "measure", ("It is {v} high.", "It rises to {v}."), ("How high is it?", "How high is {n}?")),
    Attribute("weight", "measure", ("It weighs {v}.", "{n} weighs {v}."), ("How much does it weigh?", "How heavy is {n}?")),
    Attribute("length", "measure", ("It is {v} long.",), ("How long is it?", "How long is {n}?")),
    Attribute("speed", "measure", (), ("How fast is it?",)), Attribute("price", "measure", ("It costs {v}.",), ("What does it cost?",)),
    Attribute("atomic number", "number"), Attribute("symbol", "symbol"), Attribute("melting point", "measure", ("It melts at {v}.",), ("When does it melt?",)),
    Attribute("density", "measure"), Attribute("motto", "phrase"), Attribute("anthem", "phrase"), Attribute("nickname", "phrase"),
    Attribute("main crop", "word", ("Farmers there grow {v}.",), ("What do farmers grow?",)),
    Attribute("main export", "word", ("It sells {v} abroad.",), ("What does it sell abroad?",)), Attribute("colour", "word"),
    Attribute("language", "name", ("People there speak {v}.",), ("What do people speak?", "Which language do people speak?")),
    Attribute("neighbour", "name", ("It borders on {v}.",), ("What does it border on?",)), Attribute("largest city", "name"),
    Attribute("highest mountain", "name"), Attribute("river", "name", ("The river {v} runs through it.",), ("Which river runs through {n}?",)),
    Attribute("harbour", "name"), Attribute("owner", "person", ("It belongs to {v}.",), ("Who owns it?", "Who owns {n}?")),
    Attribute("builder", "person", ("It was built by {v}.",), ("Who built it?",)), Attribute("captain", "person"), Attribute("author", "person"),
    Attribute("number", "number"), Attribute("serial number", "serial"), Attribute("model", "serial"), Attribute("score", "decimal"),
    Attribute("latitude", "decimal"),
    Attribute("old name", "name"), Attribute("official name", "name"), Attribute("patron", "person"), Attribute("district", "name"),
    Attribute("size", "measure"),
)  # fmt: skip
FILLER = (
    "It rained for most of the spring.", "Little else is known.", "Travellers speak well of it.", "The records are old.", "Few people go there in winter.",
    "The figures were checked twice.", "There is a market every week.", "Much has been written about it.", "The maps disagree.",
)  # fmt: skip
OPENINGS = (
    "{n} is a {t}.",
    "This is about {n}.",
    "{n}, a {t}, is described here.",
    "{n}.",
    "# {n}",
    "{n}: a {t}.",
    "About {n}:",
    "Title: {n}",
)
LAYOUTS = ("{p}\n\n{q}", "{p}\n\n{q}", "{p}\n\nQuestion: {q}", "Passage: {p}\nQuestion: {q}", "{p}\n{q}", "{q}\n\n{p}")


class Inventor:
    """Draws names, values, passages and questions; the same seed gives the same ones."""

    def __init__(self, seed: int, forbidden: Collection[str] = ()) -> None:
        self.random = Random(seed)
        self.forbidden = frozenset(word.lower() for word in forbidden)
        self.kinds: dict[str, Callable[[], str]] = {
            "name": self.name, "person": self.person, "number": self.number, "code": lambda: self.capitals(self.random.choice((2, 2, 3))),
            "domain": lambda: "." + self.capitals(2).lower(), "prefix": self.prefix, "year": lambda: str(self.random.randint(900, 2024)),
            "measure": self.measure, "symbol": self.symbol, "phrase": self.phrase, "word": lambda: self.random.choice(WORDS),
            "serial": self.serial, "decimal": self.decimal,
        }  # fmt: skip

    def word(self) -> str:
        """An invented capitalised word that no real fact uses."""
        R = self.random
        while True:
            if R.random() < 0.15:
                text = "".join(R.choice(LETTERS) for _ in range(R.randint(3, 8)))
            else:
                text = "".join(
                    R.choice(ONSETS) * (R.random() < 0.85) + R.choice(VOWELS) + R.choice(CODAS)
                    for _ in range(R.choice((1, 2, 2, 2, 3, 3, 4)))
                )
            if R.random() < 0.15:
                text = "".join(ACCENTS.get(c, c) if R.random() < 0.5 else c for c in text)
            if len(text) > 2 and text.lower() not in self.forbidden:
                return text.capitalize()

    def name(self) -> str:
        R, a, b = self.random, self.word(), self.word()
        if R.random() < 0.6:
            return a
        forms = (f"{a} {b}", f"{a} {b}", f"{a} {b}", f"{a}-{b}", f"New {a}", f"Port {a}", f"{a} City", f"St. {a}'s", f"{a} and {b}", f"{a} Islands",
                 f"{a}'{b.lower()}",
                 f"Upper {a}", f"Saint {a}", f"{a} of {b}", f"{a} {b} {self.word()}", f"The {a}", f"South {a}", f"{a} {b.lower()}", f"{a}-on-{b}")  # fmt: skip
        return R.choice(forms)

    def person(self) -> str:
        R = self.random
        return R.choice(
            (
                f"{self.word()} {self.word()}",
                f"{self.word()} {R.choice(LETTERS).upper()}. {self.word()}",
                self.word(),
                f"Queen {self.word()}",
                f"{self.word()} the Old",
            )
        )

    def number(self) -> str:
        R = self.random
        value = R.randint(10 ** (n := R.randint(1, 8)), 10 ** (n + 1)) // (m := R.choice((1, 1, 1, 10, 100))) * m
        return R.choice(
            (str(value), f"{value:,}", f"{value:,}", f"{value:,}".replace(",", " "), f"{value:,}".replace(",", "."))
        )

    def decimal(self) -> str:
        R = self.random
        return R.choice(("", "", "-")) + f"{R.uniform(0, 10 ** R.randint(1, 4)):.{R.randint(1, 3)}f}"

    def measure(self) -> str:
        R = self.random
        unit = R.choice("km m cm kg g t l °C K % tons metres miles days euros hours feet km/h g/cm3 crowns".split())
        return R.choice((self.decimal, self.number, lambda: str(R.randint(1, 999))))() + ("" if unit == "%" else " ") + unit

    def capitals(self, n: int) -> str:
        while (text := "".join(self.random.choice(LETTERS) for _ in range(n)).upper()).lower() in self.forbidden:
            pass
        return text

    def prefix(self) -> str:
        R = self.random
        return R.choice(("", "+", "+", "00")) + str(R.randint(1, 9999)) + (f"-{R.randint(1, 9999)}" if R.random() < 0.3 else "")

    def symbol(self) -> str:
        return self.capitals(self.random.choice((2, 3))).capitalize()

    def serial(self) -> str:
        R = self.random
        return R.choice(
            (
                f"{self.capitals(2)}-{R.randint(10, 9999)}",
                f"{self.capitals(3)}{R.randint(1, 99)}",
                f"{R.randint(1, 99)}{self.capitals(2)}/{R.randint(1, 99)}",
            )
        )

    def phrase(self) -> str:
        R = self.random
        return f"{R.choice(WORDS)} {R.choice(('and', 'or', 'over', 'for the', 'under'))} {R.choice(WORDS)}".capitalize()

    def attribute(self) -> Attribute:
        """Mostly one from the list; sometimes one with an invented name, so that the question's own words must be looked for."""
        R = self.random
        if R.random() < 0.2:
            return Attribute(
                R.choice(
                    (self.word().lower(), f"{R.choice(WORDS)} {self.word().lower()}", f"{R.choice(WORDS)} {R.choice(THINGS)}")
                ),
                R.choice(list(self.kinds)),
            )
        return R.choice(ATTRIBUTES)

    def facts(self, n: int) -> list[Fact]:
        """n facts with different attribute names and different values."""
        facts: dict[str, Fact] = {}
        while len(facts) < n:
            attribute = self.attribute()
            value = self.kinds[attribute.value]()
            if all(value != fact.value for fact in facts.values()):
                facts.setdefault(attribute.name, Fact(attribute, value))
        return list(facts.values())

    def passage(self, name: str, thing: str, facts: list[Fact]) -> str:
        """The facts as prose, as a list or as a table."""
        R = self.random
        opening = R.choice(OPENINGS).format(n=name, t=thing)
        if R.random() < 0.25:
            line = R.choice(("{k}: {v}", "- {k}: {v}", "{K}: {v}", "* {K} = {v}", "| {k} | {v} |", "{K}\t{v}"))
            return "\n".join(
                [opening, *(line.format(k=f.attribute.name, K=_upper(f.attribute.name), v=f.value) for f in facts)]
            )
        parts = [
            R.choice(f.attribute.told if f.attribute.told and R.random() < 0.6 else TOLD).format(
                k=f.attribute.name, n=name, v=f.value, t=thing
            )
            for f in facts
        ]
        if R.random() < 0.3:
            parts.insert(R.randint(0, len(parts)), R.choice(FILLER))
        if R.random() < 0.7:
            parts.insert(0, opening)
        return R.choice((" ", " ", " ", "\n")).join(parts)

    def question(self, name: str, fact: Fact) -> str:
        R = self.random
        form = R.choice(fact.attribute.asked if fact.attribute.asked and R.random() < 0.4 else ASKED)
        return form.format(k=fact.attribute.name, K=_upper(fact.attribute.name), n=name)

    def conversation(self, facts: int, questions: int) -> list[Message]:
        """One passage with several questions as chat turns; every answer is a span of the passage."""
        R, name, thing = self.random, self.name(), self.random.choice(THINGS)
        known = self.facts(facts)
        passage = self.passage(name, thing, known)
        asked = [(self.question(name, fact), fact.value) for fact in R.sample(known, min(questions, facts))]
        if name in passage and R.random() < 0.15:
            asked[R.randrange(len(asked))] = (
                R.choice(("What is this about?", "What is it called?", f"Which {thing} is it?", "Name it.")),
                name,
            )
        first = R.choice(LAYOUTS).format(p=passage, q=asked[0][0])
        turns = [first, *(question for question, _ in asked[1:])]
        return [
            message
            for turn, (_, answer) in zip(turns, asked)
            for message in ({"role": "user", "content": turn}, {"role": "assistant", "content": answer})
        ]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
