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
from dataclasses import dataclass
from typing import Literal

from ropewalk.chat.marks import TAG, Span, Turn, locate
from ropewalk.chat.rendering import Message
from ropewalk.errors import DataError

When = Literal["turn", "last", "all", "none"]


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
    """What a template does around an assistant's turn, learnt from its own rendering of a few probes."""

    prompt: str  # the generation prompt, or, where there is none, what the template writes before an answer
    leads: tuple[str, ...]  # all that it writes before a plain answer: at the end of a conversation, and inside it
    stable: str  # what the generation prompt and all of these begin with
    ends: tuple[str, ...]  # what may end a turn
    last_end: str  # what ends the last one of a conversation
    eos: str | None


# Digits, so that a template that changes the case of words is understood too.
_QUESTION, _ANSWER, _THOUGHT = "271828182", "314159265", "161803398"


def learn(render: Callable[..., str], tokens: Sequence[str], eos: str | None, given: Sequence[str]) -> Habits:
    """Render a question and an answer a few times, and see what the template writes before and after the answer."""
    question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    try:
        asked, prompted = render([question]), render([question], add_generation_prompt=True)
        final, going_on = render([question, answer]), render([question, answer], add_generation_prompt=True)
        between = render([question, answer, question])
        thinking = render([question, {**answer, "reasoning_content": _THOUGHT}])
    except DataError:
        return Habits("", (), "", _distinct([*given, eos]), "", eos)
    if not all(_ANSWER in text for text in (final, going_on, between, thinking)):
        return Habits("", (), "", _distinct([*given, eos]), "", eos)
    prompt = prompted.removeprefix(asked) if prompted.startswith(asked) else ""
    ends = [
        _ending(final.rpartition(_ANSWER)[2], tokens),
        _ending(going_on.rpartition(_ANSWER)[2].removesuffix(prompt), tokens),
    ]
    # What a template writes at the very end of a text (an end of sequence) does not stand before an answer.
    heads = [text[len(_shared([asked, text])) : text.find(_ANSWER)] for text in (final, between, thinking)]
    heads[2] = heads[2].partition(_THOUGHT)[0]
    leads = tuple(sorted(dict.fromkeys(heads[:2]), key=len, reverse=True))
    # Without a generation prompt nobody but the template would write this header, so it is not for the model to learn.
    prompt = prompt or _shared(leads).rstrip(" ")
    return Habits(prompt, leads, _shared([prompt, *heads]), _distinct([*given, *ends, eos]), ends[0], eos)


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
    turns, blocks = locate(messages, wanted, text, render)
    spans: list[Span] = []
    before = 0
    for index in wanted:
        turn, message = turns[index], messages[index]
        limit = _limit(turn, turns, messages, text, render)
        if message.get("role") == "assistant":
            _bound(turn, message, habits, messages, text, before, limit, render)
            _keep_to_block(turn, blocks)
            _check_calls(turn, message, text)
        elif turn.marks:
            turn.begin = turn.first
            turn.closes = _closing(turn, message, habits, text, limit, attached=True)
        else:
            raise DataError(f"message {index + 1}: the chat template leaves this message out, so it cannot be trained")
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


def _limit(turn: Turn, turns: Mapping[int, Turn], messages: Sequence[Message], text: str, render: Callable[..., str]) -> int:
    """A place in the text that is certainly after this turn and not within the words of a later one."""
    if turn.index == len(messages) - 1:
        return len(text)
    if (after := turns.get(turn.index + 1)) and after.marks:
        return after.first
    until = render(messages[: turn.index + 1])
    if text.startswith(until):
        return len(until)
    raise DataError(f"message {turn.index + 1}: the chat template does not show where this turn ends")


def _bound(
    turn: Turn,
    message: Message,
    habits: Habits,
    messages: Sequence[Message],
    text: str,
    before: int,
    limit: int,
    render: Callable[..., str],
) -> None:
    """Sets where the assistant's turn begins, where its words end and where the end-of-turn token ends."""
    turn.begin = _beginning(turn, message, habits, text, before) if turn.marks else -1
    if turn.begin < 0:
        turn.begin = _beginning_by_prefix(turn, habits, messages, text, render)
    if turn.marks and turn.begin > turn.first:
        raise DataError(f"message {turn.index + 1}: the chat template does not show where the assistant begins to write")
    turn.closes = _closing(turn, message, habits, text, limit)


def _beginning(turn: Turn, message: Message, habits: Habits, text: str, before: int) -> int:
    """Where the generation prompt before the turn's first mark ends; -1 where that cannot be told from the text alone."""
    first, kept = turn.first, turn.before_first(message)
    verbatim = text.endswith(kept, before, first)
    starts = ([first - len(kept)] if verbatim else []) + ([first] if verbatim or not kept.strip() else [])
    for lead in habits.leads if turn.first_key == "content" else ():
        for start in starts:
            if text.endswith(lead, before, start):
                return start - len(lead) + len(_shared([lead, habits.prompt]))
    for header in (habits.prompt, habits.stable):
        if header and (at := text.rfind(header, before, first)) >= 0:
            return at + len(header)
    return -1


def _beginning_by_prefix(turn: Turn, habits: Habits, messages: Sequence[Message], text: str, render: Callable[..., str]) -> int:
    """The length of the conversation before the turn, rendered by itself, if the text begins with just that."""
    prompted = render(messages[: turn.index], add_generation_prompt=True)
    if text.startswith(prompted):
        return len(prompted)
    asked = render(messages[: turn.index])
    if text.startswith(asked + habits.stable):
        return len(asked + habits.stable)
    raise DataError(f"message {turn.index + 1}: the chat template does not show where the assistant begins to write")


def _closing(turn: Turn, message: Message, habits: Habits, text: str, limit: int, *, attached: bool = False) -> int:
    """Where the end-of-turn token ends; sets where the words end. `attached`: only white space may stand before the token."""
    turn.end = last = turn.last(message, text) if turn.marks else turn.begin
    found = re.compile("|".join(map(re.escape, habits.ends))).search(text, last, limit) if habits.ends else None
    if found is not None and not (attached and text[last : found.start()].strip()):
        turn.end = found.start()
        return found.end()
    if message.get("tool_calls") or not turn.marks:
        raise DataError(
            f"message {turn.index + 1}: the chat template does not end this turn with any of {list(habits.ends)}; "
            "if another token does, name it in eot_tokens"
        )
    return last


def _check_calls(turn: Turn, message: Message, text: str) -> None:
    for call in message.get("tool_calls") or ():
        name = (call.get("function") or call).get("name") if isinstance(call, Mapping) else None
        if isinstance(name, str) and name not in text[turn.begin : turn.closes]:
            raise DataError(f"message {turn.index + 1}: the chat template does not show its call of '{name}'", key="tool_calls")


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


def _ending(tail: str, tokens: Sequence[str]) -> str:
    """What ends an answer: all up to the first token of the vocabulary's added ones, else what looks like such a token."""
    tail = tail.lstrip()
    found = [at + len(token) for token in tokens if (at := tail.find(token)) >= 0]
    if found:
        return tail[: min(found)]
    like = TAG.match(tail)
    return like[0] if like else ""


def _shared(texts: Sequence[str]) -> str:
    """The longest beginning that all have."""
    low, high = (min(texts), max(texts)) if texts else ("", "")
    return low[: next((at for at, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))]


def _distinct(tokens: Sequence[str | None]) -> tuple[str, ...]:
    # Longest first where one begins another, so that the search takes the whole token.
    return tuple(sorted(dict.fromkeys(token for token in tokens if token), key=len, reverse=True))
