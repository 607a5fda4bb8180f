"""The file that benchmarks/gpu.sh fills: RESULTS/DEVICE/DATE.json, part by part.

python benchmarks/gpu_results.py begin --device cuda --results FOLDER     prints the file's name; fails without the device
python benchmarks/gpu_results.py add FILE PART --status 0 [--seconds N] [--found JSON]
python benchmarks/gpu_results.py show FILE                                prints what was found, and writes it beside the file
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import machine, table, write_json


def begin(device: str, results: Path, *, dry_run: bool) -> int:
    """The file of this device and day, made if it is not there."""
    name = "dry-run"
    if not dry_run:
        import torch

        if not torch.cuda.is_available():
            print("no GPU: nothing measured", file=sys.stderr)
            return 1
        name = torch.cuda.get_device_name()
    file = results / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") / time.strftime("%Y-%m-%d.json", time.gmtime())
    if not file.exists():
        known = {"device": device, "name": name, "commit": commit(), "machine": machine("triton"), "parts": {}}
        write_json(file, known)
    print(file)
    return 0


def add(file: Path, part: str, status: str, seconds: int, found: Path | None) -> None:
    """One part's outcome; what an earlier try of it left is replaced."""
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    entry: dict[str, Any] = {"status": status, "seconds": seconds, "commit": commit()}
    if found is not None and found.exists():
        entry["found"] = json.loads(found.read_text(encoding="utf-8"))
    known["parts"][part] = entry
    write_json(file, known)


def show(file: Path) -> None:
    """A table of the parts, and one of what each is measured for."""
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    parts = known["parts"]
    lines = [f"# {known['name']}, {file.stem}, {known['commit']}", ""]
    outcome = {"0": "passed", "124": "cut off"}
    lines += [
        table(["part", "outcome", "s"], [[n, outcome.get(p["status"], p["status"]), p["seconds"]] for n, p in parts.items()])
    ]
    figures = [[name, *figure] for name, part in parts.items() for figure in figures_of(part.get("found") or {})]
    if figures:
        lines += ["", table(["part", "", "", "value"], figures)]
    text = "\n".join(lines) + "\n"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def figures_of(found: dict[str, Any]) -> list[list[Any]]:
    """What a part says in few numbers: of what, which, how much."""
    figures: list[list[Any]] = [
        [name, "times as fast as the fastest peer", ratio] for name, ratio in found.get("best_peer_ratio", {}).items()
    ]
    for name, entry in found.get("ratios", {}).items():
        figures += [[name, f"times as fast as {peer}", times] for peer, times in entry["times_faster"].items()]
    for row in found.get("rows", []):
        if isinstance(row, dict) and row.get("contender") == "ours" and row.get("ms"):
            what = f"{row['shape']}, {row.get('layers') or 'one layer'}, {row['dtype']} {row['stored']}, T={row['tokens']}, {row['policy']}"
            figures += [[what, name, row[name]] for name in ("ms", "held_mb", "share_of_ceiling") if row.get(name) is not None]
    for shape, row in found.get("shapes", {}).items():
        figures += [
            [shape, n, row[n]] for n in ("fits", "tokens_per_s", "estimate_mb", "peak_mb") if isinstance(row, dict) and n in row
        ]
    if "failed" in found:
        figures.append(["checks that failed", "", len(found["failed"])])
    return figures


def commit() -> str:
    """Of what is measured; changes that are not committed are said."""
    if given := os.environ.get("COMMIT"):
        return given
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} and changes" if changed.stdout.strip() else head


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("begin")
    first.add_argument("--device", required=True)
    first.add_argument("--results", type=Path, required=True)
    first.add_argument("--dry-run", action="store_true")
    more = verbs.add_parser("add")
    more.add_argument("file", type=Path)
    more.add_argument("part")
    more.add_argument("--status", required=True)
    more.add_argument("--seconds", type=int, default=0)
    more.add_argument("--found", type=Path)
    last = verbs.add_parser("show")
    last.add_argument("file", type=Path)
    given = parser.parse_args()
    if given.verb == "show":
        show(given.file)
        return 0
    if given.verb == "begin":
        return begin(given.device, given.results, dry_run=given.dry_run)
    add(given.file, given.part, given.status, given.seconds, given.found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
