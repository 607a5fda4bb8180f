"""What whoever runs the server asks it, what it writes down, and how it stops."""

import io
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from ropewalk.cli import main
from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.errors import BadInput
from ropewalk.files.tables import uploads
from ropewalk.server import logs, openapi
from ropewalk.server.serve import _greet, _is_loopback, listen
from ropewalk.server.settings import ServerSettings


def test_health_and_readiness_need_no_key(server):
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}


def test_a_server_whose_blobs_cannot_be_written_is_not_ready(start):
    with start() as found:

        def fail():
            raise OSError("read-only")

        found.store.blobs.check = fail  # a full or read-only disk cannot be had here
        answer = httpx.get(f"{found.url}/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "not ready", "reason": "blobs"})
        assert httpx.get(f"{found.url}/health").status_code == 200


def test_a_server_that_stops_is_not_ready(start):
    with start(settings=ServerSettings(drain_notice_seconds=1)) as found:
        with httpx.Client(base_url=found.url) as http:
            assert http.get("/ready").status_code == 200
            found.stop()
            while (answer := http.get("/ready")).status_code == 200:
                time.sleep(0.02)
        assert (answer.status_code, answer.json()) == (503, {"status": "not ready", "reason": "stopping"})


def test_metrics_count_requests_and_bytes_and_name_nobody(start):
    with start() as found, found.http() as http:
        http.post("/v1/files", files={"file": ("secret-name.txt", b"x" * 1000)})
        http.get("/v1/files/file_unknown")
        http.request("PATCH", "/v1/nowhere/secret-path")
        shown = http.get("/metrics").text
        workspace = http.get("/v1/files").headers["anthropic-workspace-id"]
    assert 'ropewalk_requests_total{method="POST",route="/v1/files",status="200"} 1.0' in shown
    assert 'ropewalk_requests_total{method="GET",route="/v1/files/{file_id}",status="404"} 1.0' in shown
    assert 'ropewalk_requests_total{method="any",route="none",status="404"} 1.0' in shown
    [received] = [line for line in shown.splitlines() if line.startswith('ropewalk_received_bytes_total{route="/v1/files"}')]
    assert 1000 < float(received.split()[1]) < 1500
    assert "process_resident_memory_bytes" in shown
    assert not any(secret in shown for secret in ("secret-name", "secret-path", workspace))


def test_the_sweep_runs_by_itself(start):
    with start(settings=ServerSettings(sweep_seconds=0.1)) as found:
        for _ in range(100):
            if 'ropewalk_sweeps_total{outcome="ok"}' in httpx.get(f"{found.url}/metrics").text:
                return
            time.sleep(0.05)
    raise AssertionError("no sweep in five seconds")


def test_a_log_line_has_ids_and_numbers_and_no_names(server, caplog):
    logs.logger.setLevel("INFO")
    with server.http() as http:
        answer = http.post("/v1/files", files={"file": ("secret-name.txt", b"secret content")}, data={"tags": "secret-tag"})
        http.post("/v1/files", files={"file": ("secret|name.txt", b"secret content")})
        http.get("/health")  # answered after the lines of those before are written
    lines = [logs.Lines().format(record) for record in caplog.records if record.name == "ropewalk"]
    assert not [line for line in lines if "secret" in line]
    line = json.loads(lines[0])
    assert line["request_id"] == answer.headers["request-id"]
    assert line["workspace_id"] == answer.headers["anthropic-workspace-id"]
    assert (line["route"], line["method"], line["status"], line["level"]) == ("/v1/files", "POST", 200, "info")
    assert line["received"] > line["sent"] > 0
    assert line["ms"] > 0


def test_every_route_under_v1_is_in_the_document(server):
    document = httpx.get(f"{server.url}/openapi.json").json()
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    missing = [
        (route.path_format, method)
        for route in server.app.routes
        if getattr(route, "path", "").startswith("/v1/")
        for method in route.methods - {"HEAD"}
        if (route.path_format, method.lower()) not in described
    ]
    assert missing == []
    assert {"/health", "/ready", "/metrics", "/openapi.json"} <= {*document["paths"]}
    names = {each["operationId"] for item in document["paths"].values() for each in item.values()}
    assert len(names) == len(described)


def test_the_document_refers_to_nothing_that_is_not_there(server):
    text = json.dumps(openapi.document(server.app.routes))
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= {*json.loads(text)["components"]["schemas"]}


def test_the_page_of_the_api_names_routes_and_codes_that_there_are(server):
    page = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    routes = {(method, route.path) for route in server.app.routes for method in getattr(route, "methods", None) or ()}
    told = re.findall(r"`(GET|POST|PUT|DELETE) (/v1/[a-z_/{}]+)", page)
    assert len(told) >= 10
    for method, path in told:
        assert any(method == other and path == re.sub(r"{[a-z_:]+}", "{id}", route) for other, route in routes), path
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "src" / "ropewalk").rglob("*.py"))
    for code in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", page.partition("| Status |")[2].partition("\n## ")[0]):
        assert f'"{code}"' in source, code


@pytest.mark.parametrize("option", ["--max-file-mb", "--requests-per-minute", "--drain-seconds"])
def test_a_limit_that_lets_nothing_through_is_refused(option, tmp_path, capsys):
    assert main(["serve", "--data", str(tmp_path), option, "0"]) == 2
    assert f"{option} is 0; expected more than nothing" in capsys.readouterr().err


def test_a_port_in_use_says_what_to_do():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(BadInput, match="choose another with --host and --port"),
    ):
        listen(ServerSettings(port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("example", False)],
)
def test_an_address_that_others_reach_is_known(host, loopback):
    assert _is_loopback(host) is loopback


