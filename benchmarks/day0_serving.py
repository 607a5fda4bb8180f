"""Every language model of the installed transformers, tiny: the engine's answers beside those of its own generate(), in float32.

    python benchmarks/day0_serving.py [--quick] [--json FILE] [--write docs/day0-serving.md]

For each: three requests that come and go, prompts in chunks beside others' single ids, greedy; the same ids and log-probabilities within
1e-5, and a segment read before equal bit for bit to one read now. A model that the engine cannot read right is refused when it is loaded,
with a sentence that says why. --quick is the same, since all of it takes about two minutes. Exits 1 if one is served otherwise than by
generate(), or if the engine ends in another way than these.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from ropewalk.engine.cache import ELSEWHERE
from ropewalk.engine.day0 import TOLERANCE, Served, architectures, build, generated, serve
from ropewalk.errors import ModelError

SECONDS = 30  # for one tiny model: one that takes longer is none
Outcome = Literal["served", "refused", "differs", "not built"]


@dataclass(frozen=True)
class Row:
    """What became of one architecture."""

    outcome: Outcome
    reason: str = ""
    served: Served | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same: it takes about two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table as a page of the documentation")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows: dict[str, Row] = {}
    for name, kind in architectures():
        rows[name] = tried(name, kind)
        print(line(name, rows[name]), flush=True)
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts(rows).items()))
    if given.json:
        found = {"counts": counts(rows), "tolerance": TOLERANCE, "rows": {n: asdict(r) for n, r in rows.items()}}
        given.json.write_text(json.dumps(found | {"versions": versions()}, indent=2) + "\n")
    if given.write:
        given.write.write_text(page(rows))
    return 1 if counts(rows)["differs"] else 0


def tried(name: str, kind: Any) -> Row:
    try:
        with at_most(SECONDS):
            generated(build(kind), [70, 71, 72], 2)
    except Exception as error:  # its own generate() fails, or its default configuration cannot be made smaller
        return Row("not built", f"{type(error).__name__}: {first(error)}")
    try:
        with at_most(SECONDS):
            served = serve(name, kind)
    except ModelError as error:
        return Row("refused", str(error).removesuffix(f"; {ELSEWHERE}"))
    except TimeoutError as error:  # its default configuration cannot be made small
        return Row("not built", str(error))
    except Exception as error:  # the engine may refuse, and end in no other way
        return Row("differs", f"{type(error).__name__}: {first(error)}")
    if served.passed:
        return Row("served", served=served)
    return Row("differs", f"log-probabilities by {served.error:.1e}, warm as cold: {served.warm_as_cold}", served)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]


def counts(rows: dict[str, Row]) -> dict[str, int]:
    outcomes: tuple[Outcome, ...] = ("served", "refused", "differs", "not built")
    return {outcome: sum(row.outcome == outcome for row in rows.values()) for outcome in outcomes}


def line(name: str, row: Row) -> str:
    about = f"{row.served.error:.1e}  {', '.join(row.served.layers)}" if row.served else row.reason
    return f"{name:<26} {row.outcome:<9} {about}"


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}


def page(rows: dict[str, Row]) -> str:
    count = counts(rows)
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    served = [(n, r.served) for n, r in sorted(rows.items()) if r.served and r.outcome == "served"]
    others = [(n, r) for n, r in sorted(rows.items()) if r.outcome != "served"]
    return "\n".join(
        [
            "# Every language model served on day 0",
            "",
            f"Of {len(rows)} architectures {count['served']} are served as by their own `generate()`, {count['refused']} are refused with a",
            f"reason when they are loaded, {count['differs']} differ, and of {count['not built']} no tiny model could be made to compare with",
            f"({used}). Made by `python benchmarks/day0_serving.py --write docs/day0-serving.md`;",
            "`tests/engine/test_day0.py` and `tests/engine/test_runner.py` run the same comparison for a few of every kind.",
            "",
            "The architectures are all causal language models of the installed transformers and its mixtures of experts that are something",
            "else besides. Each is built tiny by shrinking its default configuration. Three requests come and go, their prompts read in",
            "chunks beside each other's single ids. Served means: the same greedy ids as `generate()` in float32, log-probabilities within",
            f"{TOLERANCE:g}, and a segment read before equal bit for bit to one read now.",
            "",
            "| architecture | layers keep | largest difference of a log-probability |",
            "|---|---|---|",
            *(f"| {name} | {', '.join(found.layers)} | {found.error:.1e} |" for name, found in served),
            "",
            "| not served | | why |",
            "|---|---|---|",
            *(f"| {name} | {row.outcome} | {row.reason.replace('|', '/')} |" for name, row in others),
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
