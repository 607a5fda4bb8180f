"""Fine-tuning jobs through the official OpenAI client against a real server: every method, what a client may not say, other tenants."""

import csv
import io
import json
import secrets
import time
from dataclasses import replace

import anthropic
import openai
import pyarrow
import pyarrow.parquet
import pytest

from ropewalk.errors import BadInput
from ropewalk.quickstart import facts
from ropewalk.server import job_judges
from ropewalk.tenants.workspaces import find_workspace

PATIENCE = 120.0
OPENAI = "/v1"  # the other prefix is of the same handlers; see test_both_prefixes_are_the_same_jobs


@pytest.fixture(scope="module")
def tuned(asked):
    """A workspace of its own, and OpenAI's client in it."""
    _, key = asked.workspace("fine-tuning")
    with openai.OpenAI(base_url=asked.url + OPENAI, api_key=key, max_retries=0) as client:
        client.house, client.key = asked, key
        yield client


def put(client, content=None, name="rows.jsonl"):
    """The id of a file of rows."""
    if content is None:
        content = "".join(json.dumps(row) + "\n" for row in rows())
    with client.house.http(client.key) as http:
        return http.post("/v1/files", files={"file": (name, content)}).json()["id"]


def rows(count=24):
    made = facts.questions(facts.split()[0], 6)[:count]
    return [
        {"messages": [{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.answer}]} for one in made
    ]


SMALL = {"sequence_len": 256, "max_steps": 4, "lora_r": 2, "num_threads": 1, "bf16": False, "save_steps": 2}


def begin(client, file, **more):
    own = {**SMALL, **more.pop("ropewalk", {})}
    return client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"ropewalk": own}, **more)


def at(client, id, *states):
    """The job, once it is in one of these states."""
    late = time.monotonic() + PATIENCE
    while (job := client.fine_tuning.jobs.retrieve(id)).status not in states:
        assert time.monotonic() < late, (job, events(client, id))
        assert job.status not in ("failed", "cancelled", "succeeded"), (job.error, events(client, id))
        time.sleep(0.1)
    return job


def events(client, id):
    return [one.message for one in client.fine_tuning.jobs.list_events(id, limit=100)][::-1]


def test_a_job_becomes_a_model_that_answers_its_own_workspace_at_once(tuned):
    file, held = put(tuned), put(tuned, json.dumps(rows(30)[-1]) + "\n")
    asked = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 3}}}
    job = begin(tuned, file, validation_file=held, suffix="house", seed=7, metadata={"team": "a"}, method=asked)
    assert (job.object, job.status, job.model, job.seed, job.metadata) == (
        "fine_tuning.job",
        "queued",
        "tiny",
        7,
        {"team": "a"},
    )
    assert (job.training_file, job.validation_file, job.error, job.fine_tuned_model) == (file, held, None, None)
    assert job.method.supervised.hyperparameters.model_dump() == {
        "n_epochs": 2,
        "batch_size": 3,
        "learning_rate_multiplier": 1.0,
    }

    with tuned.house.http(tuned.key) as http, http.stream("GET", f"/v1/fine_tuning/jobs/{job.id}/events?stream=true") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    told = [json.loads(line) for line in lines]
    done = tuned.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.error) == ("succeeded", None), told
    assert [one["data"]["step"] for one in told if one["message"].startswith("Step") and "valid_loss" not in one["data"]] == [
        1,
        2,
        3,
        4,
    ]
    assert told[0]["message"].startswith("Created")
    assert "completed" in told[-1]["message"]
    listed = list(tuned.fine_tuning.jobs.list_events(job.id, limit=3))  # page by page
    assert [one.id for one in listed][::-1] == [one["id"] for one in told]
    assert {one.type for one in listed} == {"message", "metrics"}

    assert done.fine_tuned_model == f"ft:tiny:house:{job.id[-8:]}"
    assert done.trained_tokens > 0
    assert done.finished_at >= done.created_at
    kept = tuned.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [one.step_number for one in kept] == [4, 2]
    assert kept[0].metrics.train_loss == next(one["data"]["train_loss"] for one in told if one["data"].get("step") == 4)
    assert kept[0].metrics.valid_loss > 0
    assert [one.id for one in tuned.fine_tuning.jobs.checkpoints.list(job.id, limit=1)] == [one.id for one in kept]

    lineage = tuned.house.app.state.registry.resolve(done.fine_tuned_model).lineage
    assert (lineage["file"], lineage["job"], lineage["config"]) == (f"{file} {held}", job.id, job.ropewalk["config_digest"])
    assert "torch=" in lineage["versions"]
    with tuned.house.sdk(tuned.key) as mine:
        for name in (done.fine_tuned_model, kept[1].fine_tuned_model_checkpoint):
            said = mine.messages.create(model=name, max_tokens=2, messages=[{"role": "user", "content": "Hi"}])
            assert said.usage.output_tokens > 0
        assert done.fine_tuned_model in [one.id for one in mine.models.list(limit=100)]
    _, key = tuned.house.workspace("another")
    with tuned.house.sdk(key) as theirs:
        assert done.fine_tuned_model not in [one.id for one in theirs.models.list(limit=100)]
        for call in (
            lambda: theirs.models.retrieve(done.fine_tuned_model),
            lambda: theirs.messages.create(
                model=done.fine_tuned_model, max_tokens=2, messages=[{"role": "user", "content": "Hi"}]
            ),
            lambda: theirs.messages.count_tokens(model=done.fine_tuned_model, messages=[{"role": "user", "content": "Hi"}]),
        ):
            with pytest.raises(anthropic.NotFoundError):
                call()
    words = rows(1)[0]["messages"][1]["content"].encode()
    folders = list(tuned.house.data.glob(f"**/jobs/{job.id}"))
    assert folders
    for folder in folders:
        assert [path for path in folder.rglob("*") if path.is_file() and words in path.read_bytes()] == []
        assert not (folder / "prepared").exists()


