"""What the pages tell people to type is typed: page by page, in the order in which it stands there, where what it names is there.

Names in examples stand for things that a reader has: `PLACES` says what they are here. What a page makes, its later lines find.
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from files.papers import pdf
from house.test_docs_examples import COMMANDS, ILLUSTRATIVE, SET, command
from ropewalk.cli import main
from ropewalk.files.local import LocalFiles
from ropewalk.files.settings import Settings
from ropewalk.quickstart import facts
from ropewalk.quickstart.run import BASE
from ropewalk.registry import Registry
from server.test_pages import certify
from server.test_tracing import Collector

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = Path(__file__).parents[1] / "compare" / "pages"
# What no machine without the model hub, a GPU or a person at it can do; each is tried elsewhere, as is said.
ELSEWHERE = {
    "ropewalk models pull Qwen/Qwen3-0.6B": "from a hub of its own: tests/models/test_hub.py",
    "ropewalk train examples/qwen3-30b-a3b.yml": "30 billion weights: the same configuration is checked above it",
    "ropewalk merge Qwen/Qwen3-30B-A3B runs/qwen3-30b/adapter merged/": "the same: tests/models/test_merge.py",
    "ropewalk train examples/pictures.yml": "four billion weights: tests/train/test_pictures.py",
    "ropewalk files questions file_abc --model answers": "a model that writes rows: tests/server/test_questions.py",
    "ropewalk compare vote cmp_...": "asks a person, key by key: tests/compare/test_votes.py",
}
MORE = {  # what makes a long command short, and does without the hub
    "check": ["--offline"],
    "bench moe": ["--quick"],
    "doctor": ["--no-self-test"],  # which tests/doctor runs
    "train": ["max_steps=1"],
    "compare selftest": ["--runs", "6"],
    "rewards check": ["--prompts", "2"],
}
VERDICTS = {0, 10, 20, 30, 40, 50}
CODES = {"compare show": VERDICTS, "compare selftest": {0, 1}, "doctor": {0, 1}}  # where another than 0 is an answer too
SMALL = {
    "base_model": str(BASE),
    "adapter": "lora",
    "lora_r": 4,
    "sequence_len": 512,
    "learning_rate": 1e-3,
    "bf16": False,
    "seed": 7,
}


@dataclass
class Desk:
    """A folder with what the pages name, and the ids that were seen last."""

    folder: Path
    seen: dict[str, str] = field(default_factory=dict)

    def words(self, line: str) -> list[str]:
        """A page's line as it is typed here."""
        typed = [self._word(word) for word in command(line)[1:]]
        return typed + next((more for verb, more in MORE.items() if typed[: len(verb.split())] == verb.split()), [])

    def _word(self, word: str) -> str:
        if placeholder := re.fullmatch(r"(cmp|key|file|suite)_(\.\.\.|abc)|\$(id)", word):
            return self.seen[placeholder[1] or "cmp"]
        return PLACES.get(word, word)

    def remember(self, said: str) -> None:
        for kind, id in re.findall(r"\b((?:cmp|key|file|suite)_)(\w{8,})", said):
            self.seen[kind[:-1]] = kind + id


PLACES = {
    "$CANDIDATE": "house",
    "/mnt/backup": "backup",
    "/srv/ropewalk": "restored",
    "~/.config/ropewalk/root-2.key": "root-2.key",
    "https://...": "https://example.org/claims",
    "443": "0",
    "8700": "0",
}