def _start(tmp_path, *arguments: str, **more) -> subprocess.Popen:
    environment = {**os.environ, "ROPEWALK_ROOT_KEY_FILE": str(tmp_path / "root.key"), "ROPEWALK_HOME": str(tmp_path / "data")}
    command = [sys.executable, "-m", "ropewalk", "serve", "--port", "0", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **more)


def test_the_command_serves_and_stops_when_it_is_told(tmp_path):
    with _start(tmp_path, stdout=subprocess.PIPE) as process:
        listening = json.loads(process.stderr.readline())
        assert listening["event"] == "listening"
        assert listening["url"].startswith("http://127.0.0.1:")
        assert "ropewalk keys create" in json.loads(process.stderr.readline())["event"]
        assert httpx.get(f"{listening['url']}/ready", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    assert [json.loads(line)["event"] for line in err.splitlines() if "request" not in line] == ["stopping", "stopped"]


def test_a_request_in_progress_is_answered_before_the_server_stops(start):
    with start() as found:
        host, port = found.url.removeprefix("http://").split(":")
        body = b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--B--\r\n'
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nx-api-key: {found.key}\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=B\r\n\r\n" + body[:-9])
            while not found.run(_reserved(found)):
                time.sleep(0.02)
            found.stop()
            with pytest.raises(ConnectionError):  # nobody new is let in
                _connect_again_and_again(host, int(port))
            connection.sendall(body[-9:])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_reply_that_is_streamed_is_told_to_its_end_before_the_server_stops(start, tiny):
    serving = Serving(engine=EngineOptions(threads=1))
    with start(settings=ServerSettings(serving=serving, drain_seconds=60)) as found, found.http() as http:
        found.app.state.registry.publish_base("tiny", tiny)
        body = {"model": "tiny", "max_tokens": 300, "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        host, port = found.url.removeprefix("http://").split(":")
        with http.stream("POST", "/v1/messages", json=body) as response:
            lines = response.iter_lines()
            told = [next(line for line in lines if line.startswith("event: content_block_delta"))]
            found.stop()
            [engine] = found.run(found.app.state.models.stats()).values()
            assert engine["requests"] == 1  # it is being answered
            with pytest.raises(ConnectionError):  # nobody new is let in
                _connect_again_and_again(host, int(port))
            told += [line for line in lines if line.startswith("event: ")]
    assert told[-1] == "event: message_stop"
    assert "event: error" not in told


def test_an_upload_that_does_not_end_is_cut_short_and_leaves_nothing(start):
    with start(settings=ServerSettings(drain_seconds=1)) as found:
        host, port = found.url.removeprefix("http://").split(":")
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nx-api-key: {found.key}\r\nContent-Length: 9000000\r\n"
        body = b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"x" * 3_000_000
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=B\r\n\r\n" + body)
            while not found.run(_reserved(found)):
                time.sleep(0.02)
            found.stop()
            with suppress(ConnectionError):
                assert not connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    with start() as again, again.http() as http:
        used = http.get("/v1/files/usage").json()["workspace"]
        assert (used["used_bytes"], used["reserved_bytes"], used["reserved_files"]) == (0, 0, 0)
        assert again.run(_reserved(again)) == 0
        assert [path for path in (again.data / "files").rglob("*") if path.is_file()] == []


def _connect_again_and_again(host: str, port: int) -> None:
    for _ in range(100):
        socket.create_connection((host, port), timeout=10).close()
        time.sleep(0.05)


async def _reserved(found) -> int:
    async with found.store.database.reading() as connection:
        return len((await connection.execute(select(uploads.c.id))).all())


def test_the_first_start_on_a_terminal_gives_a_key(tmp_path):
    leader, follower = os.openpty()
    with _start(tmp_path, stdout=follower) as process:
        os.close(follower)
        url = json.loads(process.stderr.readline())["url"]
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    shown = b""
    with suppress(OSError):  # the other end is closed
        while piece := os.read(leader, 4096):
            shown += piece
    os.close(leader)
    key = next(word for word in shown.decode().split() if word.startswith("rw-admin-"))
    assert f"curl {url}/v1/files -H 'x-api-key: {key}' -F file=@README.md" in shown.decode()


def test_a_later_start_gives_no_key(server, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    told = []
    server.run(_greet(server.store, ServerSettings(), server.url, told.append))
    assert [server.url in line and "rw-admin-" not in line for line in told] == [True]


def test_an_open_address_without_tls_is_warned_of(server, caplog):
    for host, cert, warned in [("0.0.0.0", None, True), ("0.0.0.0", Path("cert.pem"), False), ("127.0.0.1", None, False)]:
        caplog.clear()
        server.run(_greet(server.store, ServerSettings(host=host, tls_cert=cert), server.url, print))
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert any("--tls-cert" in warning for warning in warnings) is warned


def test_tls_is_spoken_with_a_certificate_and_its_absence_is_told(tmp_path):
    assert main(["serve", "--tls-cert", str(tmp_path / "none.pem")]) == 2
    assert main(["serve", "--tls-cert", str(tmp_path / "none.pem"), "--tls-key", str(tmp_path / "none.pem")]) == 2
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    files = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    with _start(tmp_path, *files, stdout=subprocess.DEVNULL) as process:
        url = json.loads(process.stderr.readline())["url"]
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        assert httpx.get(f"{url}/health", verify=trusted, trust_env=False).json() == {"status": "ok"}
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
