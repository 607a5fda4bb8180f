"""What the pages tell people to type: every command is one of the real command line, every YAML is read by the real reader.

What is run, and not read alone: commands in test_docs_commands.py, calls of a server in tests/server/test_docs_calls.py.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from ropewalk.cli import main, parse
from ropewalk.config.mail import read_mail
from ropewalk.config.run import parse_run
from ropewalk.config.serving import read_serving
from ropewalk.quickstart import facts
from ropewalk.quickstart.run import BASE
from ropewalk.train.sweep import combinations

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
SPAN = re.compile(r"`(ropewalk\s[^`]+)`")
SET = re.compile(r"(?:[A-Z_]+=\S+ )*")  # what a line sets for its command
ENDS = {">", ">>", "|", "||", "&&", "&"}  # of our command, in a shell's line
# Of a run's configuration only what the page is about is shown: the rest is laid under it here.
REST = {
    "base_model": "base",
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    "output_dir": "out",
    "learning_rate": 1e-4,
}
REWARDED = {"rl": "grpo", "trl": {"reward_funcs": [{"kind": "numeric"}]}}
ILLUSTRATIVE = {"ropewalk jobs list|"}  # several in one line
# Programs that no test here can run as the pages have them, and what stands for each.
NOT_RUN = {
    "pip install": "installing asks a registry: tests/house/test_wheel.py installs the wheel, the Makefile the checkout",
    "docker build": "no container runtime: tests/house/test_deploy.py holds the Dockerfile to what there is",
    "docker compose": "no container runtime: tests/house/test_deploy.py reads the file by its schema, and the command within",
    "kubectl": "no cluster: tests/house/test_deploy.py reads the manifests by their schemas, and what the secret is made of",
    "ray start": "one machine: tests/jobs/test_ray.py starts a cluster on it",
    "torchrun": "tests/train/test_launch.py starts the same processes; what they run is read below",
    "vllm serve": "tests/train/vllm_fake.py answers in its place",
    "make": "the targets are read below",
    "python benchmarks/": "scripts and options are read below; `make bench QUICK=1` runs them",
    "apt-get install": "the machine's own packages",
    ".venv/bin/python -m pytest": "the tests themselves",
    "export": "what it sets, test_docs_commands.py sets",
    "head -c 32 /dev/urandom": "a key of 32 bytes: tests/test_vault.py",
}
ELSEWHERE = ("ropewalk", "curl")  # run by the other two modules
PROGRAM = re.compile(rf"(?:\$ )?({SET.pattern})(\S.*)")
SHELL = ("", "bash", "sh", "console")  # how a block of commands is fenced


def code(page):
    """The texts of a page that are code by themselves: fenced, or indented by four."""
    text = page.read_text(encoding="utf-8")
    fenced = [body for _, body in BLOCK.findall(text)]
    return [*fenced, *INDENTED.findall(BLOCK.sub("\n", text))]


def command(line):
    """A line of a shell as the words of one command: without its prompt, what is said about it, and where its output goes."""
    line = re.split(r"\s{3,}|\s#\s", re.sub(rf"^(\w+=\$\(|{SET.pattern})", "", line.strip().removeprefix("$ ")))[0]
    words = shlex.split(line)
    return words[: next((at for at, word in enumerate(words) if word in ENDS), len(words))]


def commands(page):
    lines = [line for text in code(page) for line in text.splitlines()]
    return [line.strip() for line in lines if re.match(rf"\s*(\$ )?(\w+=\$\(|{SET.pattern})ropewalk ", line)]


def shell_lines(page):
    """Lines of blocks that are for a shell, in which a line that ends with a backslash goes on."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for kind, body in BLOCK.findall(text) if kind in SHELL] + INDENTED.findall(BLOCK.sub("\n", text))
    return [line.strip() for body in blocks for line in body.replace("\\\n", " ").splitlines() if line.strip()]


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page)]
SPANS = sorted({(page.name, span) for page in PAGES for span in SPAN.findall(page.read_text(encoding="utf-8"))})
YAMLS = [
    (page.name, number, body)
    for page in PAGES
    for number, (kind, body) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    if kind in ("yaml", "yml")
]


