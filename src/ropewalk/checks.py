"""How an answer is held against what was expected; the same checks serve evaluation, suites and rewards.

exact     the expected text, up to white space and Unicode composition
contains  the expected text, or several, as whole words
regex     a pattern in RE2's syntax, whose time grows with the answer and not with its square
numeric   a number, within a tolerance
choice    one of several answers, such as A to D
length    so many characters, words or lines
schema    JSON that a JSON Schema allows
code      Python that passes tests, in a confined process
judge     what no check can tell: a model prefers one answer (compare/), nothing is scored here
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ropewalk import patterns, sandbox
from ropewalk.errors import BadInput, SandboxFailed

Params = Mapping[str, Any]
SHOWN = 80  # characters of an answer in a detail
# A number that is no part of a word: thousands in groups of three, a point before the fraction.
NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
)
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)


@dataclass(frozen=True)
class CheckSpec:
    """One check, as a suite or a reward names it."""

    kind: str
    params: Params = field(default_factory=dict)
    guardrail: bool = False  # must hold whatever the score

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `parse_check` reads it back."""
        return {"kind": self.kind, **self.params} | ({"guardrail": True} if self.guardrail else {})


@dataclass(frozen=True)
class CheckOutcome:
    """What a check says of one answer."""

    passed: bool
    detail: str


