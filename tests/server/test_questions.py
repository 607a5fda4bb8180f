"""Questions and answers out of a file, over a real server: a batch that another server's model answers becomes a file of rows."""

import json
import re
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest

from ropewalk.batches.ledger import drop
from ropewalk.cli import main
from ropewalk.compare import judges
from ropewalk.compare.candidates import add_candidate
from ropewalk.config.serving import Remote, ServedModel, Serving
from ropewalk.files import questions as question_jobs
from ropewalk.server.settings import ServerSettings
from server.conftest import running, wait_until

TEXT = "\n\n".join(
    f"# {place}\n\nThe lighthouse of {place} was built in {year}. It is {high} metres high. {'Gulls cry above it. ' * 12}"
    for place, year, high in (("Pellworm", 1907, 41), ("Amrum", 1875, 42), ("Sylt", 1856, 38))
)


class Writer(BaseHTTPRequestHandler):
    """A server of chat completions whose model writes one row that is borne out and one that is not."""

    held = threading.Event()  # set: it answers
    garbage = False
    asked: list[dict] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).asked.append(body)
        assert type(self).held.wait(30)
        passage = re.search(r"<passage>\n(.*)\n</passage>", body["messages"][-1]["content"], re.DOTALL)[1]
        if found := re.search(r"lighthouse of (\w+) was built in (\d+)", passage):
            rows = [
                {"question": f"When was the lighthouse of {found[1]} built?", "answer": f"In {found[2]}.", "quote": found[0]}
            ]
        else:
            rows = []
        rows.append({"question": "Who keeps it?", "answer": "Nobody knows.", "quote": "kept by nobody at all"})
        text = "no rows" if type(self).garbage else json.dumps({"rows": rows})
        chunks = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 20}},
        ]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def writer():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Writer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def served(root_key, writer, tiny, tmp_path_factory):
    serving = Serving({"writer": ServedModel(remote=Remote("openai", writer, "big"))})
    with running(tmp_path_factory.mktemp("questions"), settings=ServerSettings(serving=serving)) as found:
        found.app.state.registry.publish_base("tiny", tiny)
        yield found


@pytest.fixture
def api(served):
    Writer.garbage = False
    Writer.held.set()
    Writer.asked.clear()
    _, key = served.workspace(f"questions {secrets.token_hex(4)}")
    with served.http(key) as client:
        yield client


def begun(api, **more):
    """A file, and the job of its questions."""
    file = api.post("/v1/files", files={"file": ("towers.md", TEXT.encode(), "text/markdown")}).json()["id"]
    answer = api.post(f"/v1/files/{file}/questions", json={"model": "writer", "chunk_characters": 600, **more})
    assert answer.status_code == 200, answer.text
    return file, answer.json()


def ended(api, file, job):
    at = f"/v1/files/{file}/questions/{job['id']}"
    return wait_until(lambda: found if (found := api.get(at).json())["status"] != "in_progress" else None)


def test_a_file_becomes_questions_and_answers_with_their_lineage(served, api):
    file, job = begun(api)
    assert (job["status"], job["model"], job["file_id"]) == ("in_progress", "writer", file)
    done = ended(api, file, job)
    assert (done["status"], done["rows"], done["error"]) == ("succeeded", 3, None)
    assert done["dropped"] == done["chunks"] == len(Writer.asked)
    assert Writer.asked[0]["response_format"]["json_schema"]["schema"]["required"] == ["rows"]
    rows = [json.loads(line) for line in api.get(f"/v1/files/{done['output_file_id']}/content").text.splitlines()]
    assert [row["messages"][1]["content"] for row in rows] == ["In 1907.", "In 1875.", "In 1856."]
    assert {row["source"]["file"] for row in rows} == {file}
    details = api.get(f"/v1/files/{done['output_file_id']}/details").json()
    lineage = details["lineage"]
    assert (lineage["generator"], lineage["prompt"], lineage["model"]) == ("questions", "questions-1", "writer")
    assert (lineage["files"], lineage["job"], lineage["rows"]) == ([file], job["id"], 3)
    assert (details["filename"], details["purpose"]) == ("towers-questions.jsonl", "fine-tune")
    key = api.headers["x-api-key"]
    with openai.OpenAI(base_url=f"{served.url}/openai/v1", api_key=key, max_retries=0) as client:
        assert client.files.list(purpose="fine-tune").data[0].id == done["output_file_id"]
    assert [found["id"] for found in api.get(f"/v1/files/{file}/questions").json()["data"]] == [job["id"]]
    assert api.get("/v1/messages/batches").json()["data"] == []  # what it said is in the file


def test_the_rows_go_with_the_file_they_were_written_from(api):
    file, job = begun(api)
    made = ended(api, file, job)["output_file_id"]
    receipt = api.delete(f"/v1/files/{file}", headers={"x-ropewalk-extensions": "true"}).json()["receipt"]
    assert "questions" in receipt["derived"]
    assert api.get(f"/v1/files/{made}").status_code == 404
    assert api.get(f"/v1/files/{file}/questions/{job['id']}").status_code == 404
    assert api.get("/v1/files").json()["data"] == []