@pytest.fixture
def desk(house, tmp_path, monkeypatch):
    """Where the reader of a page sits: the quickstart's base and an adapter are published, and files lie about."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("ropewalk.server.serve.Server.serve", _looks_up)
    monkeypatch.setattr("ropewalk.server.logs.configure", lambda: None)  # it is for a process of its own
    shutil.copytree(house.home, tmp_path / "home")
    registry = Registry(tmp_path / "home" / "registry")
    adapter = Path(registry.resolve("reader-house").path)
    for name in ("qwen", "qwen3", "qwen3-30b", "big", "big-model"):
        registry.publish_base(name, BASE)
    for name in ("house", "other", "mine"):
        registry.publish_adapter(name, adapter, "qwen3", {})
    registry.ship("answers", "qwen3")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    for run in ("house", "mine"):
        shutil.copytree(adapter, tmp_path / "runs" / run / "adapter")
    for model in ("qwen3-0.6b", "qwen3-30b"):
        shutil.copytree(BASE, tmp_path / "models" / model)
    _write_files(tmp_path)
    made = Desk(tmp_path)
    made.seen["file"] = LocalFiles(Settings(data=tmp_path / "home")).put(tmp_path / "report.pdf").id
    return made


async def _looks_up(*_, **__):
    """A server that is told to stop as soon as it is up."""


def _write_files(folder: Path) -> None:
    trained_on, held_out = facts.split()
    facts.write_suite(facts.questions(held_out, 1)[:30], folder / "questions.jsonl")
    rows = facts.questions(trained_on, 1)[:12]
    for name in ("train.jsonl", "data/train.jsonl"):
        facts.write_rows(rows, folder / name, turns=1)
    facts.write_prompts(rows, folder / "rows.jsonl")
    answers = [{"prompt": q.prompt, "answer": q.answer, "completions": [q.answer, "no"]} for q in rows]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    (folder / "report.pdf").write_bytes(pdf("What it costs: nine pounds.", "Who pays: the tenant."))
    shutil.copy(PAGES / "two_tools.txt", folder / "page.txt")
    certify(folder)
    data = {"datasets": [{"path": "train.jsonl", "type": "chat_template"}], "output_dir": "runs/trained"}
    rewarded = {
        "rl": "grpo",
        "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
        "output_dir": "runs/rewarded",
        "trl": {
            "reward_funcs": [{"kind": "numeric"}],
            "num_generations": 2,
            "generation_batch_size": 4,
            "max_completion_length": 8,
        },
    }
    mail = {"from": "a@example.org", "url": "https://example.org", "spool": str(folder / "mail")}
    written = {
        "mine.yml": SMALL | data | {"output_dir": "runs/mine-too"},
        "run.yml": SMALL | data,
        "grpo.yml": SMALL | rewarded,
        "models.yml": {"models": {"answers": {"adapter": "house"}}},
        "mail.yml": mail,
    }
    for name, values in written.items():
        (folder / name).write_text(yaml.safe_dump(values), encoding="utf-8")


def _typed(page: str) -> list[str]:
    lines = [line for of, line in COMMANDS if of == page and not any(line.startswith(text) for text in ILLUSTRATIVE)]
    return [line for line in lines if not any(line.startswith(text) for text in ELSEWHERE)]


@pytest.mark.parametrize("page", sorted({page for page, _ in COMMANDS}))
def test_what_a_page_tells_people_to_type_does_what_it_says(page, desk, capsys, monkeypatch, request):
    if page in PREPARED:
        PREPARED[page](desk)
        desk.remember(capsys.readouterr().out)
    for line in _typed(page):
        if "postgresql" in line:
            urls = {"--database-url": request.getfixturevalue("postgres_url"), "--blobs": request.getfixturevalue("bucket_url")}
        else:
            urls = {}
        for name, value in re.findall(r"([A-Z_]+)=(\S+) ", SET.match(line)[0]):
            monkeypatch.setenv(name, request.getfixturevalue("telemetry")[value])
        words = desk.words(line)
        for option, url in urls.items():
            words[words.index(option) + 1] = url
        code = main(words)
        said = capsys.readouterr()
        allowed = next((codes for verb, codes in CODES.items() if words[: len(verb.split())] == verb.split()), {0})
        assert code in allowed, f"{' '.join(words)}\n{said.out[-1500:]}\n{said.err[-1500:]}"
        desk.remember(said.out)
        if target := re.search(r"\s>\s*(\w[\w.]*)", line):
            Path(target[1]).write_text(said.out, encoding="utf-8")
        if words[:2] == ["keys", "rotate-root"]:
            monkeypatch.setenv("ROPEWALK_ROOT_KEY_FILE", words[-1])


@pytest.fixture
def telemetry():
    """Addresses of collectors, as the pages have them, and here."""
    collector = Collector()
    yield {"http://collector:4318": f"http://127.0.0.1:{collector.server.server_port}"}
    collector.server.shutdown()
    collector.server.server_close()
    assert "ropewalk_requests_in_progress" in collector.metrics()


def test_what_is_not_typed_here_stands_in_the_pages():
    lines = [line for _, line in COMMANDS]
    assert [text for text in ELSEWHERE if not any(line.startswith(text) for line in lines)] == []


def _receipt(desk: Desk) -> None:
    assert main(["files", "delete", desk.seen["file"], "--receipt", "receipt.json"]) == 0
    assert main(["files", "receipt-key"]) == 0


def _suite(desk: Desk) -> None:
    assert main(["compare", "suite", "questions.jsonl", "--name", "mine"]) == 0


def _workspace(desk: Desk) -> None:
    assert main(["workspaces", "create", "acme"]) == 0


PREPARED = {"deletion.md": _receipt, "compare.md": _suite, "jobs.md": _workspace}
