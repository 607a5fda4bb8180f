"""The arguments of `jobs`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ropewalk.verbs import Verb, Verbs, add_verb, json_argument, settings_of, store_arguments

if TYPE_CHECKING:
    from ropewalk.jobs.commands import Place


def add_verbs(verbs: Verbs) -> None:
    """`jobs ...`."""
    jobs = add_verb(verbs, "jobs", "trainings that the server runs", "ropewalk jobs list")
    inner = jobs.add_subparsers(metavar="VERB")
    listed = _verb(inner, "list", "list jobs, newest first", "", _list)
    listed.add_argument("--limit", type=int, default=100, metavar="N", help="(default: %(default)s)")
    json_argument(listed)
    show = _verb(inner, "show", "show how far a job is, and what happened", "ftjob_abc", _show)
    show.add_argument("id")
    json_argument(show)
    cancel = _verb(inner, "cancel", "end a job for good; what runs stops after its step", "ftjob_abc", _cancel)
    cancel.add_argument("id")
    resume = _verb(inner, "resume", "go on with a paused or failed job, from its newest checkpoint", "ftjob_abc", _resume)
    resume.add_argument("id")
    logs = _verb(inner, "logs", "print what a job's run has said", "ftjob_abc", _logs)
    logs.add_argument("id")


def _verb(verbs: Verbs, name: str, summary: str, example: str, run: Verb) -> argparse.ArgumentParser:
    verb = add_verb(verbs, name, summary, f"ropewalk jobs {name} {example}".rstrip(), run)
    verb.add_argument("--workspace", default="default", metavar="NAME", help="its id or its name (default: %(default)s)")
    store_arguments(verb)
    return verb


def _place(arguments: argparse.Namespace) -> Place:
    from ropewalk.jobs.commands import Place

    return Place(settings_of(arguments), arguments.workspace)


def _list(arguments: argparse.Namespace) -> int:
    from ropewalk.jobs import commands

    return commands.list_jobs(_place(arguments), arguments.limit, arguments.json)


def _show(arguments: argparse.Namespace) -> int:
    from ropewalk.jobs import commands

    return commands.show_job(_place(arguments), arguments.id, arguments.json)


def _cancel(arguments: argparse.Namespace) -> int:
    from ropewalk.jobs import commands

    return commands.cancel_job(_place(arguments), arguments.id)


def _resume(arguments: argparse.Namespace) -> int:
    from ropewalk.jobs import commands

    return commands.resume_job(_place(arguments), arguments.id)


def _logs(arguments: argparse.Namespace) -> int:
    from ropewalk.jobs import commands

    return commands.print_log(_place(arguments), arguments.id)
