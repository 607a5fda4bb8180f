"""The arguments of `compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.verbs import Verb, Verbs, add_verb, json_argument, registry_of, settings_of, store_arguments

if TYPE_CHECKING:
    from ropewalk.compare.commands import Place
    from ropewalk.compare.prices import Unit


def add_verbs(verbs: Verbs) -> None:
    """`compare ...`."""
    compare = add_verb(
        verbs,
        "compare",
        "which of these should be shipped: suites, runs, verdicts, votes, aliases",
        "ropewalk compare run qwen3 house --suite questions.jsonl",
    )
    inner = compare.add_subparsers(metavar="VERB")
    _what(inner)
    _prices(inner)
    _run(inner)
    _after(inner)
    _selftest(inner)


def _what(inner: Verbs) -> None:
    """What is compared, and on what."""
    summary = "make a served model a candidate, or read the text of a review page into cards"
    add = _verb(inner, "add", summary, "house", _add, models=True)
    add.add_argument("name", nargs="+", help="a name that is served, or a file with a page's text")
    add.add_argument("--url", help="where the page's text is from; it is not fetched")
    add.add_argument("--date", metavar="YYYY-MM-DD", help="when it was read there")
    json_argument(add)
    link = _verb(
        inner, "link", "say which candidate a card is about, so that its claims can be tested", "cand_card house", _link
    )
    link.add_argument("card", help="id of the card")
    link.add_argument("candidate", help="id or name of a candidate that runs")
    json_argument(link)
    summary = "make a suite: prompts with checks or references, from JSONL or a stored file"
    suite = _verb(inner, "suite", summary, "questions.jsonl --group document --must-pass safety", _suite)
    suite.add_argument("source", help="a JSONL file, or the id of a stored one, with which the suite will also be deleted")
    suite.add_argument("--name", default="", help="(default: the file's)")
    _suite_arguments(suite)
    json_argument(suite)
    summary = "list comparisons, or suites, candidates, promotions; newest first"
    listed = _verb(inner, "list", summary, "suites", _list)
    kinds = ("comparisons", "suites", "candidates", "promotions")
    listed.add_argument("what", nargs="?", default=kinds[0], choices=kinds, help="(default: %(default)s)")
    listed.add_argument("--limit", type=int, default=100, metavar="N", help="(default: %(default)s)")
    json_argument(listed)


def _prices(inner: Verbs) -> None:
    summary = "say what answers cost, from a day on; without prices, list them"
    price = _verb(inner, "price", summary, "big --input 0.15 --output 0.60 --from 2026-11-01", _price)
    price.add_argument("target", nargs="?", help="a served name; without one, this machine")
    for name, what in (("input", "million tokens"), ("cached", "million tokens read from cache"), ("output", "million tokens")):
        price.add_argument(f"--{name}", type=float, metavar="USD", help=f"per {what}")
    price.add_argument(
        "--hour", type=float, metavar="USD", help="per hour of this machine, which models that it serves are paid by"
    )
    price.add_argument("--from", dest="day", metavar="YYYY-MM-DD", help="(default: today)")
    price.add_argument("--source", default="", metavar="TEXT", help="where the price is from")
    json_argument(price)


def _suite_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--group",
        default="group",
        metavar="KEY",
        help="key of a row that says which prompts hang together (default: %(default)s)",
    )
    verb.add_argument("--must-pass", metavar="TAG", help="prompts with this tag must not fail")
    verb.add_argument(
        "--hold", type=float, default=0.5, metavar="SHARE", help="of the groups that is held back (default: %(default)s)"
    )
    verb.add_argument(
        "--margin",
        type=float,
        default=0.03,
        metavar="SHARE",
        help="a difference as small as this is the same (default: %(default)s)",
    )


def _run(inner: Verbs) -> None:
    """Asking, and the verdict."""
    summary = "ask all candidates everything, check, judge, measure, decide; go on with what was cut off"
    run = _verb(inner, "run", summary, "answers house --suite questions.jsonl", _run_comparison, models=True)
    run.add_argument(
        "name", nargs="+", help="what is served, then its candidates: names or ids; or the id of one comparison to go on with"
    )
    run.add_argument("--suite", metavar="SUITE", help="id of a suite or of a stored file, or a JSONL file")
    _suite_arguments(run)
    run.add_argument(
        "--judge", action="append", default=[], metavar="NAME", help="a model that judges; may be given several times"
    )
    run.add_argument("--stop-early", action="store_true", help="stop as soon as the difference is certain, at a higher bar")
    run.add_argument("--budget", type=float, metavar="USD", help="stop before more than this is spent")
    run.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each prompt (default: %(default)s)")
    run.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of one answer (default: %(default)s)")
    run.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default: %(default)s, greedy)")
    run.add_argument(
        "--chosen-from",
        type=int,
        default=1,
        metavar="N",
        help="checkpoints that were tried, of which the candidate is the best",
    )
    for limit, what in (("cost", "per passing answer"), ("latency", "p95"), ("memory", "peak")):
        run.add_argument(
            f"--{limit}-ratio", type=float, metavar="R", help=f"the most {limit} ({what}) over that of what is served"
        )
    run.add_argument("--title", default="")
    run.add_argument("--category", default="")
    json_argument(run)
    summary = "show the verdict; exit code 0 SHIP, 10 TIE, 20 SKIP, 30 NOT ENOUGH, 40 NO VERDICT, 50 OPINION ONLY"
    show = _verb(inner, "show", summary, "cmp_abc --prompts broke", _show)
    show.add_argument("comparison")
    show.add_argument("--candidate", metavar="NAME", help="the exit code is that of this one (default: of the best)")
    show.add_argument("--prompts", choices=("broke", "fixed"), help="list the prompts that got worse, or better")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--md", action="store_true", help="print Markdown, for a pull request")


def _after(inner: Verbs) -> None:
    """People's part, and what is served."""
    summary = "vote on pairs of answers without knowing whose they are; keys 1 A, 2 B, 3 same, 4 both bad"
    vote = _verb(inner, "vote", summary, "cmp_abc", _vote)
    vote.add_argument("comparison")
    vote.add_argument("--invite", type=int, metavar="N", help="print links for so many people instead; one link is one voter")
    vote.add_argument("--url", help="the server that the links go to (default: http://127.0.0.1:8700)")
    json_argument(vote)
    summary = "move an alias to a candidate: verdict, hashes, loading, replay, then the swap"
    ship = _verb(inner, "ship", summary, "cmp_abc --alias answers", _ship, models=True)
    ship.add_argument("comparison")
    ship.add_argument("candidate", nargs="?", help="name or id; needed where there are several")
    ship.add_argument("--alias", required=True, metavar="NAME")
    ship.add_argument(
        "--override", metavar="WHY", help="ship without the verdict's leave; the reason is kept, and shown in red"
    )
    json_argument(ship)
    back = _verb(inner, "rollback", "move an alias back to what it pointed at before", "answers", _rollback, models=True)
    back.add_argument("alias")
    json_argument(back)
    digest = _verb(inner, "digest", "the weekly mail: what changed, what needs your vote", "--preview", _digest)
    how = digest.add_mutually_exclusive_group(required=True)
    how.add_argument("--preview", action="store_true", help="print it")
    how.add_argument("--send", action="store_true", help="send it to those who asked for it; to nobody twice")
    digest.add_argument("--mail", type=Path, metavar="YAML", help="how mail is sent (default: $ROPEWALK_MAIL)")
    json_argument(digest)


