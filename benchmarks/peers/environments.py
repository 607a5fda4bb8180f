"""The environments of the peers: one virtual environment each, made on demand below benchmarks/.peers.

None is shared between peers. One that `borrows` sees the packages of the environment that this runs in, behind its own: it is installed
in seconds, and runs on the same torch and transformers as ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".peers"
TORCH = "torch==2.13.0"  # the same for everybody
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class NotInstalled(Exception):
    """Why a peer cannot take part; told in the table, never dropped."""


@dataclass(frozen=True)
class Environment:
    """What to install, how to see that it works, and which packages' versions to report."""

    name: str
    requirements: tuple[str, ...]
    probe: tuple[str, ...]  # a command of the environment that must end with 0
    versions: tuple[str, ...]
    # Packages that pull in builds for another torch and that text training does not need, but that break on import.
    without: tuple[str, ...] = ()
    libraries_off: tuple[str, ...] = ()  # the same where the package must stay: only its compiled part is moved away
    torch: bool = True
    borrows: bool = False
    python: tuple[int, int] = (3, 11)  # the oldest it runs on

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    @property
    def variables(self) -> dict[str, str]:
        """What a shell would have after `activate`: peers look for their own programs on PATH."""
        return {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(self.folder)}

    def ensure(self, *, install: bool) -> dict[str, str]:
        """The versions of what is there; installs what is missing, or raises NotInstalled with the reason."""
        stamp = self.folder / "ready.json"
        key = json.dumps([TORCH if self.torch else "", self.requirements, self.without, self.libraries_off])
        if stamp.exists() and (found := json.loads(stamp.read_text()))["key"] == key:
            versions: dict[str, str] = (
                self._versions() if self.borrows else found["versions"]
            )  # what is borrowed may have changed
            return versions
        if not install:
            raise NotInstalled("not installed (a run without --quick installs it)")
        self._install()
        versions = self._versions()
        stamp.write_text(json.dumps({"key": key, "versions": versions}))
        return versions

    def _install(self) -> None:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / ".gitignore").write_text("*\n")
        log = FOLDER / f"{self.name}.install.log"
        if not (self.folder / "bin" / "python").exists():
            self._do([self._interpreter(), "-m", "venv", str(self.folder)], log)
        if self.borrows:
            (site,) = self.folder.glob("lib/python*/site-packages")
            seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
            (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in seen))
        pip = [self.program("python"), "-m", "pip", "--disable-pip-version-check"]
        # Older pips resolve the largest of these by downloading many versions.
        self._do([*pip, "install", "--upgrade", "pip"], log)
        self._do([*pip, "install", *[TORCH] * self.torch, *self.requirements], log)
        if self.without:
            self._do([*pip, "uninstall", "--yes", *self.without], log)
        for name in self.libraries_off:
            for path in self.folder.glob(f"lib/python*/site-packages/{name}/lib"):
                shutil.move(path, path.with_name("lib.off"))
        self._do(list(self.probe), log, more=self.variables | OFFLINE)

    def _interpreter(self) -> str:
        """A Python that is new enough: ours, one on PATH, or one that pyenv keeps."""
        code = f"import sys, venv, ensurepip; sys.exit(sys.version_info < {self.python})"
        kept = sorted(str(path) for path in Path.home().glob(".pyenv/versions/3.*/bin/python"))
        for candidate in (sys.executable, "python3.12", "python3.13", *kept):
            program = shutil.which(candidate)
            if program and not subprocess.run([program, "-c", code], capture_output=True, check=False).returncode:
                return program
        raise NotInstalled(f"needs Python {self.python[0]}.{self.python[1]} or newer, and none was found")

    def _do(self, command: Sequence[str], log: Path, more: dict[str, str] | None = None) -> None:
        with log.open("ab") as file:
            file.write((" ".join(command) + "\n").encode())
            file.flush()
            program = shutil.which(command[0], path=(more or os.environ)["PATH"]) or command[0]
            code = subprocess.run(
                [program, *command[1:]], stdout=file, stderr=subprocess.STDOUT, env=os.environ | (more or {}), check=False
            ).returncode
        if code:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1]
            raise NotInstalled(f"`{Path(command[0]).name} {' '.join(command[1:4])} ...` ended with {code}: {last[:200]}")

    def _versions(self) -> dict[str, str]:
        code = "import sys; from importlib.metadata import version; print(*(version(n) for n in sys.argv[1:]), sep='\\n')"
        out = subprocess.run(
            [self.program("python"), "-c", code, *self.versions], capture_output=True, text=True, check=True
        ).stdout
        return dict(zip(self.versions, out.split()))


TRL = Environment(
    "trl",
    ("trl", "peft", "transformers>=5.17,<6"),
    ("python", "-c", "from trl import SFTTrainer"),
    ("trl", "peft", "transformers", "torch"),
)
TRL_BESIDE = Environment(
    "trl_beside",
    ("trl",),
    ("python", "-c", "from trl import GRPOTrainer"),
    ("trl", "peft", "transformers", "torch"),
    torch=False,
    borrows=True,
)
TRANSFORMERS = Environment(
    "transformers",
    ("transformers>=5.17,<6", "peft", "datasets", "accelerate"),
    ("python", "-c", "from transformers import Trainer; import peft, datasets"),
    ("transformers", "peft", "torch"),
)
AXOLOTL = Environment(
    "axolotl", ("axolotl==0.19.0",), ("axolotl", "--version"), ("axolotl", "transformers", "peft", "trl", "torch")
)
LLAMAFACTORY = Environment(
    "llamafactory",
    ("llamafactory", "torchvision==0.28.0"),
    ("llamafactory-cli", "version"),
    ("llamafactory", "transformers", "peft", "trl", "torch"),
    without=("torchvision",),
    libraries_off=("torchaudio",),
)
OGX = Environment("ogx", ("ogx==1.5.0",), ("ogx", "--help"), ("ogx",), torch=False, python=(3, 12))
TRANSFORMERS_SERVE = Environment(
    "transformers_serve",
    ("transformers[serving]==5.23.0",),
    ("python", "-c", "import transformers.cli.serve"),
    ("transformers", "torch"),
)
