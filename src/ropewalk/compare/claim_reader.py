"""Numbers in a card's prose become claims: what is said, in which unit, and under which conditions.

Every expression here looks at a bounded window around one number, so that the time grows with the text and not with its square.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from ropewalk.compare.claims import Claim
from ropewalk.compare.numbers import RUN, amount, bare

READ = 50_000  # characters of a field in which claims are looked for: a description is a paragraph
MOST = 200  # claims of one card
BEHIND, AHEAD = 80, 160  # characters looked at before and after a number

DATE = re.compile(r"[0-9]{4}-[0-9]{2}(?:-[0-9]{2})?(?![0-9])")
CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY"}
CURRENCY_WORD = re.compile(r"\s?(USD|EUR|GBP|dollars?|euros?|pounds?)\b", re.I)
CURRENCY_NAMES = {"dollar": "USD", "dollars": "USD", "euro": "EUR", "euros": "EUR", "pound": "GBP", "pounds": "GBP"}
PER = re.compile(
    r"\s?(?:/|per\b|an?\b|each\b)\s?((?:1[kKM]|1,000|million|thousand)?\s?"
    r"(?:month|mo|year|yr|user|seat|hour|hr|day|week|minute|second|sec|s|tokens?|requests?|images?|runs?|calls?|answers?))\b",
    re.I,
)
PERIODS = {"mo": "month", "yr": "year", "hr": "hour", "sec": "second", "s": "second"}
TIMES = re.compile(r"[-\s\u00a0]?(?:[xX](?![A-Za-z0-9])|×|(?:times|fold)\b)")
PERCENT = re.compile(r"\s?(?:(%)|(percentage points|pp)\b|(?:percent|per cent)\b)")
MEASURE = re.compile(
    r"[-\s\u00a0]?((?:tokens?|tok|t|requests?|req|images?|samples?|rows?)(?:/s(?:ec(?:ond)?)?| per second)|ms|µs|μs|ns|s|secs?|seconds?"
    r"|mins?|minutes?|h|hrs?|hours?|days?|weeks?|months?|years?|[kKMGT]i?B|bits?|bytes?|Hz|MHz|GHz|W|kW|kWh|points)(?![A-Za-z0-9])"
)
RANGE = re.compile(r"(?:x|×|%)?\s?(?:-|–|—|to\b)\s?[$€£¥]?(?=[0-9])")
AND = re.compile(r"(?:x|×|%)?\s?and\s[$€£¥]?(?=[0-9])")
DIRECTION = re.compile(
    r"[\s-](?:a |an |as |in )?(faster|quicker|fast|slower|cheaper|smaller|larger|bigger|better|worse|longer|shorter|lighter|less|fewer|lower|more"
    r"|higher|greater|speed-?ups?|reductions?|increases?|improvements?|savings?|gains?)\b",
    re.I,
)
DIRECTIONS = {
    **dict.fromkeys(("faster", "quicker", "fast", "speedup", "speed-up"), ("faster", "speed")),
    **dict.fromkeys(("less", "fewer", "lower", "reduction", "saving"), ("less", "")),
    **dict.fromkeys(("more", "higher", "greater", "increase", "gain"), ("more", "")),
    **dict.fromkeys(("better", "improvement"), ("better", "")),
    "slower": ("slower", "speed"),
    "cheaper": ("cheaper", "cost"),
    "smaller": ("smaller", "size"),
    "lighter": ("less", "memory"),
    "larger": ("larger", "size"),
    "bigger": ("larger", "size"),
    "worse": ("worse", ""),
    "longer": ("longer", "length"),
    "shorter": ("shorter", "length"),
}
SUFFIX_METRICS = {"speed", "cost", "size", "length"}  # "15x faster training" is of "training speed"
WORD = re.compile(r"[\s-]([^\W\d_][\w+#-]{0,30})(?!\w)")
STOP = set(
    "a an the of to in on at by for with from as and or but is are was were be it its that which this these those than then so while when "
    "where under over per versus vs against compared using without across if not no only just you your we our they their into via".split()
)
OF = re.compile(r"\s(?:in|of)\s", re.I)
CONDITION = re.compile(
    r"\s(?:on|with|for|at|in|when|under|than|versus|vs|compared|over|against|using|without|across|from|while running)\b", re.I
)
BRACKETED = re.compile(r"\s?\(([^()\n]{1,120})\)")
CLAUSE_END = re.compile(r"[;!?\n()]|[.,](?:\s|$)|\s(?:and|but|or|while|yet)\s", re.I)
VERB = re.compile(
    r"\b(cut|reduc|lower|sav|shrink|drop|improv|boost|increas|rais|speed)(?:s|es|e|ed|ing|ting|ping)?\s(?:up\s)?((?:[\w-]{1,24}\s){0,3}?)(by\s|to\s)?$",
    re.I,
)
APART = {"in", "on", "with", "for", "at", "and", "or", "from", "as", "into", "up"}  # after these the number is not the verb's
LESS = {"cut", "reduc", "lower", "sav", "shrink", "drop"}
SUBJECT = re.compile(r"([^\W\d_][\w-]{1,24})\s?(?:of|is|at|reaches|:)\s$", re.I)
BOUNDS = [
    (re.compile(r"(?<!\w)(?:no|not) (?:more|greater) than\s?$", re.I), "at most"),
    (re.compile(r"(?<!\w)(?:no|not) (?:less|fewer) than\s?$", re.I), "at least"),
    (
        re.compile(r"(?<!\w)(?:at least|more than|over|above|minimum|minimum of|from|starting at|starts at|>=|>|≥)\s?$", re.I),
        "at least",
    ),
    (re.compile(r"(?<!\w)(?:at most|less than|fewer than|under|below|within|maximum|maximum of|<=|<|≤)\s?$", re.I), "at most"),
    (re.compile(r"(?<!\w)(?:up to|as much as|as many as)\s?$", re.I), "up to"),
    (re.compile(r"(?<!\w)(?:about|around|roughly|nearly|almost|approximately|approx\.|circa|some|~|≈)\s?$", re.I), "about"),
]
NOT = re.compile(
    r"(?<!\w)(?:not|never|cannot|hardly|without|no|nowhere near|far from|rather than|instead of|\w{2,6}n['’]t)\s((?:[\w'’-]{1,20}\s){0,2})$",
    re.I,
)
EMPHASIS = {"just", "only", "merely", "simply"}  # "not just 15x" is no denial
NAME_BEFORE = re.compile(r"[^\s.!?:]\s[A-Z]\w{0,30}\s$")  # a capital within a sentence
BETWEEN = re.compile(r"\bbetween\s[$€£¥]?$", re.I)
METRICS = {"x": "factor", "%": "share", "points": "share"}  # where the text does not say what of
METRICS |= dict.fromkeys(
    "ns µs μs ms s sec secs second seconds min mins minute minutes h hr hrs hour hours day days".split(), "time"
)
METRICS |= dict.fromkeys("bytes kB KB MB GB TB KiB MiB GiB TiB".split(), "memory")
MODELS = {"model", "models", "parameter", "parameters", "params", "weights", "moe", "llm", "llms"}


def claims_of(owner: str, prose: Mapping[str, str | None]) -> tuple[Claim, ...]:
    """The claims in each named field of a card, in order; a text that is repeated makes its claims once."""
    found: list[Claim] = []
    seen: set[str] = set()
    for source, text in prose.items():
        if text and text not in seen:
            seen.add(text)
            found += _read(owner, source, text[:READ], MOST - len(found))
    return tuple(found)


def _read(owner: str, source: str, text: str, room: int) -> list[Claim]:
    """The claims of one field."""
    found: list[Claim] = []
    at = 0
    # The 2 of "Notes 2" is its name's.
    named = re.finditer(rf"(?<!\w){re.escape(owner)}(?!\w)", text) if re.search(r"[^\W\d_]", owner) else ()
    inside = {name.start() + digits.start(): name.end() for name in named for digits in RUN.finditer(owner)}
    while len(found) < room and (matched := RUN.search(text, at)):
        at = matched.end()
        if matched.start() in inside:
            at = inside[matched.start()]
        elif date := DATE.match(text, matched.start()):
            at = date.end()
        elif read := _Reading(text, matched.start()).claim(owner, source, len(found)):
            claim, end = read
            found.append(claim)
            at = max(at, end)
    return found


class _Reading:
    """One number and what stands around it."""

    def __init__(self, text: str, start: int) -> None:
        self.text, self.start, self.begin = text, start, start
        self.metric = self.sense = self.unit = ""

    def claim(self, owner: str, source: str, ordinal: int) -> tuple[Claim, int] | None:
        """The claim, and where the reading of the next one goes on."""
        read = amount(self.text, self.start)
        if read is None or not self._begins():
            return None
        value, end, letter = read
        high = None
        joint = RANGE.match(self.text, end) or (BETWEEN.search(self._behind(self.start)) and AND.match(self.text, end))
        if joint and (second := amount(self.text, joint.end())) and second[0] > value:
            high, end, last = second
            scaled = value * (high / bare(self.text, joint.end()))
            if last and not letter and scaled < high:
                value = scaled  # "10-20k": the magnitude at the end is that of both
            letter = last
        plus = self.text[end : end + 1] == "+"
        unit_end = self._unit(end + plus, value, letter)
        if unit_end is None:
            return None
        bound, negated = self._before()
        conditions, end = self._conditions(unit_end)
        text = self.text[self.begin : end].strip()
        digest = hashlib.sha256("\0".join((owner, source, str(ordinal), text)).encode("utf-8", "replace")).hexdigest()
        claim = Claim(
            id=f"clm_{digest[:16]}",
            text=text,
            metric=self.metric or METRICS.get(self.unit, self.unit),
            value=value,
            unit=self.unit,
            sense=self.sense,
            conditions=conditions,
            high=high,
            bound="at least" if plus else bound,
            negated=negated,
            source=source,
        )
        return claim, unit_end

    def _behind(self, end: int) -> str:
        return self.text[max(0, end - BEHIND) : end]

    def _begins(self) -> bool:
        """Whether a number begins here, rather than the rest of a name, a version or a fraction; takes a currency or a sign before it."""
        before = self.text[max(0, self.start - 3) : self.start]
        if before and (before[-1].isalnum() or before[-1] in "_#/@:.,'’&"):
            return False
        if before and before[-1] in "-–—−" and before[:-1].rstrip("$€£¥")[-1:].isalnum():
            return False
        if before and before[-1] in "-−":
            self.begin, self.sense = self.start - 1, "less"
        self.currency = next(
            (CURRENCIES[c] for c in (before[-1:], before[-2:-1] if before[-1:] == " " else "") if c in CURRENCIES), ""
        )
        if self.currency:
            self.begin = self.text.rindex(before.rstrip()[-1], 0, self.start)
        return True

    def _unit(self, at: int, value: float, letter: str) -> int | None:
        """Reads unit, sense and metric after the number; None where it is a bare number, which claims nothing."""
        text = self.text
        if self.currency or (money := CURRENCY_WORD.match(text, at)):
            if not self.currency and money:
                self.currency, at = CURRENCY_NAMES.get(money[1].lower(), money[1].upper()), money.end()
            return self._money(at)
        if relative := TIMES.match(text, at) or PERCENT.match(text, at):
            points = relative.re is PERCENT and relative[2]
            self.unit = "x" if relative.re is TIMES else "points" if points else "%"
            if self.unit == "x" and re.match(r"\s?[0-9]", text[relative.end() : relative.end() + 2]):
                return None  # 20 x 30: a size, not a factor
            return self._relative(relative.end())
        if measure := MEASURE.match(text, at):
            self.unit = measure[1]
            return self._relative(measure.end())
        if text[at : at + 1].isalnum() or re.match(r"[/:][0-9]", text[at : at + 2]):
            return None  # 3rd, 4o, 3/4, 12:30
        return self._count(at, value, letter)

    def _money(self, at: int) -> int:
        self.metric, self.unit = "price", self.currency
        while (per := PER.match(self.text, at)) and len(self.unit) < 60:
            what = " ".join(per[1].lower().split())
            self.unit, at = f"{self.unit} per {PERIODS.get(what, what)}", per.end()
        return at

    def _relative(self, at: int) -> int:
        """After a factor, a share or a measure: a direction and what it is of, such as "less memory" or "accuracy"."""
        default = ""
        if direction := DIRECTION.match(self.text[: at + AHEAD], at):
            word = direction[1].lower()
            self.sense, default = DIRECTIONS[word if word in DIRECTIONS else word.rstrip("s")]
            at = direction.end()
            of = OF.match(self.text, at)
            phrase, end = self._phrase(
                of.end() - 1 if of and word.startswith(("reduction", "increase", "improve", "sav", "gain")) else at
            )
        else:
            phrase, end = self._phrase(at)
        if phrase:
            at = end
            default = f"{phrase} {default}" if default in SUFFIX_METRICS else phrase
        self.metric = default
        return at

    def _phrase(self, at: int, most: int = 3) -> tuple[str, int]:
        """Up to three words of what is counted or measured, ending at the first plural or before a word that is none."""
        words: list[str] = []
        while len(words) < most and (word := WORD.match(self.text, at)) and word[1].lower() not in STOP:
            if word[1].lower().endswith("ly") and words:
                break
            words.append(word[1])
            at = word.end()
            if word[1].endswith("s") and not word[1].endswith("ss"):
                break
        return " ".join(words), at

    def _count(self, at: int, value: float, letter: str) -> int | None:
        phrase, end = self._phrase(at)
        words = {w.lower() for w in phrase.replace("-", " ").split()}
        if letter in ("b", "t") and (not phrase or words & MODELS):
            self.unit, self.metric = "parameters", "model size"
            return end
        if not letter and value < 100 and NAME_BEFORE.search(self._behind(self.start)):
            return None  # Python 3, Llama 4
        if not phrase or (not letter and 1900 <= value <= 2099 and value == int(value)):
            return None
        self.unit = phrase
        self.metric = phrase.split()[-1].lower()
        return end

    def _before(self) -> tuple[str, bool]:
        """The bound and the denial that stand before the number, and the verb and noun whose amount it is."""
        bound = ""
        for pattern, name in BOUNDS:
            if matched := pattern.search(self._behind(self.begin)):
                bound = name
                self.begin -= len(matched[0])
                break
        if between := BETWEEN.search(self._behind(self.start)):
            self.begin = min(self.begin, self.start - len(between[0]))
        behind = self._behind(self.begin)
        if (verb := VERB.search(behind)) and not self.sense and not APART & set(verb[2].lower().split()):
            noun = " ".join(w for w in verb[2].split() if w.lower() not in STOP)
            stem = verb[1].lower()
            if (verb[3] or "").strip().lower() != "to":
                self.sense = "less" if stem in LESS else "faster" if stem == "speed" else "more"
            self.metric = noun or self.metric or ("speed" if stem == "speed" else "")
            self.begin -= len(verb[0])
        elif not self.metric and (subject := SUBJECT.search(behind)) and subject[1].lower() not in STOP:
            self.metric = subject[1].lower()
            self.begin -= len(subject[0])
        denial = NOT.search(self._behind(self.begin))
        if denial is None or EMPHASIS & set(denial[1].lower().split()):
            return bound, False
        self.begin -= len(denial[0])
        return bound, True

    def _conditions(self, at: int) -> tuple[str, int]:
        """What follows "on", "with", "than", ... up to the end of the clause, or stands in brackets."""
        if bracketed := BRACKETED.match(self.text, at):
            return bracketed[1].strip(), bracketed.end()
        if not CONDITION.match(self.text, at):
            return "", at
        window = self.text[at : at + AHEAD]
        if stop := CLAUSE_END.search(window):
            window = window[: stop.start()]
        elif len(window) == AHEAD:
            window = window.rpartition(" ")[0]
        return window.strip(), at + len(window)
