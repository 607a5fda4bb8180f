"""Numbers as people write them in prose: 1,234.5 and 1.234,5, 10 000, 10k, 30B."""

from __future__ import annotations

import re

# A run of digits and separators. No tail follows the star, so that a long run is read once.
RUN = re.compile(r"[0-9][0-9.,'’\u00a0\u202f]*")
PLAIN = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,9})?")
THOUSANDS = re.compile(r"[0-9]{1,3}([,'’\u00a0\u202f])[0-9]{3}(?:\1[0-9]{3}){0,4}(?:\.[0-9]{1,9})?")
DOTTED = re.compile(r"[0-9]{1,3}(?:\.[0-9]{3}){2,4}(?:,[0-9]{1,9})?|[0-9]{1,3}\.[0-9]{3},[0-9]{1,9}")
DECIMAL_COMMA = re.compile(r"[0-9]{1,15},[0-9]{1,2}")
SPACED = re.compile(r" [0-9]{3}(?![0-9.,])")
MAGNITUDE = re.compile(r"(?:([kKMBT])(?!\w)|\s?(bn|mn|thousand|million|billion|trillion)\b)")
FACTORS = {"k": 1e3, "thousand": 1e3, "m": 1e6, "mn": 1e6, "million": 1e6}
FACTORS |= {"b": 1e9, "bn": 1e9, "billion": 1e9, "t": 1e12, "trillion": 1e12}


def number(run: str) -> float | None:
    """A run of digits and separators as a number, or None where it is a version, a list, or too long."""
    if PLAIN.fullmatch(run):
        return float(run)
    if THOUSANDS.fullmatch(run):
        return float(re.sub(r"[^0-9.]", "", run))
    if DOTTED.fullmatch(run):
        return float(run.replace(".", "").replace(",", "."))
    return float(run.replace(",", ".")) if DECIMAL_COMMA.fullmatch(run) else None


def amount(text: str, at: int) -> tuple[float, int, str] | None:
    """The number that begins at a place: its value, where it ends, and its magnitude's letter."""
    matched = RUN.match(text, at)
    if matched is None:
        return None
    run = matched[0].rstrip(".,'’\u00a0\u202f")
    value = number(run) if len(run) <= 32 else None
    if value is None:
        return None
    end = at + len(run)
    if value < 1000 and run.isdigit():
        while (group := SPACED.match(text, end)) and value < 1e12:
            value, end = value * 1000 + int(group[0]), group.end()
    if magnitude := MAGNITUDE.match(text, end):
        word = (magnitude[1] or magnitude[2]).lower()
        return value * FACTORS[word], magnitude.end(), word[0]
    return value, end, ""


def bare(text: str, at: int) -> float:
    """The number at a place without its magnitude."""
    matched = RUN.match(text, at)
    assert matched is not None
    value = number(matched[0].rstrip(".,'’\u00a0\u202f"))
    assert value is not None
    return value or 1.0