def test_the_pages_have_commands_and_configurations():
    assert len(COMMANDS) > 60
    assert len(YAMLS) > 8


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: value[:60])
def test_every_command_of_a_page_is_one_of_the_command_line(page, line, capsys):
    if any(line.startswith(text) for text in ILLUSTRATIVE):
        room, verbs = command(line)[1:3]
        assert all(is_verb([room, verb]) for verb in verbs.split("|"))
        return
    try:
        assert callable(parse(command(line)[1:]).run)
    except SystemExit:
        pytest.fail(f"{page}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(("page", "span"), SPANS, ids=lambda value: value[:60])
def test_every_command_within_a_sentence_is_one_of_the_command_line(page, span, capsys):
    words = [word for word in command(span)[1:] if word != "..."]
    words = ["1" if re.fullmatch(r"[A-Z]+", word) else word for word in words]  # whatever it stands for
    # As it stands; or with its last word's value, or what it is done to, left out; or a verb that is only named.
    assert any(is_read(some) for some in (words, [*words, "1"], [*words, "1", "1"])) or is_verb(words), capsys.readouterr().err


def is_read(words):
    try:
        return callable(parse(words).run)
    except SystemExit:
        return False


def is_verb(words):
    try:
        parse([*words, "--help"])
    except SystemExit as ended:
        return ended.code == 0 and all(re.fullmatch(r"[a-z-]+", word) for word in words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_another_program_is_run_or_has_something_that_stands_for_it(page):
    programs = {name.split()[0] for name in (*NOT_RUN, *ELSEWHERE)}
    wrong = []
    for line in shell_lines(page):
        found = PROGRAM.fullmatch(re.sub(r"^\w+=\$\(", "", line))
        if found and found[2].split()[0] in programs | {"python", "npm", "npx", "uv", "git", "wget", "jq", "psql", "sudo"}:
            wrong += [line] * (not found[2].startswith((*NOT_RUN, *ELSEWHERE)))
        for words in re.findall(r"(?:-m ropewalk|exec ropewalk ropewalk|&& ropewalk) (.*)", line):
            wrong += [line] * (not is_read(command(f"ropewalk {words}")[1:]))
    assert wrong == []


def test_what_is_not_run_stands_in_the_pages_and_what_stands_for_it_is_there():
    lines = [PROGRAM.fullmatch(line)[2] for page in PAGES for line in shell_lines(page)]
    assert [name for name in NOT_RUN if not any(line.startswith(name) for line in lines)] == []
    assert [path for why in NOT_RUN.values() for path in re.findall(r"tests/\S+\.py", why) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_configuration_hides_in_a_block_of_another_kind(page):
    text = page.read_text(encoding="utf-8")
    others = [body for kind, body in BLOCK.findall(text) if kind not in ("yaml", "yml", "python", "json")]
    others += [re.sub(r"^ {4}", "", body, flags=re.MULTILINE) for body in INDENTED.findall(BLOCK.sub("\n", text))]
    assert [line for body in others for line in body.splitlines() if re.match(r"[a-z_0-9]+:(\s|$)", line)] == []


@pytest.mark.parametrize(("page", "number", "text"), YAMLS, ids=lambda value: str(value)[:24].split("\n")[0])
def test_every_yaml_is_read_by_its_reader(page, number, text, tmp_path, trained_on, capsys):
    values = yaml.safe_load(text)
    file = tmp_path / "read.yml"
    file.write_text(text, encoding="utf-8")
    if {"from", "host"} <= set(values):
        assert read_mail(file).host == values["host"]
    elif {"models", "engine", "jobs"} & set(values):
        assert set(read_serving(file).models or ()) == set(values.get("models", ()))
    elif "sweep.yml" in text:
        (tmp_path / "run.yml").write_text(yaml.safe_dump(REST | {"adapter": "lora"}), encoding="utf-8")
        assert len(combinations(tmp_path / "run.yml", (), file)) == 4
    else:
        whole = REST | (REWARDED if "trl" in values else {}) | values
        if "trl" in values and "environment" not in values["trl"]:
            whole["trl"] = REWARDED["trl"] | values["trl"]
        assert parse_run(yaml.safe_dump(whole)).base_model == whole["base_model"]
        if whole.get("processor_type") is None:  # no base that sees is here: tests/train/test_pictures.py has one
            checked(whole, trained_on, tmp_path)
            assert "Memory" in capsys.readouterr().out


def checked(whole, folder, tmp_path):
    """What `ropewalk check` says of a page's configuration, with a base and rows that are here in the place of the reader's."""
    kind = whole["datasets"][0]["type"]
    rows = {"bradley_terry.chat_template": "pairs.jsonl", "stepwise_supervised": "steps.jsonl"}.get(kind, "rows.jsonl")
    here = whole | {"base_model": str(BASE), "output_dir": str(tmp_path / "out")}
    here["datasets"] = [whole["datasets"][0] | {"path": str(folder / rows)}]
    here["bf16"] = False  # as on any CPU
    shutil.copy(folder / "rewards.py", tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "whole.yml").write_text(yaml.safe_dump(here), encoding="utf-8")
    assert main(["check", str(tmp_path / "whole.yml"), "--offline"]) == 0


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory):
    """Rows of each kind that the pages name, and the rewards of a file beside them."""
    folder = tmp_path_factory.mktemp("rows")
    asked = facts.questions(facts.split()[0][:40], 6)
    rows = [{"prompt": q.prompt, "answer": q.answer, "messages": facts.conversation([q])} for q in asked]
    pairs = [{"input": q.prompt, "chosen": q.answer, "rejected": "no"} for q in asked]
    steps = [{"prompt": q.prompt, "completions": [q.value, q.answer], "labels": [True, False]} for q in asked]
    for name, some in {"rows": rows, "pairs": pairs, "steps": steps}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    (folder / "rewards.py").write_text("def correct(completion, answer, **row):\n    return float(completion == answer)\n")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_script_and_option_of_a_benchmark_that_a_page_names_is_there(page):
    wrong = []
    for script, rest in re.findall(r"python (benchmarks/\w+\.py)([^`\n]*)", page.read_text(encoding="utf-8")):
        path = ROOT / script
        if not path.exists():
            wrong.append(script)
            continue
        source = path.read_text(encoding="utf-8") + (ROOT / "benchmarks" / "measure.py").read_text(encoding="utf-8")
        wrong += [f"{script} {option}" for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest) if f'"{option}"' not in source]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_of_make_that_a_page_names_is_there(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"(?:^ {4}|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in named if name not in targets] == []
