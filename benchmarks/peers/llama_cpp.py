"""llama.cpp's server, built here from the source that the sdist of llama-cpp-python holds: a compiler and cmake are all it needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from peers.environments import FOLDER, NotInstalled

VERSION = "0.3.36"  # of llama-cpp-python
HERE = FOLDER / "llamacpp"
SOURCE = HERE / "source"
OPTIONS = ("BUILD_SHARED_LIBS", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "GGML_OPENMP")


def ensure(*, install: bool) -> tuple[Path, str]:
    """The program and its version; builds it where it is missing, which takes 20 minutes of one core."""
    program = HERE / "build/bin/llama-server"
    if not program.exists():
        if not install:
            raise NotInstalled("not built (a run without --quick builds it)")
        _build()
    return program, f"of llama-cpp-python {VERSION}"


def _build() -> None:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise NotInstalled(f"needs {tool} to be built, and there is none")
    HERE.mkdir(parents=True, exist_ok=True)
    name = f"llama_cpp_python-{VERSION}"
    if not SOURCE.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(HERE)]
        _do([*pip, f"llama-cpp-python=={VERSION}"])
        with tarfile.open(HERE / f"{name}.tar.gz") as archive:
            archive.extractall(HERE, filter="data")
        (HERE / name / "vendor/llama.cpp").rename(SOURCE)
        shutil.rmtree(HERE / name)
    build = str(HERE / "build")
    _do(["cmake", "-S", str(SOURCE), "-B", build, "-DCMAKE_BUILD_TYPE=Release", *(f"-D{option}=OFF" for option in OPTIONS)])
    _do(["nice", "-n", "19", "cmake", "--build", build, "--target", "llama-server", "-j", "1"])


def _do(command: list[str]) -> None:
    log = HERE / "build.log"
    with log.open("ab") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1]
        raise NotInstalled(f"`{' '.join(command[:3])} ...` ended with {code}: {last[:200]}")