def normalise(text: str) -> str:
    """Composed Unicode, single spaces, nothing around: what two equal answers have in common on every machine."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(answer: str, expected: str) -> bool:
    """The answer is the expected text, letter for letter, up to white space and Unicode composition."""
    return normalise(answer) == normalise(expected)


def contains(answer: str, expected: str) -> bool:
    """The expected text stands somewhere in the answer as whole words: right whatever the phrasing; right in value, not in format."""
    answer, expected = normalise(answer), normalise(expected)
    start = answer.find(expected)
    while start >= 0:
        end = start + len(expected)
        before, after = answer[start - 1 : start], answer[end : end + 1]
        if not (before.isalnum() and expected[:1].isalnum()) and not (after.isalnum() and expected[-1:].isalnum()):
            return bool(expected)
        start = answer.find(expected, start + 1)
    return False


def parse_check(value: Any, where: str = "check") -> CheckSpec:
    """A check as JSON says it, {"kind": "regex", "pattern": "..."} or the name of a kind alone; what is wrong with it is said at once."""
    said = {"kind": value} if isinstance(value, str) else value
    if not isinstance(said, Mapping) or not isinstance(said.get("kind"), str):
        raise BadInput(
            f'{where}: {_shown(value)} is no check; expected an object such as {{"kind": "contains", "value": "30 days"}}'
        )
    name = said["kind"]
    if name not in KINDS:
        raise BadInput(f"{where}: '{name[:60]}' is no kind of check; {_meant(name, KINDS)}expected {', '.join(KINDS)}")
    kind, guardrail = KINDS[name], said.get("guardrail", False)
    params = {key: found for key, found in said.items() if key not in ("kind", "guardrail")}
    if not isinstance(guardrail, bool):
        raise BadInput(f"{where}: guardrail is {_shown(guardrail)}; expected true or false")
    for key, found in params.items():
        if key not in kind.keys:
            known = ", ".join(kind.keys) or "nothing more"
            raise BadInput(
                f"{where}: a check of kind '{name}' has no '{str(key)[:60]}'; {_meant(key, kind.keys)}it takes {known}"
            )
        expected, holds = kind.keys[key]
        if not holds(found):
            raise BadInput(f"{where}: {key} is {_shown(found)}; expected {expected}")
    if missing := [key for key in kind.needs if key not in params]:
        raise BadInput(f"{where}: a check of kind '{name}' needs '{missing[0]}', {kind.keys[missing[0]][0]}")
    for fault in kind.faults(params):
        raise BadInput(f"{where}: {fault}")
    return CheckSpec(name, params, guardrail)


def check_reference(spec: CheckSpec, reference: str, where: str = "check") -> None:
    """Raises BadInput for a check that has nothing to hold an answer against, or something that it cannot use."""
    kind = KINDS[spec.kind]
    if not kind.expects:
        return
    expected = _expected(spec.params, reference)
    if not expected:
        raise BadInput(f"{where}: a check of kind '{spec.kind}' needs the prompt's 'reference', or a 'value' of its own")
    if spec.kind == "numeric" and len(_numbers(expected)) != 1:
        raise BadInput(
            f"{where}: the reference {_shown(expected)} is not one number; give the check a 'value', or use 'contains'"
        )
    if spec.kind == "choice" and not any(_same(expected, choice) for choice in spec.params["choices"]):
        raise BadInput(f"{where}: the reference {_shown(expected)} is none of the choices {', '.join(spec.params['choices'])}")


def score(spec: CheckSpec, answer: str, reference: str = "") -> CheckOutcome:
    """Holds an answer against a check. One of kind 'code' takes a process of its own, and so time: ask in a thread."""
    if spec.kind == "judge":
        raise ValueError("a judge is asked by whoever runs the comparison")
    return KINDS[spec.kind].score(spec.params, answer, reference)


# -- texts


def _exact(params: Params, answer: str, reference: str) -> CheckOutcome:
    expected = _expected(params, reference)
    one, other = (text.casefold() if params.get("ignore_case") else text for text in (answer, expected))
    same = exact_match(one, other)
    return CheckOutcome(same, "equal" if same else f"{_shown(answer)} is not {_shown(expected)}")


def _contains(params: Params, answer: str, reference: str) -> CheckOutcome:
    value = params.get("value", reference)
    wanted = [value] if isinstance(value, str) else list(value)
    folded = answer.casefold() if params.get("ignore_case") else answer
    found = [text for text in wanted if contains(folded, text.casefold() if params.get("ignore_case") else text)]
    if params.get("absent"):
        return CheckOutcome(not found, f"has {_shown(found[0])}" if found else "has none of it")
    if params.get("any"):
        return CheckOutcome(bool(found), f"has {_shown(found[0])}" if found else f"has none of {_shown(wanted)}")
    missing = [text for text in wanted if text not in found]
    return CheckOutcome(not missing, f"lacks {_shown(missing[0])}" if missing else f"has {_shown(wanted[0])}")


def _regex(params: Params, answer: str, reference: str) -> CheckOutcome:
    pattern = patterns.compiled(params["pattern"], bool(params.get("ignore_case")))
    found = pattern.fullmatch(answer) if params.get("full") else pattern.search(answer)
    said = f"matches with {_shown(found.group(0))}" if found else "does not match"
    return CheckOutcome(bool(found) != bool(params.get("absent")), said)


def _regex_faults(params: Params) -> Iterator[str]:
    if fault := patterns.fault(params["pattern"]):
        yield fault


def _length(params: Params, answer: str, reference: str) -> CheckOutcome:
    unit = params.get("unit", "words")
    counted = {"characters": len(answer), "words": len(answer.split()), "lines": len(answer.strip().splitlines())}[unit]
    return CheckOutcome(params.get("least", 0) <= counted <= params.get("most", math.inf), f"{counted} {unit}")


def _length_faults(params: Params) -> Iterator[str]:
    if "least" not in params and "most" not in params:
        yield "a check of kind 'length' needs 'least', 'most' or both"
    elif params.get("least", 0) > params.get("most", math.inf):
        yield f"no answer has at least {params['least']} and at most {params['most']}"


# -- values


def _numeric(params: Params, answer: str, reference: str) -> CheckOutcome:
    expected, found = _numbers(_expected(params, reference))[0], _numbers(answer)
    if not found:
        return CheckOutcome(False, f"no number in {_shown(answer)}")
    take = params.get("take", "last")
    if take == "only" and len(set(found)) > 1:
        return CheckOutcome(False, f"{len(set(found))} numbers, expected only {expected:g}")
    got = found[0] if take == "first" else found[-1]
    near = math.isclose(got, expected, rel_tol=params.get("relative", 1e-9), abs_tol=params.get("tolerance", 0.0))
    return CheckOutcome(near, f"{got:.12g}" if near else f"{got:.12g}, expected {expected:.12g}")


def _numbers(text: str) -> list[float]:
    found = (float(one[0].replace(",", "").replace("−", "-")) for one in NUMBER.finditer(text))
    return [number for number in found if math.isfinite(number)]


def _choice(params: Params, answer: str, reference: str) -> CheckOutcome:
    expected, took = _expected(params, reference), _chosen(answer, params["choices"])
    if took is None:
        return CheckOutcome(False, f"{_shown(answer)} is not one of {', '.join(params['choices'])}")
    return CheckOutcome(_same(took, expected), took if _same(took, expected) else f"{took}, expected {expected}")


def _chosen(answer: str, choices: list[str]) -> str | None:
    """The choice that an answer is, is said to be ("the answer is B"), begins with ("B)"), or alone has; None where it has several."""
    bare = normalise(answer).strip("()[].:*\"' ")
    for choice in choices:
        if _same(bare, choice):
            return choice
    ways = "|".join(sorted((re.escape(choice) for choice in choices), key=len, reverse=True))
    text = normalise(answer)
    said = re.findall(rf"\banswer(?: is|:) ?[(\[*\"']{{0,3}}({ways})(?!\w)", text, re.I)
    begun = re.match(rf"[(\[*\"']{{0,3}}({ways})(?:[).:\]*\"']|$)", text, re.I)
    took = said[-1] if said else begun[1] if begun else None
    if took is None:
        alone = [choice for choice in choices if contains(text, choice)]
        took = alone[0] if len(alone) == 1 else None
    return next((choice for choice in choices if took is not None and _same(choice, took)), None)


def _same(one: str, other: str) -> bool:
    return normalise(one).casefold() == normalise(other).casefold()


def _expected(params: Params, reference: str) -> str:
    value = params.get("value", reference)
    return "".join(value) if isinstance(value, (list, str)) else repr(value)


# -- JSON


def _schema(params: Params, answer: str, reference: str) -> CheckOutcome:
    from ropewalk import schemas  # jsonschema takes seconds to import where packages for its formats are installed

    fenced = FENCE.search(answer) if params.get("fenced") else None
    breach = schemas.breach(params["schema"], fenced[1] if fenced else answer)
    return CheckOutcome(breach is None, breach or "allowed")


def _schema_faults(params: Params) -> Iterator[str]:
    from ropewalk import schemas

    return schemas.faults(params["schema"])


# -- code


def _code(params: Params, answer: str, reference: str) -> CheckOutcome:
    blocks = FENCE.findall(answer)
    limits = {"seconds": params.get("seconds", 5.0), "memory_bytes": params.get("memory_mb", 512) << 20}
    try:
        sandbox.call("ropewalk.tried_code:run", (blocks[-1] if blocks else answer, params["tests"]), **limits, task="the code")
    except SandboxFailed as error:
        if error.reason == "killed":  # which is not the code's doing
            raise
        return CheckOutcome(False, str(error)[:200])
    return CheckOutcome(True, "the tests pass")


def _code_faults(params: Params) -> Iterator[str]:
    try:
        compile(params["tests"], "tests", "exec")
    except (SyntaxError, ValueError) as error:
        yield f"the tests are no Python: {error}"
    except (RecursionError, MemoryError):
        yield "the tests are nested too deeply"


# -- the kinds

Rule = tuple[str, Callable[[Any], bool]]  # what is expected, in words, and whether a value is that


def _number(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= least


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and normalise(text) for text in value)


FLAG: Rule = ("true or false", lambda value: isinstance(value, bool))
TEXT: Rule = ("a text that is not empty", lambda value: isinstance(value, str) and bool(normalise(value)))
TEXTS: Rule = ("a text, or a list of texts", lambda value: TEXT[1](value) or _texts(value))
SPREAD: Rule = ("a number from 0", lambda value: _number(value, 0))
COUNT: Rule = ("a whole number from 0", lambda value: _number(value, 0) and isinstance(value, int))


def _one_of(*words: str) -> Rule:
    return f"one of {', '.join(words)}", lambda value: value in words


def _no_faults(params: Params) -> Iterator[str]:
    return iter(())


def _unscored(params: Params, answer: str, reference: str) -> CheckOutcome:
    raise AssertionError("not scored by a check")


@dataclass(frozen=True)
class _Kind:
    score: Callable[[Params, str, str], CheckOutcome]
    keys: Mapping[str, Rule]
    needs: tuple[str, ...] = ()
    expects: bool = False  # a value of its own, or the prompt's reference
    faults: Callable[[Params], Iterator[str]] = _no_faults


KINDS: Mapping[str, _Kind] = {
    "exact": _Kind(_exact, {"value": TEXT, "ignore_case": FLAG}, expects=True),
    "contains": _Kind(_contains, {"value": TEXTS, "any": FLAG, "absent": FLAG, "ignore_case": FLAG}, expects=True),
    "regex": _Kind(
        _regex, {"pattern": TEXT, "full": FLAG, "absent": FLAG, "ignore_case": FLAG}, ("pattern",), faults=_regex_faults
    ),
    "numeric": _Kind(
        _numeric,
        {
            "value": ("a number", _number),
            "tolerance": SPREAD,
            "relative": SPREAD,
            "take": _one_of("last", "first", "only"),
        },
        expects=True,
    ),
    "choice": _Kind(_choice, {"choices": ("a list of texts", _texts), "value": TEXT}, ("choices",), expects=True),
    "length": _Kind(
        _length,
        {"unit": _one_of("characters", "words", "lines"), "least": COUNT, "most": COUNT},
        faults=_length_faults,
    ),
    "schema": _Kind(
        _schema,
        {"schema": ("a JSON Schema", lambda value: isinstance(value, (dict, bool))), "fenced": FLAG},
        ("schema",),
        faults=_schema_faults,
    ),
    "code": _Kind(
        _code,
        {
            "tests": TEXT,
            "seconds": ("a number of seconds from 0.1 to 60", lambda value: _number(value, 0.1) and value <= 60),
            "memory_mb": ("a whole number from 64 to 4096", lambda value: COUNT[1](value) and 64 <= value <= 4096),
        },
        ("tests",),
        faults=_code_faults,
    ),
    "judge": _Kind(_unscored, {"question": TEXT}),
}


def _meant(word: Any, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(word), list(known), 1)
    return f"did you mean '{near[0]}'? " if near else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