def _selftest(inner: Verbs) -> None:
    summary = "try the rule on candidates whose truth is known; exit code 1 where a stated bound does not hold"
    selftest = add_verb(inner, "selftest", summary, "ropewalk compare selftest --runs 2000 --json selftest.json", _selftested)
    selftest.add_argument("--runs", type=int, default=2000, metavar="N", help="of each (default: %(default)s)")
    selftest.add_argument("--seed", type=int, default=7, metavar="N", help="(default: %(default)s)")
    selftest.add_argument("--json", type=Path, metavar="FILE", help="write the rates there")
    selftest.add_argument(
        "--data",
        type=Path,
        help="folder of the state, where it is kept for the method page (default: $ROPEWALK_HOME, else ~/.ropewalk)",
    )


def _verb(inner: Verbs, name: str, summary: str, example: str, run: Verb, models: bool = False) -> argparse.ArgumentParser:
    verb = add_verb(inner, name, summary, f"ropewalk compare {name} {example}", run)
    verb.add_argument("--workspace", default="default", help="name or id (default: %(default)s)")
    if models:
        verb.add_argument(
            "--models", type=Path, metavar="YAML", help="which models are served, and how (default: all that are published)"
        )
    store_arguments(verb)
    return verb


def _place(arguments: argparse.Namespace) -> Place:
    from ropewalk.compare.commands import Place
    from ropewalk.config.serving import Serving, read_serving

    given: Path | None = getattr(arguments, "models", None)
    return Place(
        settings_of(arguments), registry_of(arguments), read_serving(given) if given else Serving(), arguments.workspace
    )


