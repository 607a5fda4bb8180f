"""The arguments of `chat`."""

from __future__ import annotations

import argparse

from ropewalk.verbs import Verbs, add_verb, registry_of, settings_of, store_arguments


def add_verbs(verbs: Verbs) -> None:
    """`chat`."""
    chat = add_verb(
        verbs,
        "chat",
        "ask a published model or alias",
        "ropewalk chat answers 'What does it cost?' --file report.pdf",
        _chat,
    )
    chat.add_argument("name", help="an alias, a base or an adapter; see `ropewalk models list`")
    chat.add_argument("prompt", nargs="?", help="one question; without it, a conversation until end of input")
    chat.add_argument("--max-tokens", type=int, default=512, help="(default: %(default)s)")
    chat.add_argument(
        "--file", action="append", default=[], metavar="FILE", help="a file to ask about, or its id; may be given several times"
    )
    store_arguments(chat)


def _chat(arguments: argparse.Namespace) -> int:
    known = registry_of(arguments)
    known.resolve(arguments.name)  # an unknown name is told before anything is loaded
    import asyncio

    from ropewalk.engine.conversation import converse

    settings = settings_of(arguments)
    asyncio.run(converse(settings, known, arguments.name, arguments.prompt, arguments.file, arguments.max_tokens))
    return 0
