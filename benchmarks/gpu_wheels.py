"""The wheels that a GPU machine without a network lacks, in one folder that travels with the repository.

    python benchmarks/gpu_wheels.py FOLDER [--python 3.12] [--most-mb 60]      then there: WHEELS=FOLDER benchmarks/gpu.sh

What pyproject.toml asks for, at the versions of constraints.txt, and what that asks for; and the peers, by themselves. Left out are torch and
what comes with it on such a machine (PRESENT). Wheels are of the given Python on x86-64 Linux, whatever this runs on. Exits 1 where they are
too large together, or one cannot be had.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRESENT = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "scipy",
    "peft",
    "pillow",
    "lxml",
)
PEERS = ("peft", "liger-kernel", "axolotl", "unsloth-zoo")  # for their kernels alone: what they ask for is not needed
GLIBC = ("2_28", "2_27", "2_24", "2_17")  # pip takes each by name
MB = 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the machine (default: %(default)s)")
    parser.add_argument("--most-mb", type=float, default=60.0, help="together (default: %(default)s)")
    parser.add_argument("--without-peers", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    asked = needed((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    download(asked, given.folder, given.python, "--constraint", str(ROOT / "constraints.txt"))
    if not given.without_peers:
        download(PEERS, given.folder, given.python, "--no-deps")
    for wheel in given.folder.glob("*.whl"):
        if name_of(wheel.name.partition("-")[0]) in set(PRESENT) - set(PEERS):
            wheel.unlink()  # somebody asked for it, and the machine has it
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(given.folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / MB:6.2f} MB  {name}")
    total = sum(sizes.values()) / MB
    print(f"{total:6.2f} MB  {len(sizes)} wheels")
    if total > given.most_mb:
        print(f"more than {given.most_mb:g} MB: too large to travel", file=sys.stderr)
    return int(total > given.most_mb)


def needed(project: str) -> list[str]:
    """The requirements of the project but those of a machine that has torch."""
    asked = tomllib.loads(project)["project"]["dependencies"]
    return [one for one in asked if name_of(re.split(r"[\[<>=~!; ]", one)[0]) not in PRESENT]


def name_of(text: str) -> str:
    """As registries write it."""
    return re.sub(r"[-_.]+", "-", text).lower()


def download(asked: Sequence[str], folder: Path, python: str, *how: str) -> None:
    platforms = [word for version in GLIBC for word in ("--platform", f"manylinux_{version}_x86_64")]
    platforms += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", *platforms, "--dest", str(folder), *how, *asked]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
