"""Where sentences end, by rules, in any script; exact to the character: the spans of a text follow one another without a gap.

    for begin, end in sentences(text): text[begin:end]      a sentence and the blanks after it

Left out on purpose: models and word lists of languages. What is not known to be an abbreviation ends a sentence.
"""

from __future__ import annotations

import re

LONGEST = 1200  # characters of a sentence; what is longer has no sentences that rules could find
NARROW = 50  # a shorter line was ended by its writer, not by the width of a page
CLOSERS = "\"'”’»)\\]"
WIDE = "。！？｡"  # end a sentence without a blank
WIDE_CLOSERS = WIDE + "」』”’）"
# Repetitions are bounded, so that no text takes longer than its length.
PLACE = re.compile(
    rf"(?P<mark>[.!?…।॥؟۔።][.!?…{CLOSERS}]{{0,8}})\s+(?=\S)|(?P<wide>[{WIDE}][{WIDE_CLOSERS}]{{0,8}}+)\s*(?=\S)|\n\s*(?=\S)"
)
LOOK_BACK = 200  # characters of a line that are looked at
NEVER_LAST = frozenset("dr mr mrs ms mme prof rev gen col capt lt st vs e.g i.e cf ca approx resp bzw z.b u.a d.h vgl".split())
BEFORE_NUMBERS = frozenset(
    "no nos nr fig figs eq eqs vol vols p pp ed ch sec art abs tab jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
BULLETS = frozenset("-*•–—#|>·")
LIST_NUMBER = re.compile(r"\s*(?:\d{1,3}|[A-Za-z])[.)]")


def sentences(text: str, begin: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """The sentences of a part of a text, as offsets into the text."""
    end = len(text) if end is None else end
    found: list[tuple[int, int]] = []
    last = begin + len(text[begin:end].rstrip())
    for match in PLACE.finditer(text, begin, last):
        if _ends(text, begin, match):
            found += _cut(text, begin, match.end())
            begin = match.end()
    return found + _cut(text, begin, end)


def ended(statement: str, following: str) -> bool:
    """Whether a text that comes bit by bit has ended a sentence where this character, which is no blank, follows."""
    if not statement or not (statement[-1].isspace() or (statement[-1] in WIDE_CLOSERS and following not in WIDE_CLOSERS)):
        return False
    text = statement + following
    places = list(PLACE.finditer(text, max(0, len(statement) - LOOK_BACK)))
    return bool(places) and places[-1].end() == len(statement) and _ends(text, 0, places[-1])


def _ends(text: str, begin: int, match: re.Match[str]) -> bool:
    following = text[match.end()]
    if match["wide"]:
        return True
    gap = text[match.start() + len(match["mark"] or "") : match.end()]
    if gap.count("\n") > 1 or (gap.count("\n") == 1 and following in BULLETS):
        return True
    before = text[max(begin, match.start() - LOOK_BACK) : match.start()]
    line = before[before.rfind("\n") + 1 :]
    if match["mark"] is None:
        numbered = following.isdigit() and LIST_NUMBER.match(line) is not None
        wrapped = len(line) >= NARROW or line.rstrip()[-1:] in (",", "-", ";") or following.islower()
        return numbered or not wrapped
    if following.islower() or following in ",;:-–—)]":
        return False
    return match["mark"][0] != "." or not _abbreviates(line, following)


def _abbreviates(line: str, following: str) -> bool:
    """Whether the dot after this line belongs to its last word, and the sentence goes on."""
    word = re.split(r"[\s(\[\"'“‘«]", line)[-1]
    if line.strip() == word and LIST_NUMBER.fullmatch(word + "."):
        return True  # the number of an item
    plain = word.lower()
    if plain in BEFORE_NUMBERS or plain in ("a.m", "p.m"):
        return following.isdigit()
    return (
        plain in NEVER_LAST
        or (len(word) == 1 and word.isalpha() and word.isupper())
        or re.fullmatch(r"\w(\.\w)+", word) is not None
    )


def _cut(text: str, begin: int, end: int) -> list[tuple[int, int]]:
    """The span, in parts at blanks where it is too long."""
    found: list[tuple[int, int]] = []
    while end - begin > LONGEST:
        blank = max(
            text.rfind(" ", begin + LONGEST // 2, begin + LONGEST), text.rfind("\n", begin + LONGEST // 2, begin + LONGEST)
        )
        place = blank + 1 if blank >= 0 else begin + LONGEST
        found.append((begin, place))
        begin = place
    return [*found, (begin, end)] if end > begin else found