def test_who_wrote_the_rows_may_not_judge_what_learnt_from_them_even_after_they_are_gone(served, api):
    workspace, api.headers["x-api-key"] = served.workspace(f"generated {secrets.token_hex(4)}")
    caller = served.run(served.store.local_caller(workspace.id))
    file, job = begun(api)
    rows = ended(api, file, job)["output_file_id"]
    small = {"sequence_len": 256, "max_steps": 1, "lora_r": 2, "num_threads": 1, "bf16": False}
    asked = {"model": "tiny", "training_file": rows, "ropewalk": small}
    trained = api.post("/v1/fine_tuning/jobs", json=asked).json()
    assert trained["ropewalk"]["data_generator"] == ["writer"]
    at = f"/v1/fine_tuning/jobs/{trained['id']}"
    done = wait_until(lambda: found if (found := api.get(at).json())["finished_at"] else None)
    assert done["status"] == "succeeded", done["error"]
    name, state = done["fine_tuned_model"], served.app.state
    with httpx.Client(base_url=served.url, headers={"origin": served.url}, timeout=60) as browser:
        token = lambda page: re.search(r'name="csrf" value="([^"]+)"', page.text)[1]
        signed = browser.post("/login", data={"csrf": token(browser.get("/login")), "key": api.headers["x-api-key"]})
        assert signed.status_code == 303
        said = re.sub(r"<[^>]+>", "", browser.get("/models").text)
    assert "towers-questions.jsonl" in said
    assert re.search(r"towers-questions\.jsonl [0-9.]+ k?B, from towers\.md, writer", said), said[-3000:]

    async def refused():
        model, judge = [await add_candidate(served.store, state.models, caller, one) for one in (name, "writer")]
        return await judges.refusal(served.store, state.models, caller, judge, [model])

    assert served.run(refused()) == f"writer wrote training data of {name}"
    api.delete(f"/v1/files/{file}").raise_for_status()  # and its rows
    assert api.get(f"/v1/files/{rows}").status_code == 404
    assert state.registry.resolve(name).lineage["data_generator"] == "writer"
    assert served.run(refused()) == f"writer wrote training data of {name}"


def test_rows_that_are_deleted_by_themselves_leave_their_source(api):
    file, job = begun(api)
    made = ended(api, file, job)["output_file_id"]
    assert api.delete(f"/v1/files/{made}").status_code == 200
    assert api.delete(f"/v1/files/{file}").status_code == 200


def test_a_file_that_is_deleted_takes_along_what_was_still_being_asked(served, api):
    Writer.held.clear()
    file, job = begun(api)
    wait_until(lambda: Writer.asked)
    assert api.get(f"/v1/messages/batches/{job['batch_id']}").status_code == 200
    assert api.delete(f"/v1/files/{file}").status_code == 200
    assert api.get(f"/v1/messages/batches/{job['batch_id']}").status_code == 404
    Writer.held.set()
    assert api.get("/v1/files").json()["data"] == []


def test_a_model_that_writes_no_rows_is_told(api):
    Writer.garbage = True
    file, job = begun(api)
    done = ended(api, file, job)
    assert (done["status"], done["output_file_id"], done["rows"]) == ("failed", None, 0)
    assert "no row was written" in done["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "none"}, 404),
        ({}, 400),
        ({"model": "writer", "questions_per_chunk": 11}, 400),
        ({"model": "writer", "chunk_characters": 10}, 400),
        ({"model": "writer", "pages": 3}, 400),
    ],
)
def test_what_cannot_be_asked_is_refused_in_the_shape_of_the_claude_api(api, body, status):
    file = api.post("/v1/files", files={"file": ("a.txt", b"text", "text/plain")}).json()["id"]
    answer = api.post(f"/v1/files/{file}/questions", json=body)
    assert answer.status_code == status
    assert answer.json()["type"] == "error"


def test_answers_that_are_gathered_twice_become_one_file(api, monkeypatch):
    """As after a crash between the file and the row that names it."""
    ends, tries = question_jobs.end, []

    async def end(*arguments, **told):
        tries.append(told)
        if len(tries) == 1:
            raise RuntimeError("the process died")
        await ends(*arguments, **told)

    monkeypatch.setattr(question_jobs, "LEASE", 0)
    monkeypatch.setattr(question_jobs, "end", end)
    file, job = begun(api)
    done = ended(api, file, job)
    assert [told["output_file_id"] for told in tries] == [done["output_file_id"]] * 2
    assert len(api.get("/v1/files").json()["data"]) == 2


def test_a_job_whose_batch_is_deleted_ends(served, api, monkeypatch):
    monkeypatch.setattr(question_jobs, "LOST", 0)
    Writer.held.clear()
    file, job = begun(api)
    served.run(drop(served.store.database, job["batch_id"]))
    done = ended(api, file, job)
    Writer.held.set()
    assert (done["status"], done["output_file_id"]) == ("failed", None)
    assert "was deleted" in done["error"]


def test_the_command_line_writes_the_same_rows(root_key, writer, tmp_path, capsys, monkeypatch):
    Writer.garbage = False
    Writer.held.set()
    (tmp_path / "towers.md").write_text(TEXT)
    models = tmp_path / "models.yml"
    models.write_text(f"models:\n  writer: {{remote: openai, url: {writer}, model: big}}\n")
    store = ["--data", str(tmp_path / "data")]
    assert main(["files", "put", str(tmp_path / "towers.md"), *store]) == 0
    file = capsys.readouterr().out.strip()
    asked = ["files", "questions", file, "--model", "writer", "--models", str(models), "--chunk", "600", "--json", *store]
    assert main(asked) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["lineage"]["rows"], made["lineage"]["files"]) == (3, [file])
    out = Path(tmp_path / "rows.jsonl")
    assert main(["files", "get", made["id"], "--out", str(out), *store]) == 0
    assert len(out.read_text().splitlines()) == 3
    assert main(["files", "delete", file, *store]) == 0
    capsys.readouterr()
    assert main(["files", "list", *store]) == 0
    assert capsys.readouterr().out == ""
    assert main([*asked[:-3], "--each", "0", *store]) == 2
