"""What becomes of Axolotl's own example configurations here: `ropewalk check --offline` over every one of them.

    git clone https://github.com/axolotl-ai-cloud/axolotl && python benchmarks/axolotl_configs.py axolotl/examples --write-docs

Accepted means that every key given has its effect or is listed in the plan as not needed. Everything else must be answered with a
reason; anything that is not one of our own errors counts as unanswered and fails the script.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ropewalk.config.run import load_run
from ropewalk.errors import RopewalkError
from ropewalk.train.plan import check

PAGE = Path(__file__).resolve().parent.parent / "docs" / "axolotl.md"
# The first of these that a configuration switches on says what kind of training it asks for.
KINDS = {
    "preference or reinforcement": ("rl",),
    "reward model": ("reward_model", "process_reward_model"),
    "images or audio": ("processor_type",),
    "diffusion": ("diffusion",),
}
TEXT = "SFT, text"
COMPRESSION = ("qat", "llmcompressor", "use_onebitllms")


@dataclass(frozen=True)
class Row:
    """One configuration and what became of it."""

    file: str
    kind: str
    outcome: str  # accepted | misspelt | refused | unanswered
    reason: str
    ignored: int = 0


def main() -> int:
    arguments = _arguments()
    folder = arguments.folder
    files = list(_examples(folder))[:: 8 if arguments.quick else 1]
    if not files:
        sys.exit(f"{folder}: no YAML files; name the folder `examples` of a checkout of Axolotl")
    rows = [_row(file, folder) for file in files]
    summary = _summary(rows)
    print(_table(summary))
    for row in rows:
        if row.outcome != "accepted":
            print(f"  {row.outcome:<10} {row.file}: {row.reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**summary, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if arguments.write_docs:
        PAGE.write_text(_page(rows, summary, arguments.of), encoding="utf-8")
    return 0 if summary["answered"] == summary["total"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder `examples` of a checkout of Axolotl")
    parser.add_argument("--quick", action="store_true", help="every eighth configuration")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome as JSON")
    parser.add_argument("--write-docs", action="store_true", help="write docs/axolotl.md")
    parser.add_argument("--of", default="a checkout", metavar="TEXT", help="which version of Axolotl it is, for the page")
    return parser.parse_args()


def _examples(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".yml", ".yaml") and "archived" not in path.relative_to(folder).parts:
            yield path


def _row(path: Path, folder: Path) -> Row:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    name, kind = str(path.relative_to(folder)), _kind(values)
    try:
        plan = check(load_run(path), offline=True)
    except RopewalkError as error:
        reason = str(error).removeprefix(f"{path}:").lstrip()
        only_names = all("unknown key" in part for part in reason.split("; line "))
        return Row(name, kind, "misspelt" if only_names else "refused", " ".join(reason.split()))
    except Exception as error:  # any other error is our own fault: it is counted and fails the script
        return Row(name, kind, "unanswered", f"{type(error).__name__}: {error}")
    return Row(name, kind, "accepted", "", len(plan.ignored))


def _kind(values: dict[str, Any]) -> str:
    if "base_model" not in values:
        return "no training"
    named = next((kind for kind, keys in KINDS.items() if any(values.get(key) for key in keys)), None)
    if named:
        return named
    return "compression while training" if any(values.get(key) for key in COMPRESSION) else TEXT


def _summary(rows: list[Row]) -> dict[str, Any]:
    kinds = {}
    for kind in sorted({row.kind for row in rows}):
        counts = Counter(row.outcome for row in rows if row.kind == kind)
        kinds[kind] = {
            "total": counts.total(),
            **{name: counts[name] for name in ("accepted", "misspelt", "refused", "unanswered")},
        }
    accepted = sum(row.outcome == "accepted" for row in rows)
    text = kinds.get(TEXT, {"accepted": 0, "misspelt": 0, "total": 0})
    sound = text["total"] - text["misspelt"]
    return {
        "accepted": accepted,
        "answered": sum(row.outcome != "unanswered" for row in rows),
        "total": len(rows),
        "accepted_share": round(accepted / len(rows), 4),
        "text_accepted_share": round(text["accepted"] / max(1, text["total"]), 4),
        "text_accepted_share_without_misspelt": round(text["accepted"] / max(1, sound), 4),
        "kinds": kinds,
    }


def _table(summary: dict[str, Any]) -> str:
    lines = ["| kind of training | configurations | accepted | misspelt | refused |", "|---|---:|---:|---:|---:|"]
    for kind, n in summary["kinds"].items():
        lines.append(f"| {kind} | {n['total']} | {n['accepted']} | {n['misspelt']} | {n['refused']} |")
    total = {name: sum(n[name] for n in summary["kinds"].values()) for name in ("total", "accepted", "misspelt", "refused")}
    lines.append(f"| all | {total['total']} | {total['accepted']} | {total['misspelt']} | {total['refused']} |")
    return "\n".join(lines)


def _page(rows: list[Row], summary: dict[str, Any], version: str) -> str:
    share, text, sound = (
        f"{100 * summary[name]:.1f} %"
        for name in ("accepted_share", "text_accepted_share", "text_accepted_share_without_misspelt")
    )
    others = [f"| {row.file} | {row.kind} | {row.reason.replace('|', ' ')} |" for row in rows if row.outcome != "accepted"]
    return "\n".join(
        [
            "# Axolotl's configurations here",
            "",
            "A configuration for Axolotl runs as it is: the keys of [config.md](config.md) mean the same. Of Axolotl's other keys, "
            "those that do not change the result are listed in the plan as not needed; those that would are refused with a way out; "
            "a key that nobody knows is an error with its line and the nearest name.",
            "",
            f"`ropewalk check --offline` over every example that is not archived, of {version}:",
            "",
            _table(summary),
            "",
            f"Accepted: {share} of all, {text} of the SFT ones on text, {sound} of those without a misspelt key of their own. "
            f"Answered, accepted or with a reason: {summary['answered']} of {summary['total']}.",
            "",
            "Accepted means what can be known without the base and the data, which are not fetched: every key has its effect or is "
            "listed. Configurations that shard a model over devices, by FSDP, DeepSpeed or expert parallelism, are sharded by FSDP2; those "
            "that split rows or layers are refused with another way ([several processes](scale.md)).",
            "",
            "Made by `python benchmarks/axolotl_configs.py axolotl/examples --write-docs`.",
            "",
            "## Not accepted",
            "",
            "The number before a reason is its line.",
            "",
            "| configuration | kind | reason |",
            "|---|---|---|",
            *others,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
