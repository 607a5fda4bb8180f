"""The arguments of `check`, `train` and `rewards`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.verbs import BY_ENVIRONMENT, Verbs, add_verb, json_argument

if TYPE_CHECKING:
    from ropewalk.config.run import Run


def add_verbs(verbs: Verbs) -> None:
    """`check`, `train` and `rewards check`."""
    check = add_verb(
        verbs,
        "check",
        "validate a configuration and show what will be trained, without loading weights",
        "ropewalk check examples/sft-tiny.yml",
        _check,
    )
    _config_argument(check)
    check.add_argument("--offline", action="store_true", help="fetch nothing; what is not on disk is named as not checked")
    json_argument(check)
    train = add_verb(
        verbs,
        "train",
        "train; goes on by itself with an unfinished run in the output folder",
        "ropewalk train examples/sft-tiny.yml learning_rate=1e-4",
        _train,
    )
    _config_argument(train)
    train.add_argument("--restart", action="store_true", help="move a run that the output folder holds aside and begin anew")
    train.add_argument("--processes", type=int, default=1, metavar="N", help="train with N processes on this machine")
    train.add_argument(
        "--sweep", type=Path, metavar="FILE", help="train every combination of the values that a YAML file lists"
    )
    train.add_argument("--trust-remote-code", action="store_true", help="let Python code that comes with the base run")
    train.add_argument("--granted", action="store_true", help="for the server: files are those that the standard input gives")
    rewards = add_verb(verbs, "rewards", "try the rewards of a configuration", "ropewalk rewards check grpo.yml")
    tried = add_verb(
        rewards.add_subparsers(metavar="VERB"),
        "check",
        "sample completions of real rows and show what every reward says of them, before anything is trained",
        "ropewalk rewards check grpo.yml --completions completions.jsonl",
        _check_rewards,
    )
    _config_argument(tried)
    tried.add_argument(
        "--prompts", type=int, default=16, metavar="N", help="sample completions of N rows (default: %(default)s)"
    )
    tried.add_argument(
        "--completions", type=Path, metavar="FILE", help="take them from a JSONL file: rows with a column `completions` each"
    )
    json_argument(tried)


def _config_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=Path, metavar="CONFIG", help=f"a YAML file with Axolotl's keys; {BY_ENVIRONMENT}")
    verb.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values laid over the file's, such as learning_rate=1e-4"
    )


def _check(arguments: argparse.Namespace) -> int:
    from ropewalk.train.plan import check_command

    return check_command(arguments.config, arguments.overrides, offline=arguments.offline, as_json=arguments.json)


def _check_rewards(arguments: argparse.Namespace) -> int:
    from ropewalk.train.reward_check import check_command

    return check_command(
        arguments.config, arguments.overrides, arguments.completions, max(1, arguments.prompts), arguments.json
    )


def _train(arguments: argparse.Namespace) -> int:
    if arguments.sweep is not None:
        from ropewalk.train.sweep import sweep

        options = [
            *(["--processes", str(arguments.processes)] if arguments.processes > 1 else []),
            *["--restart"] * arguments.restart,
        ]
        options += ["--trust-remote-code"] * arguments.trust_remote_code
        return sweep(arguments.config, arguments.overrides, arguments.sweep, options)
    from ropewalk.config.run import load_run
    from ropewalk.train.prepare import prepare

    granted = b""
    if arguments.granted:
        from ropewalk.files.granted import accept

        granted = accept(sys.stdin.buffer)
    run = load_run(arguments.config, arguments.overrides)
    trusted = arguments.trust_remote_code
    if run.use_ray and "WORLD_SIZE" not in os.environ:
        return _train_on_ray(arguments, run, granted)
    prepared = prepare(run, restart=arguments.restart, trust_remote_code=trusted)
    if arguments.processes > 1 and "WORLD_SIZE" not in os.environ and not prepared.folder.finished:
        prepared.folder.close()
        from ropewalk.train.launch import launch

        return launch(arguments.processes, [str(arguments.config), *arguments.overrides, *["--trust-remote-code"] * trusted])
    from ropewalk.train.trainer import fit

    fit(prepared, opens=getattr(arguments, "opens", None))
    return 0


def _train_on_ray(arguments: argparse.Namespace, run: Run, granted: bytes) -> int:
    from ropewalk.errors import BadInput
    from ropewalk.jobs.cluster import train_on_ray
    from ropewalk.jobs.launch import job_launch, shared_launch

    if granted:
        return train_on_ray(job_launch(arguments.config, granted))
    if arguments.restart or arguments.processes > 1:
        raise BadInput("use_ray: --restart and --processes are of this machine; set another output_dir, or ray_num_workers")
    more = ["--trust-remote-code"] * arguments.trust_remote_code
    return train_on_ray(shared_launch(run, arguments.config, arguments.overrides, more))
