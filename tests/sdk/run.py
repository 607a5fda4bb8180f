"""The official SDKs against a running server: `make test-sdk`. Prints each run's closing line and writes test-sdk.json.

For anthropic 2.12.0 the SDK's own tests of files, models, messages and batches, from its sdist; for every version, and for the npm package, our own
behavioural tests. Each SDK lives in an environment of its own under .sdk/, apart from ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import environments
from served import Served, served

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OWN_MODULES = [
    f"tests/api_resources/{beta}{name}"
    for name in ("test_files.py", "test_models.py", "test_messages.py", "messages/test_batches.py")
    for beta in ("", "beta/")
]
SERVING = "engine: {longest: 256, threads: 1}\n"  # random weights seldom say that they are done
KINDS = ("passed", "failed", "expected_failures", "skipped")
Counts = dict[str, int]


def main() -> int:
    arguments = _arguments()
    versions = [version for version in environments.PYTHON_VERSIONS if arguments.only in (None, version)]
    results: dict[str, dict[str, Counts]] = {}
    if arguments.only in (None, "typescript"):
        environments.typescript()  # what is missing is said at once, not after the Python ones
    with tempfile.TemporaryDirectory(prefix="ropewalk-sdk-") as folder, serving(Path(folder)) as server:
        if environments.OWN_TESTS in versions:
            results.setdefault(environments.OWN_TESTS, {})["own"] = own_tests(server)
        for version in versions:
            results.setdefault(version, {})["behaviours"] = behaviours(version, server)
        if arguments.only in (None, "typescript"):
            version, counts = typescript(server)
            results[f"{environments.NPM_PACKAGE} {version}"] = {"behaviours": counts}
        log = server.log.read_text(encoding="utf-8", errors="replace").splitlines()
    summary = {name: _sum(suites.values()) | {"suites": suites} for name, suites in results.items()}
    arguments.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote {arguments.json}")
    for name, counts in summary.items():
        print(f"  {name:<26}" + "".join(f"{counts[kind]:>6} {kind.replace('_', ' ')}" for kind in KINDS))
    failed = any(counts["failed"] or not counts["passed"] for counts in summary.values())
    if failed:
        print(
            "\nwhat the server says went wrong:",
            *[line for line in log if '"level": "info"' not in line][-20:],
            sep="\n",
            file=sys.stderr,
        )
    return int(failed)


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A server whose model makes short replies."""
    settings = folder / "models.yml"
    settings.write_text(SERVING, encoding="utf-8")
    with served(folder, "--models", str(settings)) as server:
        yield server


def own_tests(server: Served) -> Counts:
    """The SDK's own tests, one after the other, as they share rows that are put back before each."""
    python, source = environments.python(environments.OWN_TESTS), environments.source()
    command = [
        python,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "tests._alias_httpx",
        "-p",
        "sdk_plugin",
        "-p",
        "no:cacheprovider",
    ]
    print(f"\n== the own tests of anthropic {environments.OWN_TESTS}", flush=True)
    return _pytest([*command, "-q", "-rxXf", *OWN_MODULES], source, server, {"ROPEWALK_TEST_RESEED": "1"})


def behaviours(version: str, server: Served) -> Counts:
    """Our behavioural tests with this version of the SDK."""
    command = [environments.python(version), "-m", "pytest", "--noconftest", "-c", os.devnull, "--rootdir", HERE, "-W", "error"]
    print(f"\n== behaviours through anthropic {version}", flush=True)
    plugins = ["-p", "sdk_plugin", "-p", "sdk_fixtures", "-p", "no:cacheprovider"]
    return _pytest([*command, *plugins, "-q", "-rs", "--durations=5", HERE / "behaviours.py"], HERE, server, {})


def typescript(server: Served) -> tuple[str, Counts]:
    """The behavioural tests of the npm package, by node's own test runner; its closing line is put in pytest's words."""
    folder, version = environments.typescript()
    print(f"\n== behaviours through {environments.NPM_PACKAGE} {version}", flush=True)
    (folder / "behaviours.mjs").write_text((HERE / "behaviours.mjs").read_text(encoding="utf-8"), encoding="utf-8")
    begun = time.monotonic()
    command = ["node", "--test", "--test-reporter=tap", "behaviours.mjs"]
    done = subprocess.run(command, cwd=folder, env=_environment(server, {}), capture_output=True, text=True)
    said = dict(re.findall(r"^# (tests|pass|fail|cancelled|skipped|todo) (\d+)$", done.stdout, re.MULTILINE))
    counts = {
        "passed": int(said.get("pass", 0)),
        "failed": int(said.get("fail", 0))
        + int(said.get("cancelled", 0))
        + int(done.returncode != 0 and said.get("fail", "0") == "0"),
        "expected_failures": int(said.get("todo", 0)),
        "skipped": int(said.get("skipped", 0)),
    }
    if counts["failed"]:
        print(done.stdout + done.stderr)
    parts = [f"{counts[kind]} {kind.replace('_', ' ')}" for kind in KINDS if counts[kind]]
    print(f"{', '.join(parts)} in {time.monotonic() - begun:.2f}s", flush=True)
    return version, counts


def _pytest(command: Sequence[str | Path], cwd: Path, server: Served, more: Mapping[str, str]) -> Counts:
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "counts.json"
        environment = _environment(server, {"ROPEWALK_TEST_COUNTS": str(written), **more})
        subprocess.run(command, cwd=cwd, env=environment)
        if not written.exists():  # pytest itself failed to begin
            return dict.fromkeys(KINDS, 0) | {"failed": 1}
        counts: Counts = json.loads(written.read_text(encoding="utf-8"))
    return counts


def _environment(server: Served, more: Mapping[str, str]) -> dict[str, str]:
    """Nothing of the user's own keys and settings reaches an SDK."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANTHROPIC_", "PYTEST_", "ROPEWALK_"))}
    ours = {"TEST_API_BASE_URL": server.url, "ROPEWALK_TEST_SEEDER": server.seeder_url, "PYTHONPATH": str(HERE)}
    return kept | ours | {"PYTHONDONTWRITEBYTECODE": "1"} | dict(more)


def _sum(suites: object) -> Counts:
    return {kind: sum(counts[kind] for counts in suites) for kind in KINDS}  # type: ignore[attr-defined]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one of the Python versions, or typescript", metavar="VERSION")
    parser.add_argument("--json", type=Path, default=ROOT / "test-sdk.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
