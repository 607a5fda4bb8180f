"""What the pages tell people to type: every command is one of the real command line, every YAML is read by the real reader."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from ropewalk.cli import parse
from ropewalk.config.mail import read_mail
from ropewalk.config.run import parse_run
from ropewalk.config.serving import read_serving

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
SPAN = re.compile(r"`(ropewalk [^`]+)`")
ENDS = {">", ">>", "|", "||", "&&", "&"}  # of our command, in a shell's line
# Of a run's configuration only what the page is about is shown: the rest is laid under it here.
REST = {
    "base_model": "base",
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    "output_dir": "out",
    "learning_rate": 1e-4,
}
REWARDED = {"rl": "grpo", "trl": {"reward_funcs": [{"kind": "numeric"}]}}
ILLUSTRATIVE = {"ropewalk jobs list|show|cancel|logs"}  # several in one line


def code(page):
    """The texts of a page that are code by themselves: fenced, or indented by four."""
    text = page.read_text(encoding="utf-8")
    fenced = [body for _, body in BLOCK.findall(text)]
    return [*fenced, *INDENTED.findall(BLOCK.sub("\n", text))]


def command(line):
    """A line of a shell as the words of one command: without its prompt, what is said about it, and where its output goes."""
    line = re.split(r"\s{3,}|\s#\s", re.sub(r"^\w+=\$\(", "", line.strip().removeprefix("$ ")))[0]
    words = shlex.split(line)
    return words[: next((at for at, word in enumerate(words) if word in ENDS), len(words))]


def commands(page):
    lines = [line for text in code(page) for line in text.splitlines()]
    return [line.strip() for line in lines if re.match(r"\s*(\$ )?(\w+=\$\()?ropewalk ", line)]


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
        return
    try:
        assert callable(parse(command(line)[1:]).run)
    except SystemExit:
        pytest.fail(f"{page}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(("page", "span"), SPANS, ids=lambda value: value[:60])
def test_every_command_within_a_sentence_has_a_verb_that_there_is(page, span, capsys):
    words = []
    for word in command(span)[1:]:
        if not re.fullmatch(r"[a-z-]+", word):
            break
        words.append(word)
    for length in range(len(words), 0, -1):  # the longest beginning that is a verb; what follows it are arguments
        with pytest.raises(SystemExit) as ended:
            parse([*words[:length], "--help"])
        if ended.value.code == 0:
            return
    assert words == [], capsys.readouterr().err


@pytest.mark.parametrize(("page", "number", "text"), YAMLS, ids=lambda value: str(value)[:24].split("\n")[0])
def test_every_yaml_is_read_by_its_reader(page, number, text, tmp_path):
    values = yaml.safe_load(text)
    file = tmp_path / "read.yml"
    file.write_text(text, encoding="utf-8")
    if {"from", "host"} <= set(values):
        assert read_mail(file).host == values["host"]
    elif {"models", "engine", "jobs"} & set(values):
        assert set(read_serving(file).models or ()) == set(values.get("models", ()))
    else:
        whole = REST | (REWARDED if "trl" in values else {}) | values
        if "trl" in values and "environment" not in values["trl"]:
            whole["trl"] = REWARDED["trl"] | values["trl"]
        assert parse_run(yaml.safe_dump(whole)).base_model == whole["base_model"]


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
