"""Which characters of a rendered conversation the assistant wrote, found by marking its words and rendering again.

    messages --render--> text                      what is tokenised
    messages with marks --render--> marked text    the same, with invisible marks inside the assistant's words

Without its marks the second must equal the first; then each mark says where a known character of a known message ended up,
whatever the template strips, moves or adds. A turn is everything from the end of the generation prompt to the end-of-turn
token: the words, and what the template writes around them for the model to produce (thinking tags, calls). Where that cannot
be told exactly: an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ropewalk.chat.rendering import BLOCK_CLOSES, BLOCK_OPENS, MARK, Message, Program
from ropewalk.errors import DataError

When = Literal["turn", "last", "all", "none"]
Span = tuple[int, int]
SPOKEN = ("content", "reasoning_content", "reasoning", "thinking")
_PRIVATE = re.compile("[\U000f0000-\U000ffffd]")
_TAG = re.compile(r"</?[A-Za-z_|][^<>\n]{0,40}>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class Rules:
    """What of a conversation is trained: Axolotl's keys of the same names."""

    roles_to_train: tuple[str, ...] = ("assistant",)
    train_on_eos: When = "turn"
    train_on_eot: When | None = None
    train_on_inputs: bool = False
    last_only: bool = False

    def trains(self, index: int, message: Message, count: int) -> bool:
        """Whether a message is trained: its own flag first, then its details, then its role."""
        if message.get("training") is not None:
            return bool(message["training"])
        if message.get("training_detail") or message.get("reasoning_training_detail"):
            return True
        if self.last_only:
            return index == count - 1
        return self.train_on_inputs or message.get("role") in self.roles_to_train


@dataclass(frozen=True)
class Habits:
    """What a template does around an assistant's turn, learnt from its own rendering of two probes."""

    prompt: str  # the generation prompt, or, where there is none, what the template writes before an answer
    lead: str  # from the end of the question to the first word of a plain answer; begins with `prompt`
    ends: tuple[str, ...]  # what may end a turn
    ends_inside: bool  # whether a turn in mid-conversation is ended too
    eos: str | None


@dataclass
class Turn:
    """Where one message's words are in the text: (place in the text, place in the field) of each mark that survived."""

    index: int
    marks: dict[str, list[Span]] = field(default_factory=dict)
    begin: int = -1
    end: int = -1  # of the words; the end-of-turn token begins here
    closes: int = -1  # after the end-of-turn token

    @property
    def first(self) -> int:
        return min(at for places in self.marks.values() for at, _ in places)

    def before_first(self, message: Message) -> str:
        """What the field has before its first mark: white space or a tag."""
        key, (_, place) = min(((k, places[0]) for k, places in self.marks.items()), key=lambda found: found[1])
        return message[key][:place] if key in SPOKEN else ""

    def last(self, message: Message, text: str) -> int:
        """Where the words end: after the last mark and what follows it in the field, if the template kept that."""
        key, (at, place) = max(((k, places[-1]) for k, places in self.marks.items()), key=lambda found: found[1])
        rest = message[key][place:].rstrip() if key in SPOKEN else ""
        return at + len(rest) if text.startswith(rest, at) else at


def learn(program: Program, specials: Sequence[str], eos: str | None, given: Sequence[str]) -> Habits:
    """Render a question and an answer once, and see what the template writes before and after the answer."""
    question, answer = {"role": "user", "content": "Ropewalkasks"}, {"role": "assistant", "content": "Ropewalkanswers"}
    try:
        asked = program.run([question])
        prompted = program.run([question], add_generation_prompt=True)
        final = program.run([question, answer])
        inside = program.run([question, answer], add_generation_prompt=True)
    except DataError:
        return Habits("", "", _distinct([*given, eos]), True, eos)
    prompt = prompted[len(asked) :] if prompted.startswith(asked) else ""
    start = final.rfind(answer["content"])
    lead = final[len(asked) : start] if final.startswith(asked) and start >= len(asked) else prompt
    after = inside[inside.rfind(answer["content"]) + len(answer["content"]) :].removesuffix(prompt)
    ends = _endings(final[start + len(answer["content"]) :], specials), _endings(after, specials)
    if not prompt:
        # Without a generation prompt nobody but the template would write this header, so it is not for the model to learn.
        prompt = lead.rstrip(" ")
    return Habits(prompt, lead if lead.startswith(prompt) else prompt, _distinct([*given, *ends, eos]), bool(ends[1]), eos)


