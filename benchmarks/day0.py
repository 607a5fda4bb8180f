"""Every mixture-of-experts architecture of the installed transformers, tiny: our experts and LoRA against its own, whole and in 4 bits.

    python benchmarks/day0.py [--quick] [--json FILE] [--write docs/day0.md]

For each: one tiny model, LoRA on every linear layer and every stack of experts, one expert with all tokens and one with none; loss, input
gradient, router gradient, every LoRA gradient and the gradient of every other weight against the model's eager experts with W + s B A
written out. Passed means a relative error of at most 1e-5 everywhere, in float32, or in float64 where float32's own rounding is larger.
Then the same through a checkpoint: saved in several files, loaded in NF4, LoRA on it against the dequantised weights, and merged.
--quick is the same, since all of it takes about two minutes. Exits 1 if an architecture fails that docs/day0.md does not list.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from ropewalk.models.day0 import TOLERANCE, Compared, compare
from ropewalk.models.day0_four_bits import FILE, LOGITS, Held, hold
from ropewalk.models.tiny import expert_architectures

PAGE = Path(__file__).parent.parent / "docs" / "day0.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same: it takes about two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table as a page of the documentation")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results: dict[str, Compared] = {}
    held: dict[str, Held] = {}
    failed: dict[str, str] = {}
    for name, kind in expert_architectures():
        try:
            results[name] = compare(name, kind)
            with tempfile.TemporaryDirectory() as folder:
                held[name] = hold(name, kind, Path(folder))
        except Exception as error:  # an architecture that cannot be built or run is a result, not the end
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        else:
            if not results[name].passed:
                failed[name] = f"relative error {results[name].error:.1e} at {results[name].where}"
            elif not held[name].passed:
                failed[name] = f"in 4 bits: {held[name].faults}"
        print(line(name, results.get(name), held.get(name), failed.get(name)), flush=True)
    total = len(results.keys() | failed.keys())
    passed = total - len(failed)
    print(f"\n{passed} of {total} pass, {sum(r.merged is not None for r in held.values())} of them merge")
    if given.json:
        rows = {name: asdict(result) for name, result in results.items()}
        found = {
            "passed": passed,
            "total": total,
            "failed": failed,
            "tolerance": TOLERANCE,
            "rows": rows,
            "four_bits": {name: asdict(result) | {"passed": result.passed} for name, result in held.items()},
            "logits_tolerance": LOGITS,
            "versions": versions(),
        }
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    if given.write:
        given.write.write_text(page(results, held, failed, total))
    listed = PAGE.read_text() if PAGE.exists() else ""
    return 1 if any(f"| {name} | fails" not in listed for name in failed) else 0


def line(name: str, result: Compared | None, four: Held | None, reason: str | None) -> str:
    if result is None or four is None or reason:
        return f"{name:<24} FAILS  {reason}"
    merged = "not merged" if four.merged is None else f"merged {four.merged:.1e}"
    return (
        f"{name:<24} passes {result.dtype:<8} {result.error:.1e}  {result.factors:>3} factors  {result.model:<44} "
        f"4 bits: {four.held:>2} held {four.dtype:<8} {four.error:.1e} {merged}"
    )


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}


def page(results: dict[str, Compared], held: dict[str, Held], failed: dict[str, str], total: int) -> str:
    passed = [r for name, r in results.items() if name not in failed]
    single = sum(r.dtype == "float32" for r in passed)
    merged = [r for r in held.values() if r.merged is not None]
    text_of = sum(r.checkpoint != r.model for r in held.values())
    in_single = sum(r.dtype == "float32" for r in held.values())
    rows = []
    for name in sorted(results.keys() | failed.keys()):
        r: Any = results.get(name)
        four: Any = held.get(name)
        if name in failed:
            rows.append(f"| {name} | fails | | | | | | | {failed[name]} |")
            continue
        notes = [
            "text part" if r.text_only else "",
            f"float32 alone: {r.in_float32:.1e}" if r.in_float32 is not None else "",
            f"in 4 bits, float32 alone: {four.in_float32:.1e}" if four.in_float32 is not None else "",
            "4 bits: text part of the whole checkpoint" if four.checkpoint != four.model else "",
            "not merged: two layers are one tensor" if four.unmerged else "",
        ]
        rows.append(
            f"| {name} | passes | {r.dtype} | {r.error:.1e} | {r.factors} | {four.held} | {four.error:.1e} | "
            f"{'no' if four.merged is None else f'{four.merged:.1e}'} | {', '.join(filter(None, notes))} |"
        )
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        [
            "# Every mixture of experts on day 0",
            "",
            f"{len(passed)} of {total} architectures pass ({used}). Made by",
            "`python benchmarks/day0.py --write docs/day0.md`; `tests/models/test_day0.py` runs the first comparison for every one of them,",
            "`tests/models/test_day0_four_bits.py` the second for some.",
            "",
            "The architectures are found by inspection: every model of the installed transformers whose experts go through its",
            "`ExpertsInterface`. Each is built tiny by shrinking its default configuration, with one layer of each kind. LoRA sits on every",
            "linear layer but the output head and the routers, and on every stack of experts. In each expert layer one expert gets every",
            "token and one gets none. Compared with the model's own eager experts and W + s B A written out: the loss and the gradients of",
            "the input embeddings, the routers, all LoRA factors and all other weights. Passed means that the largest relative error of any",
            f"of them is at most {TOLERANCE:g}: in float32 for {single} of them, and for the other {len(passed) - single} in float64, where",
            "float32's own rounding, passing through top-k, norms and recurrences, is larger than that in one of hundreds of tensors.",
            "",
            "## In 4 bits, from a checkpoint and back into one",
            "",
            f"Each tiny model is saved in files of at most {FILE}, as transformers writes that architecture for the hub, with the names and the",
            f"cutting of experts that it has there; of those that also see, all of it is saved ({text_of} of them are loaded as their text part). Its weights",
            "are laid on the grid of NF4 before, so that the model as it was built, the base in 4 bits and the merged checkpoint stand for the same numbers,",
            "and whatever differs is wrong. No width had to be a multiple of the block of 64: a tensor's last block is filled up. Then:",
            "",
            f"- The checkpoint is loaded in NF4 by what `adapter: qlora` uses; its logits are those of the model as it was built, within {LOGITS:g} of",
            "  their norm. All linear layers and stacks of experts of the part that reads text are in 4 bits (the column *in 4 bits* counts them).",
            f"- LoRA as above: the loss and every gradient, those of the input embeddings and all factors among them, are within {TOLERANCE:g} of",
            f"  those over the dequantised weights with W + s B A written out, in float32 for {in_single} of {len(held)} and in float64 for the others.",
            "  Layers that only choose what is attended to (indexers) are in 4 bits and get no gradient, here as there.",
            "- The adapter is saved and merged file by file; the logits of the merged checkpoint are those of base and adapter through PEFT (`ropewalk",
            f"  merge` compares them itself) and those of the adapted base in 4 bits, within {LOGITS:g} of their norm (the column *merged*). Merged once",
            "  more into the checkpoint in bfloat16, every number is the sum rounded once.",
            "",
            f"{len(merged)} of {total} merge. " + _unmerged(held),
            "",
            "What is not in 4 bits, apart from norms, biases and other vectors, and in how many of the architectures:",
            "",
            *_left(held),
            "",
            "| architecture | result | precision | largest error | LoRA tensors | in 4 bits | largest error | merged | notes |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _unmerged(held: dict[str, Held]) -> str:
    return " ".join(f"{name} cannot be: {r.unmerged}." for name, r in held.items() if r.unmerged)


WHY = {
    "embedding": "looked up, not multiplied",
    "output head": "its rounding would go straight into the logits",
    "router": "small, and its rounding would send tokens to other experts",
    "convolution": "a few numbers per channel",
    "bias": "added, not multiplied: experts' biases and positions",
    "out_proj, read by its owner": "a state space mixer's fused kernel takes the weight itself",
}


def _left(held: dict[str, Held]) -> list[str]:
    counts = Counter(kind for r in held.values() for kind in r.left)
    named = [f"- {kind} ({counts[kind]}): {why}" for kind, why in WHY.items() if counts[kind]]
    others = {name: sorted(set(r.left) - set(WHY)) for name, r in held.items()}
    told = "; ".join(f"{name}: {', '.join(f'`{kind}`' for kind in kinds)}" for name, kinds in others.items() if kinds)
    return [*named, f"- what is neither a plain linear layer nor a stack of routed experts: {told}"]


if __name__ == "__main__":
    raise SystemExit(main())
