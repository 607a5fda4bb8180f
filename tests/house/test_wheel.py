"""What is installed from a wheel is whole: code, data, command, and every package it imports is asked for."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONAL = {
    "ray",
    "opentelemetry",
    "torchao",
    "liger_kernel",
    "wandb",
    "mlflow",
    "datasets",
    "pyarrow",
    "triton",
    "torch.utils.tensorboard",
    "obstore",
    "openai",
    "asyncpg",
}
IMPORTED_AS = {"pyyaml": "yaml", "pillow": "PIL", "python_docx": "docx", "python_pptx": "pptx", "google_re2": "re2"}


def test_a_wheel_in_an_empty_environment_and_folder_runs_the_quickstart(tmp_path):
    """The dependencies are lent from this environment (installing torch again takes minutes); ropewalk is the wheel's alone."""
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path / "dist",
        ROOT,
    ]
    subprocess.run(wheel, check=True, capture_output=True)
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "env/bin/python", "install", "--quiet", "--no-deps"]
    subprocess.run(
        [*pip, *(tmp_path / "dist").glob("*.whl")],
        check=True,
        capture_output=True,
    )
    # A path named in a .pth file is searched, but its own .pth files are not read: this repository's source stays out.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"ROPEWALK_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [tmp_path / "env/bin/ropewalk", "quickstart", "--fast", "--dir", "run"],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((empty / "run" / "summary.json").read_text())
    assert summary["after"] > summary["before"]
    assert summary["verdict"]["state"] in (empty / "run" / "comparison.html").read_text()  # without a server
    assert "loading quickstart-adapter" in done.stdout  # progress, where there is no terminal
    located = [tmp_path / "env/bin/python", "-c", "import ropewalk.cli; print(ropewalk.cli.__file__)"]
    assert str(site) in subprocess.run(located, cwd=empty, env=env, capture_output=True, text=True).stdout


def test_every_package_that_is_imported_is_asked_for():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0].replace("-", "_").lower() for line in wanted}
    asked = {IMPORTED_AS.get(name, name) for name in names} | {"ropewalk"}
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    assert found - asked - OPTIONAL - set(sys.stdlib_module_names) == set()