def test_a_csv_file_is_learnt_from_and_a_parquet_file_evaluated_on(tuned):
    table = [{"instruction": one.prompt, "output": one.answer} for one in facts.questions(facts.split()[0], 6)[:12]]
    lines = io.StringIO()
    writer = csv.DictWriter(lines, ["instruction", "output"])
    writer.writeheader()
    writer.writerows(table[:9])
    held = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table[9:]), held)
    file, validation = put(tuned, lines.getvalue(), "rows.csv"), put(tuned, held.getvalue(), "held.parquet")
    own = {"dataset": {"type": "alpaca"}, "max_steps": 1, "save_steps": 1, "sample_packing": False, "micro_batch_size": 1}
    job = begin(tuned, file, validation_file=validation, ropewalk=own)
    assert at(tuned, job.id, "succeeded").ropewalk["device_seconds"] > 0
    assert "The files are valid: 9 rows" in "\n".join(events(tuned, job.id))
    (kept,) = tuned.fine_tuning.jobs.checkpoints.list(job.id).data
    assert kept.metrics.valid_loss > 0


def test_a_jobs_configuration_is_told_as_it_is_given_and_makes_the_same_job(tuned):
    runner = tuned.house.app.state.jobs
    options, runner.options = runner.options, replace(runner.options, at_once=0)  # none of these is to run
    judge = {"kind": "judge", "model": "answers", "rubric": "Is it short?"}
    parameters = {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 0.5}
    try:
        for method, own in (
            ({"type": "supervised", "supervised": {"hyperparameters": parameters}}, {"dataset": {"train_on_eos": "last"}}),
            ({"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}, {"rl": "ipo"}),
            ({"type": "reinforcement"}, {"trl": {"reward_funcs": [judge, "exact"], "num_generations": 2}}),
        ):
            file, held = put(tuned), put(tuned, json.dumps(rows(30)[-1]) + "\n")
            first = begin(tuned, file, validation_file=held, method=method, ropewalk=own)
            told = tuned.fine_tuning.jobs.retrieve(first.id).ropewalk["config"]
            assert told["sequence_len"] == SMALL["sequence_len"]
            places = (str(tuned.house.data), "base_model", "output_dir", "dataset_prepared_path", "ropewalk:", file, held)
            assert not [place for place in places if place in json.dumps(told)]
            asked = {"model": "tiny", "training_file": file, "validation_file": held, "seed": first.seed}
            again = tuned.fine_tuning.jobs.create(**asked, method={"type": method["type"]}, extra_body={"ropewalk": told})
            assert again.ropewalk["config_digest"] == first.ropewalk["config_digest"]
            assert again.ropewalk["config"] == told
            for job in (first, again):
                tuned.fine_tuning.jobs.cancel(job.id)
    finally:
        runner.options = options


def test_a_preference_job_reads_openais_rows_and_stops_where_it_is_told_to(tuned):
    pairs = [
        {
            "input": {"messages": one["messages"][:1]},
            "preferred_output": one["messages"][1:],
            "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
        }
        for one in rows(4)
    ]
    file = put(tuned, "".join(json.dumps(pair) + "\n" for pair in pairs))
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}}
    job = begin(tuned, file, method=method, ropewalk={"max_steps": 2000})
    assert job.method.dpo.hyperparameters.beta == 0.2
    at(tuned, job.id, "running")
    tuned.fine_tuning.jobs.pause(job.id)
    assert at(tuned, job.id, "paused").status == "paused"
    runner = tuned.house.app.state.jobs
    options, runner.options = runner.options, replace(runner.options, at_once=0)  # it need not begin again for this
    try:
        assert tuned.fine_tuning.jobs.resume(job.id).status == "queued"
        assert tuned.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    finally:
        runner.options = options
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        tuned.fine_tuning.jobs.cancel(job.id)


