"""An environment for each SDK under .sdk/, made once: a virtual environment per Python version, a folder of node_modules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".sdk"
PYTHON_VERSIONS = ("0.121.0", "1.17.0", "2.12.0")
OWN_TESTS = "2.12.0"  # the version whose own tests are run
NPM_PACKAGE = "@anthropic-ai/sdk"


def source() -> Path:
    """The sdist of the version whose tests we run, unpacked; pip fetches it, as PyPI's sdist holds the tests."""
    folder = FOLDER / f"anthropic-{OWN_TESTS}-source"
    if not (folder / "tests").is_dir():
        name = f"anthropic-{OWN_TESTS}.tar.gz"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--no-deps", "--no-binary", "anthropic", "--dest", str(FOLDER), f"anthropic=={OWN_TESTS}"])
        with tarfile.open(FOLDER / name) as archive:
            archive.extractall(FOLDER / "unpacked", filter="data")
        (FOLDER / "unpacked" / f"anthropic-{OWN_TESTS}").rename(folder)
    return folder


def python(version: str) -> Path:
    """The interpreter of an environment with this version of the SDK and pytest, and for one version what its own tests need."""
    folder = FOLDER / f"anthropic-{version}"
    wanted = [f"anthropic=={version}", "pytest"]
    if version == OWN_TESTS:
        wanted = [f"{FOLDER / f'anthropic-{version}.tar.gz'}[aiohttp]", *_test_requirements()]
    _once(folder, wanted, lambda: _make_python(folder, wanted))
    return folder / "bin" / "python"


def typescript() -> tuple[Path, str]:
    """A folder with the newest npm package in it, and its version."""
    if shutil.which("npm") is None:
        sys.exit(
            "the TypeScript SDK needs node 20 or newer with npm, which is not here; `--only VERSION` runs one of the Python ones"
        )
    folder = FOLDER / "typescript"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text(json.dumps({"name": "typescript-sdk", "private": True}), encoding="utf-8")
    _run(["npm", "install", "--no-audit", "--no-fund", "--no-save", "--silent", f"{NPM_PACKAGE}@latest"], folder)
    manifest = folder / "node_modules" / NPM_PACKAGE / "package.json"
    return folder, json.loads(manifest.read_text(encoding="utf-8"))["version"]


def _test_requirements() -> list[str]:
    """What the tests of the files and models modules import, pinned as the sdist's own lock file pins it."""
    lock = (source() / "requirements-dev.lock").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", lock, re.MULTILINE))
    names = ("pytest", "pytest-asyncio", "pytest-xdist", "respx", "time-machine", "dirty-equals", "inline-snapshot", "rich")
    return [*(f"{name}=={pins[name]}" for name in names), f"http-snapshot[httpx]=={pins['http-snapshot']}"]


def _make_python(folder: Path, wanted: Sequence[str]) -> None:
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted])


def _once(folder: Path, wanted: Sequence[str], make: Callable[[], None]) -> None:
    stamp = folder / "wanted.json"
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != list(wanted):
        make()
        stamp.write_text(json.dumps(list(wanted)), encoding="utf-8")


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=sys.stderr)
