"""Every mixture-of-experts architecture of the installed transformers, tiny: our experts and LoRA against its own, gradient by gradient.

    python benchmarks/day0.py [--quick] [--json FILE] [--write docs/day0.md]

For each: one tiny model, LoRA on every linear layer and every stack of experts, one expert with all tokens and one with none; loss, input
gradient, router gradient, every LoRA gradient and the gradient of every other weight against the model's eager experts with W + s B A
written out. Passed means a relative error of at most 1e-5 everywhere, in float32, or in float64 where float32's own rounding is larger.
--quick is the same, since all of it takes about a minute. Exits 1 if an architecture fails that docs/day0.md does not list.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from ropewalk.models.day0 import TOLERANCE, Compared, compare
from ropewalk.models.tiny import expert_architectures

PAGE = Path(__file__).parent.parent / "docs" / "day0.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same: it takes about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table as a page of the documentation")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results: dict[str, Compared] = {}
    failed: dict[str, str] = {}
    for name, kind in expert_architectures():
        try:
            results[name] = compare(name, kind)
        except Exception as error:  # an architecture that cannot be built or run is a result, not the end
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        else:
            if not results[name].passed:
                failed[name] = f"relative error {results[name].error:.1e} at {results[name].where}"
        print(line(name, results.get(name), failed.get(name)), flush=True)
    total, passed = len(results.keys() | failed.keys()), sum(r.passed for r in results.values())
    print(f"\n{passed} of {total} pass")
    if given.json:
        rows = {name: asdict(result) for name, result in results.items()}
        found = {
            "passed": passed,
            "total": total,
            "failed": failed,
            "tolerance": TOLERANCE,
            "rows": rows,
            "versions": versions(),
        }
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    if given.write:
        given.write.write_text(page(results, failed, total))
    listed = PAGE.read_text() if PAGE.exists() else ""
    return 1 if any(f"| {name} | fails" not in listed for name in failed) else 0


def line(name: str, result: Compared | None, reason: str | None) -> str:
    if result is None or reason:
        return f"{name:<24} FAILS  {reason}"
    return f"{name:<24} passes {result.dtype:<8} {result.error:.1e}  {result.factors:>3} factors  {result.model}"


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}


def page(results: dict[str, Compared], failed: dict[str, str], total: int) -> str:
    passed = [r for r in results.values() if r.passed]
    single = sum(r.dtype == "float32" for r in passed)
    rows = []
    for name in sorted(results.keys() | failed.keys()):
        r: Any = results.get(name)
        if name in failed:
            rows.append(f"| {name} | fails | | | | {failed[name]} |")
            continue
        part = "text part" if r.text_only else ""
        note = f"float32 alone: {r.in_float32:.1e}" if r.in_float32 is not None else ""
        rows.append(f"| {name} | passes | {r.dtype} | {r.error:.1e} | {r.factors} | {', '.join(filter(None, (part, note)))} |")
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        [
            "# Every mixture of experts on day 0",
            "",
            f"{len(passed)} of {total} architectures pass ({used}). Made by",
            "`python benchmarks/day0.py --write docs/day0.md`; `tests/models/test_day0.py` runs the same comparison.",
            "",
            "The architectures are found by inspection: every model of the installed transformers whose experts go through its",
            "`ExpertsInterface`. Each is built tiny by shrinking its default configuration, with one layer of each kind. LoRA sits on every",
            "linear layer but the output head and the routers, and on every stack of experts. In each expert layer one expert gets every",
            "token and one gets none. Compared with the model's own eager experts and W + s B A written out: the loss and the gradients of",
            "the input embeddings, the routers, all LoRA factors and all other weights. Passed means that the largest relative error of any",
            f"of them is at most {TOLERANCE:g}: in float32 for {single} of them, and for the other {len(passed) - single} in float64, where",
            "float32's own rounding, passing through top-k, norms and recurrences, is larger than that in one of hundreds of tensors.",
            "",
            "| architecture | result | precision | largest error | LoRA tensors | notes |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
