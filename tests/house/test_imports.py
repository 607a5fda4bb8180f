"""The house: what may import what, and what must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "ropewalk"
FOLDERS = {
    "server": {
        "batches",
        "config",
        "compare",
        "jobs",
        "engine",
        "chat",
        "files",
        "tenants",
        "registry",
        "shared_registry",
        "database",
        "vault",
        "home",
        "ids",
        "tracing",
    },
    "compare": {
        *("config", "jobs", "engine", "chat", "files", "models", "registry", "checks", "sandbox", "tenants"),
        *("database", "vault", "ids", "failpoints", "folders"),
    },
    "jobs": {
        "checks",
        "config",
        "registry",
        "files",
        "tenants",
        "vault",
        "database",
        "ids",
        "failpoints",
        "folders",
        "tracing",
    },
    "train": {
        "config",
        "data",
        "engine",
        "models",
        "kernels",
        "chat",
        "files",
        "registry",
        "checks",
        "sandbox",
        "confinement",
        "home",
        "standalone",
    },
    "data": {"config", "chat", "files", "folders", "home"},
    "config": {"chat", "tenants"},
    "engine": {"config", "models", "kernels", "chat", "files", "tenants", "registry", "vault", "database", "ids", "tracing"},
    "models": {"kernels", "registry"},
    "chat": {"files", "ids"},
    "files": {"batches", "tenants", "database", "vault", "sandbox", "home", "ids", "failpoints", "folders"},
    "bench": {"models", "kernels"},
    "batches": {"tenants", "database", "vault", "ids", "failpoints"},
    "tenants": {"database", "vault", "home", "ids"},
    "migrations": {"batches", "compare", "files", "jobs", "shared_registry", "tenants", "database"},
    "checks": {"patterns", "sandbox", "schemas"},
    "tried_code": set(),
    "schemas": {"patterns"},
    "patterns": set(),
    "registry": set(),
    "shared_registry": {"registry", "database"},
    "kernels": set(),
    "errors": set(),
    "database": {"folders"},
    "vault": {"folders"},
    "folders": set(),
    "home": set(),
    "ids": set(),
    "failpoints": set(),
    "standalone": set(),
    "tracing": set(),
    "sandbox": {"sandbox_child"},
    "sandbox_child": {"confinement"},
    "confinement": set(),
}
TOP = {
    "cli",
    "verbs",
    "quickstart",
    "doctor",
    "__main__",
}  # may import everything; a room's verbs.py is part of the command line
HEAVY = "torch", "transformers", "peft", "datasets", "jsonschema"
LIGHT = [
    "ropewalk.cli",
    "ropewalk.errors",
    "ropewalk.registry",
    "ropewalk.checks",
    "ropewalk.bench.moe",
    "ropewalk.bench.report",
    "ropewalk.compare.rule",
    "ropewalk.compare.runner",
    "ropewalk.compare.records",
    "ropewalk.compare.leakage",
    "ropewalk.compare.page_text",
    "ropewalk.compare.panel",
    "ropewalk.compare.diff",
    "ropewalk.compare.intervals",
    "ropewalk.compare.badge",
    "ropewalk.compare.vote_counts",
    "ropewalk.compare.digest_sending",
    "ropewalk.files.local",
    "ropewalk.files.documents",
    "ropewalk.files.granted",
    "ropewalk.doctor.run",
    "ropewalk.jobs.runner",
    "ropewalk.jobs.cluster",
    "ropewalk.jobs.commands",
    "ropewalk.server.app",
    "ropewalk.server.policy_endpoint",
    "ropewalk.sandbox",
    "ropewalk.chat.template",
    "ropewalk.chat.replies",
    "ropewalk.engine.answer",
    "ropewalk.engine.client",
    "ropewalk.engine.models",
    "ropewalk.engine.questioning",
    "ropewalk.engine.request",
    "ropewalk.engine.vllm",
    "ropewalk.engine.scheduler",
    "ropewalk.models.hub",
    "ropewalk.config.run",
    "ropewalk.config.axolotl",
    "ropewalk.data.dataset",
    "ropewalk.train.prepare",
    "ropewalk.train.rewards",
    "ropewalk.train.reward_worker",
    "ropewalk.train.environment_worker",
    "ropewalk.train.harness_worker",
]


def room(module: str) -> str:
    """ropewalk.data.dataset -> train; ropewalk.errors -> errors."""
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Every module of ours that a file names in an import, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ropewalk"):
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "ropewalk" else [node.module]
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.startswith("ropewalk."))
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if here in TOP or here == "__init__" or path.name == "verbs.py":
        return
    allowed = FOLDERS[here] | {here} | (set() if here == "kernels" else {"errors"})
    assert {room(m) for m in imports(path)} <= allowed


def test_what_belongs_to_the_command_line_is_imported_by_nothing_else():
    ours = [path for path in SOURCE.rglob("*.py") if path.name not in ("cli.py", "verbs.py", "__main__.py")]
    assert {
        str(path): found for path in ours if (found := {m for m in imports(path) if m.split(".")[-1] in ("cli", "verbs")})
    } == {}


def test_every_init_file_is_empty():
    assert [p for p in SOURCE.rglob("__init__.py") if p.read_text().strip()] == []


@pytest.mark.parametrize("module", LIGHT)
def test_what_must_answer_fast_imports_nothing_that_takes_seconds(module):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
