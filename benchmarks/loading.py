"""The host's memory while a base is quantised as it loads: beside what it takes then, and the largest file that it came from.

    python benchmarks/loading.py [--quick] [--json FILE]

A Qwen3 mixture of 48 layers with random weights in bfloat16, experts one by one in files of 50 MB as on the hub, is loaded in each format by
a process of its own; in NF4, other mixtures of about its sizes too, whose checkpoints keep their experts otherwise. `peak_mb` is the most
anonymous memory above what the process had before (pages of the files themselves, which the system may drop at any time, are `mapped_mb`);
`held_mb` the weights as they are held. Exits 1 where the peak is above 1.3 times what is held and one file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from measure import machine, table, write_json

FORMATS = ("nf4", "int4", "int8")
ABOVE = 1.3
FILE = "50MB"
LAYOUTS = {  # architecture -> how its checkpoint keeps its experts
    "deepseek_v3": "one by one",
    "gpt_oss": "in stacks, transposed",
    "qwen3_5_moe": "in stacks",
    "inkling2": "in stacks, interleaved",
}
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
}


def make(folder: Path, layers: int) -> None:
    """The checkpoint."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, num_hidden_layers=layers)
    logging.disable_progress_bar()
    Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=FILE)


def make_as(folder: Path, layers: int, architecture: str) -> None:
    """A checkpoint of another architecture, of about the same sizes."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ropewalk.models.tiny import tiny_config

    torch.manual_seed(0)
    logging.disable_progress_bar()
    config = tiny_config(architecture).get_text_config()
    tiny = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == tiny and name.endswith("types"):
            setattr(config, name, [value[-1]] * layers)
    config.num_hidden_layers = layers
    config.vocab_size, config.hidden_size = SIZES["vocab_size"], SIZES["hidden_size"]
    inner = "moe_intermediate_size" if getattr(config, "moe_intermediate_size", None) else "intermediate_size"
    setattr(config, inner, SIZES["moe_intermediate_size"])
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        if getattr(config, name, None):
            setattr(config, name, SIZES["num_experts"])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=FILE)


def measured(folder: Path, kind: str) -> dict[str, Any]:
    """What a process that loads the folder in a format tells, beside what it may take."""
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    command = [sys.executable, __file__, "--child", str(folder), kind]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(told.splitlines()[-1])
    allowed = ABOVE * found["held"] + max(files)
    return {
        "held_mb": found["held"] / 1e6,
        "peak_mb": found["peak"] / 1e6,
        "allowed_mb": allowed / 1e6,
        "mapped_mb": found["mapped"] / 1e6,
        "cpu_s": found["cpu_s"],
        "passed": found["peak"] <= allowed,
    }


def resident() -> dict[str, int]:
    """Bytes of this process's resident memory, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}


def child(folder: Path, kind: str) -> None:
    """Loads the base and prints what that took."""
    import torch

    from ropewalk.models.load import load_base

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before, most, ended = resident(), dict.fromkeys(("RssAnon", "RssFile"), 0), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            now = resident()
            for name in most:
                most[name] = max(most[name], now[name])
            time.sleep(0.002)

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.process_time()
    model = load_base(folder, dtype="bfloat16", device="cpu", quantize=kind)
    spent = time.process_time() - began
    ended.set()
    watching.join()
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    peak, mapped = (most[name] - before[name] for name in ("RssAnon", "RssFile"))
    print(json.dumps({"peak": peak, "mapped": mapped, "held": sum(tensors.values()), "cpu_s": spent}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 layers instead of 48")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1])
        return 0
    depth = 16 if arguments.quick else 48
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), depth)
        files = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
        rows = [{"format": kind} | measured(Path(folder), kind) for kind in FORMATS]
    print(f"{sum(files) / 1e6:.0f} MB in {len(files)} files, the largest of {max(files) / 1e6:.0f} MB")
    heads = ["held MB", "peak MB", "allowed MB", "mapped MB", "CPU s", "holds"]
    print(table(["format", *heads], [list(r.values()) for r in rows]))
    layouts = []
    for architecture, kept in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            make_as(Path(folder), max(depth, 24), architecture)
            layouts.append({"architecture": architecture, "experts": kept} | measured(Path(folder), "nf4"))
    print(table(["architecture", "its experts", *heads], [list(r.values()) for r in layouts]))
    write_json(
        arguments.json,
        {
            "benchmark": "loading",
            "quick": arguments.quick,
            "machine": machine(),
            "checkpoint_mb": sum(files) / 1e6,
            "rows": rows,
            "layouts": layouts,
        },
    )
    return int(not all(row["passed"] for row in (*rows, *layouts)))


if __name__ == "__main__":
    sys.exit(main())
