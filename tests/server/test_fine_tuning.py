"""Fine-tuning jobs through the official OpenAI client against a real server: every method, what a client may not say, other tenants."""

import json
import time

import openai
import pytest

from ropewalk.quickstart import facts

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


def test_a_job_becomes_a_model_that_answers(tuned):
    file = put(tuned)
    job = begin(tuned, file, suffix="house", seed=7, metadata={"team": "a"}, method={"type": "supervised"})
    print(job)
    done = at(tuned, job.id, "succeeded")
    print(done, events(tuned, job.id))