def test_a_row_that_cannot_be_used_is_told_as_the_files_fault(tuned):
    job = begin(tuned, put(tuned, json.dumps({"text": "no messages"}) + "\n"))
    late = time.monotonic() + PATIENCE
    while (failed := tuned.fine_tuning.jobs.retrieve(job.id)).status != "failed":
        assert time.monotonic() < late, failed
        time.sleep(0.1)
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert "messages" in failed.error.message
    with tuned.house.http(tuned.key) as http:
        assert "messages" in http.get(f"/v1/fine_tuning/jobs/{job.id}/log").text
        http.delete(f"/v1/files/{job.training_file}").raise_for_status()
        assert http.get(f"/v1/fine_tuning/jobs/{job.id}/log").text == ""
    assert "messages" not in tuned.fine_tuning.jobs.retrieve(job.id).error.message


NO_KEYS = {
    "output_dir": "/tmp/x",
    "base_model": "/etc",
    "trust_remote_code": True,
    "report_to": "wandb",
    "wandb_project": "x",
    "use_mlflow": True,
    "mlflow_tracking_uri": "http://example.com",
    "hub_model_id": "a/b",
    "dataset_prepared_path": "/tmp",
    "datasets": [{"path": "/etc/passwd"}],
    "test_datasets": [{"path": "a/hub-set"}],
    "pretraining_dataset": "a/hub-set",
    "tokenizer_config": "a/b",
    "lora_model_dir": "/srv/adapter",
    "resume_from_checkpoint": "/srv/run",
    "chat_template_jinja": "{{ 1 }}",
    "chat_template": "jinja",
    "lora_target_modules": "(a+)+$",
    "attn_implementation": "somebody/kernel",
    "model_config": {"auto_map": {}},
    "plugins": ["x.y"],
    "adapter": None,
    "sequence_len": 10**9,
    "max_steps": -1,
    "learning_rate": "fast",
    "rl": "grpo",
    "trl": {"reward_funcs": ["os.system"]},
}


