"""The arguments of `doctor`."""

from __future__ import annotations

import argparse

from ropewalk.verbs import Verbs, add_verb, json_argument, settings_of, store_arguments


def add_verbs(verbs: Verbs) -> None:
    """`doctor`."""
    summary = "what is installed, what is missing, which device will be used, and whether a small training and a reply work"
    verb = add_verb(verbs, "doctor", summary, "ropewalk doctor --need gpu data", _doctor)
    store_arguments(verb)
    needs = ("gpu", "data", "postgres", "buckets", "cluster", "wandb", "tensorboard", "mlflow", "otel")
    verb.add_argument(
        "--need",
        nargs="+",
        default=[],
        choices=needs,
        metavar="WHAT",
        help=f"must be there: a GPU, or an extra ({', '.join(needs)})",
    )
    verb.add_argument("--no-self-test", action="store_true", help="only look; train, ask and store nothing")
    json_argument(verb)


def _doctor(arguments: argparse.Namespace) -> int:
    from ropewalk.doctor.run import doctor

    settings = settings_of(arguments)
    needed = set(arguments.need)
    needed |= {"postgres"} if (settings.database_url or "").startswith("postgresql") else set()
    needed |= {"buckets"} if "://" in (settings.blobs or "") else set()
    return doctor(settings, needed, test=not arguments.no_self_test, as_json=arguments.json)
