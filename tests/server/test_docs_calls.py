"""What the pages have people ask a server is asked: every block of Python and every call of curl, in the order of its page."""

import ast
import asyncio
import inspect
import os
import re
import shutil
import subprocess
import sys
import types

import openai
import pytest

from browser import pdf
from house.test_docs_examples import BLOCK, PAGES, shell_lines
from ropewalk.quickstart import facts
from ropewalk.server.settings import ServerSettings
from ropewalk.tenants.keys import create_key

# Blocks that need more than a server, and what stands for them.
NOT_RUN = {"reward-models.md": "an adapter of a reward model: tests/train/test_scoring.py reads it back the same way"}
OWN = {"documents.md", "tenants.md", "jobs.md"}  # each has a test of its own below
PYTHON = {
    page.name: [body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == "python"] for page in PAGES
}
CURL = {page.name: [line for line in shell_lines(page) if line.startswith("curl")] for page in PAGES}
# A client is not closed in an example, nor is the file that it sends.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The folder that a reader types in, with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    for name in ("lease.pdf", "report.pdf"):
        (tmp_path / name).write_bytes(pdf("The rent is 900.", "It is paid monthly.", "Pets are welcome."))
    (tmp_path / "talk.mp4").write_bytes(os.urandom(3000))
    trained_on, held_out = facts.split()
    facts.write_rows(facts.questions(trained_on[:8], 2), tmp_path / "train.jsonl")
    facts.write_rows(facts.questions(held_out[:4], 2), tmp_path / "held-out.jsonl")
    return tmp_path


def here(text, asked):
    """An example with this server's address, key and model in the place of the reader's, and with short replies."""
    text = re.sub(r"http://(127\.0\.0\.1|localhost):8700", asked.url, text)
    text = re.sub(r'"rw-[a-z-]*\.\.\."', f'"{asked.key}"', text)
    text = re.sub(r'max_tokens("?[=:] ?)\d+', r"max_tokens\g<1>8", text)  # what is said makes no sense, and need not be long
    text = text.replace("chat.completions.create(", "chat.completions.create(max_tokens=8, ")
    return re.sub(r'model="(house|quickstart)"', 'model="answers"', text)


def verifiers():
    """What the page on rewards calls of verifiers 0.1.14, which needs more than a test should install."""

    class Environment:
        async def run_rollout(self, question, client, model, sampling):
            told = {"reward": float(question["answer"] == "42"), "metrics": {"turns": 2.0}}
            return told | {"error": client is None and "there is no client"}

    found = types.ModuleType("verifiers")
    found.load_environment = lambda name: Environment()
    found.OpenAIChatCompletionsClient = lambda client: client
    return found