def trained_spans(
    habits: Habits,
    messages: Sequence[Message],
    text: str,
    rules: Rules,
    render: Callable[..., str],
) -> list[Span]:
    """The spans of `text` that are trained; `render(messages, **options)` renders with this row's tools and variables."""
    count = len(messages)
    wanted = [i for i, message in enumerate(messages) if rules.trains(i, message, count)]
    if not wanted:
        return []
    turns, blocks = _locate(messages, wanted, text, render)
    spans: list[Span] = []
    before = 0
    for turn in turns:
        message = messages[turn.index]
        if message.get("role") == "assistant":
            _bound(turn, habits, messages, text, before, render)
            _keep_to_block(turn, blocks)
        else:
            if not turn.marks:
                raise DataError(f"message {turn.index + 1}: the chat template leaves this message out, so it cannot be trained")
            turn.begin = turn.first
            turn.closes = _closing(turn, message, habits, text, attached=True)
        before = turn.closes
        spans += _words(turn, message, text)
        spans += [(turn.end, turn.closes)] if turn.closes > turn.end and _ends_trained(rules, habits, text, turn) else []
        spans += _final_eos(turn, habits, text, rules)
    return spans


def everywhere(text: str, tokens: Sequence[str], when: When) -> list[Span]:
    """The spans of the named tokens anywhere ("all") or in their last place ("last")."""
    if when not in ("all", "last") or not tokens:
        return []
    found = [match.span() for match in re.finditer("|".join(map(re.escape, tokens)), text)]
    return found[-1:] if when == "last" else found


def _locate(
    messages: Sequence[Message], wanted: Sequence[int], text: str, render: Callable[..., str]
) -> tuple[list[Turn], list[Span]]:
    if _PRIVATE.search(text):
        raise DataError("holds characters of Unicode's private plane 15, which are used to find the trained words; remove them")
    for fields in (("content", "thoughts", "calls"), ("content", "thoughts"), ("content",), ()):
        marked, meaning = _mark(messages, wanted, fields)
        try:
            rendered = render(marked, fencing=True)
        except DataError:
            continue
        if _PRIVATE.sub("", rendered) == text:
            return _read_marks(rendered, meaning, wanted)
    raise DataError("the chat template renders this conversation differently each time, so its mask cannot be told exactly")


def _mark(messages: Sequence[Message], wanted: Sequence[int], fields: Sequence[str]) -> tuple[list[Message], list[Any]]:
    marked, meaning = list(messages), []

    def sow(index: int, key: str, text: str) -> str:
        pieces, done = [], 0
        for at in _places(text):
            meaning.append((index, key, at))
            pieces += [text[done:at], chr(MARK + len(meaning) - 1)]
            done = at
        return "".join([*pieces, text[done:]])

    for index in wanted:
        message = dict(messages[index])
        for key in SPOKEN:
            # Templates ask whether a field is empty, so an empty one is marked only where there is nothing else to mark.
            if isinstance(words := message.get(key), str) and ("content" if key == "content" else "thoughts") in fields:
                alone = key == "content" and not message.get("tool_calls")
                message[key] = sow(index, key, words) if words.strip() or alone else words
        if "calls" in fields and message.get("tool_calls"):
            message["tool_calls"] = _sow_calls(message["tool_calls"], partial(sow, index, "calls"))
        marked[index] = message
    return marked, meaning