@pytest.mark.parametrize("others", [False, True], ids=["own", "another tenant"])
def test_a_client_may_name_no_place_no_code_and_nothing_of_anothers(tuned, others):
    file, client = put(tuned), tuned
    if others:
        _, key = tuned.house.workspace(f"another {secrets.token_hex(4)}")
        client = tuned.with_options(api_key=key)
        with pytest.raises(openai.NotFoundError):
            begin(client, file)
        client.house, client.key = tuned.house, key
        file, foreign = put(client), file
        with pytest.raises(openai.NotFoundError):
            begin(client, file, validation_file=foreign)
    for key, value in NO_KEYS.items():
        with pytest.raises(openai.BadRequestError, match=r"ropewalk|learning_rate"):
            begin(client, file, ropewalk={key: value})
    for key, value in {"path": "/etc/passwd", "name": "x", "data_files": ["/etc/passwd"], "chat_template_jinja": "/x"}.items():
        with pytest.raises(openai.BadRequestError, match=f"ropewalk.dataset.{key}"):
            begin(client, file, ropewalk={"dataset": {key: value}})
    for model in ("Qwen/Qwen3-0.6B", "/etc", "../base", str(tuned.house.data), "ft:tiny:house:none"):
        with pytest.raises(openai.BadRequestError, match="no base that is published"):
            client.fine_tuning.jobs.create(model=model, training_file=file)
    for name in ("/etc/passwd", "a/hub-set", "file_none", "../x"):
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.create(model="tiny", training_file=name)
    for more in (
        {"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]},
        {"suffix": "../up"},
        {"suffix": "a" * 65},
        {"seed": -1},
        {"metadata": {"a": "b" * 513}},
        {"method": {"type": "supervised", "dpo": {}}},
        {"method": {"type": "other"}},
        {"hyperparameters": {"n_epochs": 0}},
        {"hyperparameters": {"n_epochs": 51}},
        {"hyperparameters": {"gradient": 1}},
        {"hyperparameters": {"n_epochs": 1}, "method": {"type": "supervised"}},
        {"extra_body": {"output_dir": "/tmp"}},
    ):
        with pytest.raises(openai.BadRequestError):
            client.fine_tuning.jobs.create(model="tiny", training_file=file, **more)
    picture = put(client, b"\x89PNG", "a.png")
    with pytest.raises(openai.BadRequestError, match="cannot be trained on by its name"):
        begin(client, picture)
    assert [job for job in client.fine_tuning.jobs.list() if job.training_file == file] == []


@pytest.mark.parametrize(
    "grader", [{"type": "python", "name": "x", "source": "def grade(a, b): return 1"}, {"type": "string_check", "name": "x"}]
)
def test_rewards_are_never_code_of_a_clients(tuned, grader):
    method = {"type": "reinforcement", "reinforcement": {"grader": grader}}
    with pytest.raises(openai.BadRequestError, match="built in"):
        begin(tuned, put(tuned), method=method)
    for reward in (
        "os.system",
        "a.py:f",
        "judge",
        {"kind": "judge", "model": "tiny", "url": "http://127.0.0.1:1"},
        {"kind": "judge", "model": "tiny", "key_env": "HOME"},
        {"kind": "judge", "model": "tiny", "cache": "/tmp/marks"},
        {"kind": "judge", "model": "tiny", "least": 5, "most": 5},
        {"kind": "judge", "model": "tiny", "rubric": 7},
        {"kind": "judge"},
        {"kind": "model", "path": "/x"},
        {"kind": "code"},
        {"kind": "exact", "function": "x"},
        {"kind": "format", "path": "/x"},
        {"kind": "schema", "schema": 7},
    ):
        with pytest.raises(openai.BadRequestError, match=r"reward_funcs\.0"):
            begin(tuned, put(tuned), method={"type": "reinforcement"}, ropewalk={"trl": {"reward_funcs": [reward]}})


def test_a_judge_is_a_model_that_the_asker_could_ask(tuned, tmp_path):
    house, (workspace, _) = tuned.house, tuned.house.workspace("judges of others")
    (tmp_path / "adapter").mkdir()
    house.app.state.registry.publish_adapter("theirs", tmp_path / "adapter", "tiny", {"job": "x", "workspace": workspace.id})
    method = {"type": "reinforcement"}
    for name in ("nobody", "theirs", "nobody/such:model"):
        with pytest.raises(openai.BadRequestError, match=f"the judge '{name}' is no model that is served here"):
            begin(tuned, put(tuned), method=method, ropewalk={"trl": {"reward_funcs": [{"kind": "judge", "model": name}]}})
    caller = house.run(house.store.local_caller("fine-tuning"))
    with pytest.raises(BadInput, match="makes room for the job"):  # on a GPU
        house.run(job_judges.check(house.app.state.models, caller, ["tiny"], takes_turns=True))


def test_both_prefixes_are_the_same_jobs_and_lists_are_paged(asked):
    _, key = asked.workspace("pages of jobs")
    with openai.OpenAI(base_url=asked.url + "/openai/v1", api_key=key, max_retries=0) as client:
        client.house, client.key = asked, key
        runner = asked.app.state.jobs
        options, runner.options = runner.options, replace(runner.options, at_once=0)  # none of these is to run
        try:
            ids = [begin(client, put(client), metadata={"n": str(n % 2)}).id for n in range(5)][::-1]
            assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == ids
            assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == ids[1::2]
            with pytest.raises(openai.NotFoundError):
                client.fine_tuning.jobs.list(after="ftjob_none")
            with pytest.raises(openai.BadRequestError, match="only a paused one"):
                client.fine_tuning.jobs.resume(ids[0])
            assert client.fine_tuning.jobs.pause(ids[0]).status == "paused"
            for id in ids:
                assert client.fine_tuning.jobs.cancel(id).status == "cancelled"
            with asked.http(key) as http:
                assert http.get("/v1/fine_tuning/jobs").json()["data"][0]["id"] == ids[0]
            reader = asked.new_key(asked.run(_workspace(asked, "pages of jobs")), rights=frozenset({"read"}))
            with openai.OpenAI(base_url=asked.url + "/v1", api_key=reader, max_retries=0) as looking:
                assert looking.fine_tuning.jobs.retrieve(ids[0]).status == "cancelled"
                with pytest.raises(openai.PermissionDeniedError):
                    looking.fine_tuning.jobs.cancel(ids[0])
        finally:
            runner.options = options


async def _workspace(house, name):
    async with house.store.database.reading() as connection:
        return (await find_workspace(connection, name)).id


def test_while_a_job_has_the_device_the_engine_is_gone_and_comes_back_by_itself(asked):
    models, question = (
        asked.app.state.models,
        {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]},
    )
    with asked.sdk() as client:
        client.messages.create(**question)
        (base,) = (one for folder, one in models._bases.items() if folder.name == "tiny")
        asked.run(models.lend())
        try:
            assert not base.client.running
            with pytest.raises(anthropic.InternalServerError, match="a training job has the device") as refused:
                client.messages.create(**question)
            assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (529, "15")
        finally:
            asked.run(models.take_back())
        assert client.messages.create(**question).usage.output_tokens == 1