def ask(page, asked, desk, **names):
    """Runs the blocks of a page, one after the other, and returns what they have named."""
    for block in PYTHON[page]:
        code = compile(here(block, asked), page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        found = eval(code, names)
        if inspect.iscoroutine(found):
            asked.run(found)
    return names


@pytest.mark.parametrize("page", [name for name, blocks in PYTHON.items() if blocks and name not in {*NOT_RUN, *OWN}])
def test_the_python_of_a_page_does_what_it_says(page, asked, desk, monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", verifiers())
    names = ask(page, asked, desk)
    SEEN.get(page, lambda names: None)(names)


def test_documents_are_read_as_the_page_says(asked, desk):
    whole = (desk / "report.pdf").read_bytes()
    with asked.http() as http:
        file = http.post("/v1/files", files={"file": ("report.pdf", whole)}).json()["id"]
    caller = asked.run(asked.store.local_caller())
    names = ask("documents.md", asked, desk, store=asked.store, caller=caller, file_id=file, hostile=whole)
    assert "Pets are welcome" in names["found"].text[names["page"].start : names["page"].end]
    assert names["png"].startswith(b"\x89PNG")


def test_workspaces_and_keys_are_changed_as_the_page_says(asked, desk, monkeypatch):
    key, _ = asked.run(create_key(asked.store.database, asked.store.vault, None, "old"))
    monkeypatch.setitem(PYTHON, "tenants.md", [block.replace("key_abc", key.id) for block in PYTHON["tenants.md"]])
    names = ask("tenants.md", asked, desk)
    assert names["workspace"].name == "acme"
    assert names["client"].organization.api_keys.retrieve(key.id).status == "archived"


def test_a_job_is_begun_as_the_page_says(start, tiny, desk):
    with start(settings=ServerSettings(jobs_at_once=0)) as found:  # it waits for another process
        found.app.state.registry.publish_base("qwen", tiny)
        names = ask("jobs.md", found, desk)
        job = names["client"].fine_tuning.jobs.cancel(names["job"].id)
    assert (job.model, job.status) == ("qwen", "cancelled")


def _rewards(names):
    assert [names["correct"](text, "42") for text in ("42", "43")] == [1.0, 0.0]
    assert names["lengths"](["four"], ["p"]) == [-0.04]
    episode, row = names["Verifiers"]().rollout, {"prompt": "What is it?", "answer": "42"}
    assert asyncio.run(episode("a client", row)) == {"reward": 1.0, "turns": 2.0}
    with pytest.raises(RuntimeError, match="there is no client"):
        asyncio.run(episode(None, row))


def _messages(names):
    assert (names["line"].custom_id, names["line"].result.type) == ("first", "succeeded")


SEEN = {"rewards.md": _rewards, "messages.md": _messages}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("page", [name for name, lines in CURL.items() if lines])
def test_every_call_of_curl_is_answered(page, asked, desk):
    environment = {**os.environ, "URL": asked.url, "KEY": asked.key}
    upload, said = "", ""
    for line in CURL[page]:
        script = here(line, asked).replace("upload_...", upload)
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert '"type":"error"' not in done.stdout.replace(" ", ""), done.stdout
        if begun := re.search(r"/(upload_\w+)", done.stdout):
            upload = begun[1]
        said += done.stdout
    with asked.http() as http:  # what was sent in pieces is whole
        file = re.findall(r"ropewalk-file-id: (file_\w+)", said)[-1]
        assert http.get(f"/v1/files/{file}/content").content == (desk / "talk.mp4").read_bytes()


def test_the_pages_have_blocks_and_calls_and_what_is_not_run_is_there():
    assert sum(map(len, PYTHON.values())) > 9
    assert sum(map(len, CURL.values())) > 2
    assert [name for name in NOT_RUN if not PYTHON[name]] == []


# Calls of the official package that are routes here; the rest has a line of the page.
ANSWERED = """
    models.list models.retrieve fine_tuning.jobs.cancel fine_tuning.jobs.checkpoints.list fine_tuning.jobs.create fine_tuning.jobs.list
    fine_tuning.jobs.list_events fine_tuning.jobs.pause fine_tuning.jobs.resume fine_tuning.jobs.retrieve files.content files.create
    files.delete files.list files.retrieve files.retrieve_content files.wait_for_processing chat.completions.create
    chat.completions.parse chat.completions.stream completions.create embeddings.create
""".split()


def calls(resource, name):
    """The names of all that a resource of the package can be asked."""
    for part in dir(resource):
        found = getattr(resource, part) if not part.startswith(("_", "with_")) else None
        if type(found).__module__.startswith("openai.resources"):
            yield from calls(found, f"{name}.{part}")
        elif callable(found):
            yield f"{name}.{part}"


def test_every_call_of_openais_package_is_answered_or_has_its_line(asked):
    page = next(page for page in PAGES if page.name == "openai.md").read_text(encoding="utf-8")
    with openai.OpenAI(base_url=f"{asked.url}/openai/v1", api_key=asked.key, max_retries=0) as client:
        resources = ("models", "fine_tuning", "files", "chat", "completions", "embeddings")
        missing = [call for name in resources for call in calls(getattr(client, name), name) if call not in ANSWERED]
        assert [call for call in missing if f"`{call}`" not in page and f"`{call.rpartition('.')[0]}`" not in page] == []
        with pytest.raises(openai.APIStatusError) as refused:
            client.models.delete("answers")
    assert refused.value.status_code in (404, 405)