def _add(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import commands

    return commands.add(_place(arguments), arguments.name, arguments.url, arguments.date, arguments.json)


def _link(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import commands

    return commands.link_card(_place(arguments), arguments.card, arguments.candidate, arguments.json)


def _suite(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import commands

    return commands.suite(_place(arguments), arguments.source, arguments.name, _suite_settings(arguments), arguments.json)


def _suite_settings(arguments: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(arguments, name) for name in ("group", "must_pass", "hold", "margin")}


def _list(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import commands

    return commands.listed(_place(arguments), arguments.what, arguments.limit, arguments.json)


def _price(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import pricing

    units: dict[Unit, float | None] = {
        "input token": arguments.input,
        "cached token": arguments.cached,
        "output token": arguments.output,
        "hour": arguments.hour,
    }
    given = {unit: usd for unit, usd in units.items() if usd is not None}
    return pricing.price(_place(arguments), arguments.target, given, arguments.day, arguments.source, arguments.json)


def _run_comparison(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import commands
    from ropewalk.compare.evidence import Limits
    from ropewalk.compare.records import Plan

    ratios = {f"{name}_ratio": getattr(arguments, f"{name}_ratio") for name in ("cost", "latency", "memory")}
    plan = Plan(
        sampling={"temperature": arguments.temperature, "max_tokens": arguments.max_tokens},
        stop_early=arguments.stop_early,
        budget=arguments.budget,
        limits=Limits(**ratios),
        samples=arguments.samples,
    )
    asked = commands.Asked(
        tuple(arguments.name),
        arguments.suite,
        _suite_settings(arguments),
        plan,
        tuple(arguments.judge),
        arguments.chosen_from,
        arguments.title,
        arguments.category,
    )
    return commands.run(_place(arguments), asked, arguments.json)


def _show(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import commands

    form = "json" if arguments.json else "md" if arguments.md else "text"
    return commands.show(_place(arguments), arguments.comparison, arguments.candidate, arguments.prompts, form)


def _vote(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import voting

    if arguments.invite is not None:
        return voting.invite_voters(_place(arguments), arguments.comparison, arguments.invite, arguments.url, arguments.json)
    return voting.vote(_place(arguments), arguments.comparison)


def _ship(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import commands

    place, alias = _place(arguments), arguments.alias
    return commands.ship_it(place, arguments.comparison, arguments.candidate, alias, arguments.override, arguments.json)


def _rollback(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import commands

    return commands.roll_back(_place(arguments), arguments.alias, arguments.json)


def _digest(arguments: argparse.Namespace) -> int:
    from ropewalk.compare import commands

    return commands.digest(_place(arguments), arguments.send, arguments.mail, arguments.json)


def _selftested(arguments: argparse.Namespace) -> int:
    from ropewalk.compare.selftest import run_selftest

    arguments.data = settings_of(arguments).data.expanduser()
    run_selftest(arguments)
    return 0
