"""Two server processes over one PostgreSQL and one S3, each with a data folder of its own, as on two machines.

The flows of files, resumable uploads, messages, batches and jobs are those of a single server: the same tests, whose requests go to the two
in turns. Left out are tests of what each server has for itself (its engine's memory, its limit of requests per minute) and of what is
refused before anything is looked up.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import anthropic
import openai
import pytest

from server.conftest import wait_until
from server.pair import Pair, pair
from server.test_batches import test_a_batch_is_answered_request_by_request as of_batches
from server.test_batches import (  # noqa: F401
    test_batches_are_paged_newest_first_and_deleted_once_they_have_ended,
)
from server.test_extensions import (  # noqa: F401
    http,
    test_a_receipt_verifies_with_the_key_that_the_server_gives,
    test_a_users_bytes_are_shared_with_no_other_user,
    test_details_tell_the_digest_the_tags_and_who_shares_the_bytes,
    test_many_are_deleted_each_with_its_receipt_or_its_error,
    test_tags_are_replaced_and_found,
    test_usage_is_told_for_the_workspace_the_key_and_the_user,
)
from server.test_files import (  # noqa: F401
    shelf,
    stored,
    test_a_client_that_goes_away_leaves_nothing,
    test_a_cursor_is_of_no_use_elsewhere_or_changed,
    test_a_form_cut_short_leaves_nothing,
    test_a_key_does_what_its_rights_say,
    test_a_list_in_the_older_shape_has_its_keys_and_cursors,
    test_a_list_is_paged_by_its_cursor,
    test_a_page_stays_where_it_was_when_files_come_and_go,
    test_a_path_and_a_stream_and_a_tuple_can_be_uploaded,
    test_a_workspace_may_keep_its_uploads_from_being_downloaded,
    test_an_expired_file_is_listed_and_cannot_be_read,
    test_an_upload_sent_again_after_no_answer_is_one_file,
    test_an_upload_to_the_last_byte_of_a_quota_fits,
    test_another_workspaces_file_answers_like_none,
    test_files_are_found_by_their_ids,
    test_metadata_has_the_shape_of_the_documentation,
    test_one_range_is_given,
    test_tags_and_digest_show_only_when_asked_for,
    test_uploads_at_once_are_all_there,
    test_users_of_a_workspace_see_their_own_files,
    test_what_is_deleted_is_gone,
    test_what_is_uploaded_comes_back,
    test_what_the_client_has_already_is_not_sent_again,
)
from server.test_fine_tuning import (  # noqa: F401
    begin,
    events,
    put,
    test_a_job_becomes_a_model_that_answers_its_own_workspace_at_once,
    tuned,
)
from server.test_messages import (  # noqa: F401
    BOOK,
    question,
    sdk,
    stats,
    test_a_pdf_in_the_request_is_read,
    test_a_stream_has_its_events_in_order_and_a_ping,
    test_a_text_is_answered,
    test_a_tool_that_must_be_called_is_called_and_its_answer_is_taken,
    test_an_alias_is_followed_when_it_is_shipped_anew,
    test_an_unknown_model_is_not_found,
    test_another_workspace_finds_neither_the_file_nor_what_was_read,
    test_of_a_file_beyond_the_context_the_chunks_are_shown_that_the_question_leads_to,
    test_the_same_is_streamed,
    test_the_same_text_in_the_request_gives_the_same_reply,
    test_thinking_comes_back_only_as_it_was_signed,
)
from server.test_openai_files import (  # noqa: F401
    place,
    test_a_file_is_the_same_under_both_apis,
    test_deletions_under_openai_leave_receipts,
    test_files_are_listed_by_purpose_and_in_either_order_page_by_page,
)
from server.test_resumable import (  # noqa: F401
    test_anothers_upload_answers_like_none,
    test_bytes_for_another_place_are_refused,
    test_bytes_of_three_requests_become_one_file,
    test_bytes_that_come_with_the_creation_count,
    test_bytes_with_a_wrong_checksum_do_not_count,
    test_of_two_who_send_the_same_place_one_counts,
    test_the_sweep_leaves_an_upload_alone_and_nothing_is_left_of_a_finished_one,
    test_the_whole_length_is_reserved_until_the_file_is_there_or_the_upload_is_ended,
    test_what_came_before_the_connection_broke_is_kept,
    tus,
)


@pytest.fixture(scope="module")
def server(root_key, tmp_path_factory, postgres_server, bucket_server):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket_server.environment.items():
            patch.setenv(name, value)
        folder = tmp_path_factory.mktemp("machines")
        with pair(folder, postgres_server.new_database(), bucket_server.new_url()) as found:
            yield found


@pytest.fixture(scope="module")
def asked(server, tiny):
    server.app.state.registry.publish_base("tiny", tiny)
    server.app.state.registry.ship("answers", "tiny")
    return server


def test_a_batch_is_answered_request_by_request(asked):
    _, key = asked.workspace("batches")
    with asked.sdk(key) as client:
        of_batches(client)


def test_a_file_that_was_stored_at_one_is_read_asked_and_deleted_at_the_other(asked: Pair):
    text = BOOK + "of two servers"
    one, other = asked.only(0), asked.only(1)
    with one.sdk() as here, other.sdk(default_headers={"anthropic-version": "2023-06-01"}) as there:
        file = here.files.upload(file=("book.txt", text.encode(), "text/plain"))
        assert there.files.retrieve_metadata(file.id) == file
        assert there.files.download(file.id).read() == text.encode()
        asks = question({"type": "file", "file_id": file.id})
        before = stats(asked)["memory_used"] if _is_asked(asked) else 0
        said = [client.messages.create(**{**asks, "extra_body": {}}) for client in (here, there)]
        assert min(reply.usage.output_tokens for reply in said) > 0
        assert there.messages.create(**asks).usage.cache_read_input_tokens > 100
        asked.run(asked.app.state.models.flush())
        kept = {path for path in asked.data.glob("*/prefixes/**/*") if path.is_file()}
        assert {path.relative_to(asked.data).parts[0] for path in kept} == {"one", "two"}
        grown = stats(asked)["memory_used"]
        assert grown > before
        with other.http(**{"x-ropewalk-extensions": "true"}) as http:
            receipt = http.delete(f"/v1/files/{file.id}").json()["receipt"]
        with one.http() as http:
            assert http.get("/v1/files/receipt_key").json()["key_id"] == receipt["key_id"]
        assert {"kv", "text"} <= set(receipt["derived"])
        for client in (here, there):
            with pytest.raises(anthropic.NotFoundError):
                client.files.download(file.id)
            with pytest.raises(anthropic.NotFoundError):
                client.messages.create(**{**asks, "extra_body": {}})
        wait_until(lambda: stats(asked)["memory_used"] < grown)  # the other has deleted it, and this one looks
        gone = kept - {path for path in asked.data.glob("*/prefixes/**/*") if path.is_file()}
        assert {path.relative_to(asked.data).parts[0] for path in gone} == {"one", "two"}


def _is_asked(asked):
    return any(Path(folder).name == "tiny" for folder in asked.run(asked.app.state.models.stats()))


def test_a_job_whose_server_is_killed_goes_on_with_the_other(asked: Pair):
    """The last of this file: afterwards there is one server."""
    _, key = asked.workspace("killed")
    one = asked.only(0)
    runner = one.app.state.jobs
    runner.options = replace(runner.options, at_once=0)
    with openai.OpenAI(base_url=f"{one.url}/v1", api_key=key, max_retries=0) as client:
        client.house, client.key = one, key
        job = begin(client, put(client), suffix="both", ropewalk={"max_steps": 150, "save_steps": 5})
        kept = one.store.archives.find
        wait_until(lambda: any(name.startswith("resume") for name in one.run(kept(job.id))))
        asked.second.kill()
        asked.second.wait()
        runner.options = replace(runner.options, at_once=1)
        late = time.monotonic() + 120
        while (done := client.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
            assert time.monotonic() < late, (done, events(client, job.id))
            time.sleep(0.1)
        told = list(client.fine_tuning.jobs.list_events(job.id, limit=100))[::-1]
        assert [event.data["step"] for event in told if event.type == "metrics"] == list(range(1, 151))
        assert [event.message for event in told].count("The job goes on") == 1
        kept_steps = [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(job.id)]
        assert kept_steps == [150, 145, 140, 135]
        with one.http(key) as http:
            assert "in 150 steps" in http.get(f"/v1/fine_tuning/jobs/{job.id}/log").text
        folder = one.app.state.jobs.folder_of(job.id)
        assert "from step" in folder.log.read_text()  # not begun anew by the one that took it over
        first = json.loads(folder.events.read_text().splitlines()[0])
        assert first["event"] == "start"  # written by the server that is dead
        with one.sdk(key) as mine:
            said = mine.messages.create(model=done.fine_tuned_model, max_tokens=2, messages=[{"role": "user", "content": "Hi"}])
        assert said.usage.output_tokens > 0