def _sow_calls(value: Any, sow: Callable[[str], str], key: str = "") -> Any:
    """Marks in the strings of call arguments; names, ids and types stay as they are, since templates compare them."""
    if isinstance(value, Mapping):
        return {k: _sow_calls(v, sow, "arguments" if key == "arguments" else k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_sow_calls(item, sow, key) for item in value]
    return sow(value) if isinstance(value, str) and key == "arguments" else value


def _places(text: str) -> list[int]:
    """Where marks go: beside the outermost characters and beside tags, never where a template would strip or look for a tag."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if start >= end:
        return [0]
    places, at = [], start
    for tag in _TAG.finditer(text, start, end):
        if words := text[at : tag.start()].rstrip():
            places += [at, at + len(words)]
        at = tag.end() + len(text[tag.end() : end]) - len(text[tag.end() : end].lstrip())
    return [*places, at, end] if at < end else places


def _read_marks(rendered: str, meaning: Sequence[Any], wanted: Sequence[int]) -> tuple[list[Turn], list[Span]]:
    turns = {index: Turn(index) for index in wanted}
    blocks, opened, seen = [], [], set()
    for order, match in enumerate(_PRIVATE.finditer(rendered)):
        mark, at = match.group(), match.start() - order
        if mark == BLOCK_OPENS:
            opened.append(at)
        elif mark == BLOCK_CLOSES:
            blocks.append((opened.pop(), at))
        else:
            index, key, place = meaning[ord(mark) - MARK]
            if mark in seen:
                raise DataError(f"the chat template writes message {index + 1} twice, so its mask cannot be told exactly")
            seen.add(mark)
            turns[index].marks.setdefault(key, []).append((at, place))
    return list(turns.values()), blocks


def _bound(turn: Turn, habits: Habits, messages: Sequence[Message], text: str, before: int, render: Callable[..., str]) -> None:
    """Sets where the assistant's turn begins, where its words end and where the end-of-turn token ends."""
    if not turn.marks:
        _bound_by_prefix(turn, habits, messages, text, render)
        return
    message, first, prompt, lead = messages[turn.index], turn.first, habits.prompt, habits.lead
    kept = turn.before_first(message)
    starts = [first - len(kept), first] if text.endswith(kept, before, first) else [first]
    if fits := [at for at in starts if text.endswith(lead, before, at)]:
        turn.begin = fits[0] - len(lead) + len(prompt)
    elif prompt and (at := text.rfind(prompt, before, first)) >= 0:
        turn.begin = at + len(prompt)
    elif any(text.endswith(prompt[:size], before, first) for size in range(len(prompt), 0, -1)):
        turn.begin = first
    else:
        so_far = render(messages[: turn.index], add_generation_prompt=True)
        if not text.startswith(so_far) or len(so_far) > first:
            raise DataError(f"message {turn.index + 1}: the chat template does not show where the assistant begins to write")
        turn.begin = len(so_far)
    turn.closes = _closing(turn, message, habits, text, attached=turn.index < len(messages) - 1 and not habits.ends_inside)


def _bound_by_prefix(turn: Turn, habits: Habits, messages: Sequence[Message], text: str, render: Callable[..., str]) -> None:
    """For a turn without words of its own (a call without text): from the prompt to the end of the conversation so far."""
    begin = render(messages[: turn.index], add_generation_prompt=True)
    until = render(messages[: turn.index + 1])
    if not (text.startswith(begin) and text.startswith(until) and len(until) > len(begin)):
        raise DataError(
            f"message {turn.index + 1}: the chat template leaves this message out or rewrites it, so it cannot be masked"
        )
    turn.begin = len(begin)
    turn.end = max((until.rfind(end) for end in habits.ends), default=-1)
    if turn.end < turn.begin:
        raise DataError(f"message {turn.index + 1}: the chat template does not end this turn with any of {list(habits.ends)}")
    turn.closes = turn.end + next(len(end) for end in habits.ends if text.startswith(end, turn.end))


def _closing(turn: Turn, message: Message, habits: Habits, text: str, *, attached: bool) -> int:
    """Where the end-of-turn token ends; sets where the words end. `attached`: only white space may stand before the token."""
    last = turn.last(message, text)
    turn.end = last
    found = re.compile("|".join(map(re.escape, habits.ends))).search(text, last) if habits.ends else None
    if found is None or (attached and text[last : found.start()].strip()):
        return last
    turn.end = found.start()
    return found.end()


def _keep_to_block(turn: Turn, blocks: Sequence[Span]) -> None:
    if not blocks:
        return
    inside = [(begin, end) for begin, end in blocks if begin < turn.closes and end > turn.begin]
    if not inside:
        raise DataError(f"message {turn.index + 1}: the chat template writes this turn outside its generation blocks")
    turn.begin = max(turn.begin, inside[0][0])
    turn.end = max(turn.begin, min(turn.end, inside[-1][1]))


def _words(turn: Turn, message: Message, text: str) -> Iterator[Span]:
    details = {"content": message.get("training_detail"), "reasoning_content": message.get("reasoning_training_detail")}
    if not any(details.values()):
        yield (turn.begin, turn.end)
        return
    for key, pieces in details.items():
        places = turn.marks.get(key, [])
        if not pieces or not places:
            continue
        at, place = places[0]
        words = message[key]
        if text[at : places[-1][0]] != words[place : places[-1][1]]:
            raise DataError(f"message {turn.index + 1}: the chat template rewrites '{key}', so parts of it cannot be masked")
        for piece in pieces:
            if piece["train"]:
                yield (at + max(piece["begin_offset"] - place, 0), at + min(piece["end_offset"] + 1, places[-1][1]) - place)


def _ends_trained(rules: Rules, habits: Habits, text: str, turn: Turn) -> bool:
    token = text[turn.end : turn.closes]
    when = rules.train_on_eos if token == habits.eos or rules.train_on_eot is None else rules.train_on_eot
    return when == "turn"


def _final_eos(turn: Turn, habits: Habits, text: str, rules: Rules) -> list[Span]:
    """An end-of-sequence token that follows the end of the turn (`<|end|>`, newline, `<|endoftext|>`)."""
    if rules.train_on_eos != "turn" or not habits.eos or text[turn.end : turn.closes] == habits.eos:
        return []
    at = turn.closes + len(text[turn.closes :]) - len(text[turn.closes :].lstrip())
    return [(at, at + len(habits.eos))] if text.startswith(habits.eos, at) else []


def _endings(tail: str, specials: Sequence[str]) -> str:
    """The first special token after an answer, or, where there is none, whatever the template writes to end it."""
    found = min(((at, -len(token), token) for token in specials if (at := tail.find(token)) >= 0), default=None)
    return found[2] if found else tail.strip()


def _distinct(tokens: Sequence[str | None]) -> tuple[str, ...]:
    # Longest first where one begins another, so that the search takes the whole token.
    return tuple(sorted(dict.fromkeys(token for token in tokens if token), key=len, reverse=True))