def test_a_job_learns_by_rewards_that_are_built_in_and_by_a_judge(tuned):
    held = [{"messages": one["messages"]} for one in rows(8)]
    file = put(tuned, "".join(json.dumps(row) + "\n" for row in held))
    trl = {
        "reward_funcs": [
            {"kind": "length", "unit": "words", "most": 3},
            {"kind": "exact"},
            {"kind": "judge", "model": "answers", "rubric": "Is it short?", "least": 0, "most": 4, "name": "short"},
        ],
        "num_generations": 2,
        "max_completion_length": 8,
    }
    job = begin(tuned, file, method={"type": "reinforcement"}, ropewalk={"trl": trl, "max_steps": 2})
    assert at(tuned, job.id, "succeeded").method.type == "reinforcement"
    told = [one.data for one in tuned.fine_tuning.jobs.list_events(job.id) if one.type == "metrics"]
    assert {one["step"] for one in told} == {1, 2}
    assert all(0 <= one["reward"] <= 3 for one in told)
    assert all(0 <= one["rewards/short"] <= 1 for one in told)
    registry = tuned.house.app.state.registry
    assert registry.resolve(tuned.fine_tuning.jobs.retrieve(job.id).fine_tuned_model).lineage["reward_model"] == "answers"
    folder = tuned.house.data / "jobs" / job.id
    words = [one["messages"][0]["content"][:40].encode() for one in held]
    assert [path for path in folder.rglob("*") if path.is_file() and any(word in path.read_bytes() for word in words)] == []
