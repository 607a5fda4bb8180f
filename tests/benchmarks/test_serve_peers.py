"""What the comparison of chat servers rests on: documents of so many tokens, and the CPU time of a process and its children."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
BUSY = "import time; e = time.process_time() + {}\nwhile time.process_time() < e: pass\n"


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_a_document_has_its_tokens_whoever_reads_it():
    from peers.chat_assets import VOCABULARY, document, tokenizer

    made = tokenizer()
    assert made.get_vocab_size() == VOCABULARY
    for count in (12, 100, 4096):
        text = document(count, seed=1)
        assert len(made.encode(text).ids) == count
        assert made.decode(made.encode(text).ids) == text
    assert document(100, 1) != document(100, 2)


def test_the_clock_counts_a_process_and_children_that_have_ended(tmp_path):
    from peers.chat_servers import ChatServer

    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY.format(0.3)!r}])"
    code = f"{BUSY.format(0.2)}{child}\nprint('done', flush=True)\nimport time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"done\n"
            server = ChatServer("x", "1", process, tmp_path / "log", "", "m")
            spent = server.cpu_seconds()
            assert 0.5 <= spent < 5
            begun = time.monotonic()
            server.idle()
            assert time.monotonic() - begun < 30
            assert server.cpu_seconds() - spent < 0.1
        finally:
            process.kill()


def test_pieces_and_usage_are_read_in_both_protocols():
    from peers.chat_servers import _of_completion, _of_messages

    assert _of_messages({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}}) == ("a", {})
    assert _of_messages({"type": "message_start", "message": {"usage": {"input_tokens": 3}}}) == ("", {"input_tokens": 3})
    assert _of_completion({"choices": [{"delta": {"content": "a"}}]}) == ("a", {})
    assert _of_completion({"choices": [], "usage": {"completion_tokens": 2}}) == ("", {"completion_tokens": 2})


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (b'{"error": {"message": "no\\nmore"}}', "no"),
        (b'{"detail": "not here"}', "not here"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"", "an error without a word"),
    ],
)
def test_the_first_line_of_an_error_is_told(said, sentence):
    from peers.chat_servers import _sentence

    assert _sentence(said) == sentence


def test_the_last_error_of_a_log_is_found(tmp_path: Path):
    from peers.chat_servers import last_error

    log = tmp_path / "log"
    log.write_text("fine\nValueError: first\n  more\nKeyError: 'x'\nbye\n")
    assert last_error(log) == "KeyError: 'x'"


def test_gates_are_of_ours_alone():
    from serve_peers import gates, report

    ours = {"same_text": True, "read": 4125}
    assert all(gates({"qwen3": {"ropewalk": ours, "llama_cpp": {"error": "died"}}}).values())
    assert not all(gates({"qwen3": {"ropewalk": ours | {"read": 0}}}).values())
    assert not all(gates({"qwen3": {"ropewalk": {"error": "died"}}}).values())
    assert "died" in report(json.loads(json.dumps({"qwen3": {"llama_cpp": {"error": "died"}}})))
