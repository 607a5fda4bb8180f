"""The command line of tenants: every verb on a real store, and what cannot be done with its way out."""

import json
import re

import pytest

from ropewalk.cli import main
from ropewalk.errors import BadInput
from ropewalk.files.token_ledger import Spent, TokenLedger
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.commands import Place, parse_count, parse_rights, parse_size


@pytest.fixture
def ropewalk(tmp_path, monkeypatch, capsys):
    """Runs a command line on a store of the test's own -> exit code, lines of output, last line of errors."""
    for name in ("ROPEWALK_ROOT_KEY", "ROPEWALK_ROOT_KEY_COMMAND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROPEWALK_ROOT_KEY_FILE", str(tmp_path / "root.key"))
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "data"))

    def run(*words):
        code = main(list(words))
        told = capsys.readouterr()
        return code, told.out.splitlines(), told.err.strip().rpartition("\n")[2]

    return run


def as_json(answer):
    code, lines, error = answer
    assert (code, error) == (0, "")
    return json.loads(lines[0])


def test_a_workspace_from_its_making_to_its_archive(ropewalk):
    made = as_json(ropewalk("workspaces", "create", "acme", "--limit-bytes", "5kB", "--downloads", "nobody", "--json"))
    assert (made["name"], made["downloads"], made["archived_at"]) == ("acme", "nobody", None)
    assert ropewalk("workspaces", "create", "beta") == (
        0,
        [as_json(ropewalk("workspaces", "list", "--json"))["data"][0]["id"]],
        "",
    )
    page = as_json(ropewalk("workspaces", "list", "--limit", "1", "--json"))
    assert ([one["name"] for one in page["data"]], page["has_more"]) == (["beta"], True)
    code, lines, _ = ropewalk("workspaces", "list", "--limit", "1", "--after", page["data"][0]["id"])
    assert code == 0
    assert lines[0].startswith(made["id"])
    assert lines[1] == f"and more: --after {made['id']}"
    assert as_json(ropewalk("workspaces", "archive", "acme", "--json"))["archived_at"]
    assert [one["name"] for one in as_json(ropewalk("workspaces", "list", "--json"))["data"]] == ["beta", "default"]
    assert any(line.endswith("acme  (archived)") for line in ropewalk("workspaces", "list", "--archived")[1])
    assert ropewalk("workspaces", "archive", "gamma") == (2, [], "ropewalk: Workspace `gamma` not found.")


def test_limits_are_set_for_each_scope_and_shown(ropewalk):
    acme = as_json(ropewalk("workspaces", "create", "acme", "--json"))["id"]
    key = as_json(ropewalk("keys", "create", "--name", "k", "--workspace", "acme", "--json"))["id"]
    assert ropewalk("workspaces", "limit", "acme", "--bytes", "1MiB", "--files", "7")[1] == [
        f"workspace {acme}",
        "  bytes  0 of 1,048,576",
        "  files  0 of 7",
        "  requests-per-minute  the server's default",
        "  downloads  owner",
        *(f"  {name}  the server's default" for name in ("jobs-running", "jobs-queued", "jobs-file-bytes")),
    ]
    shown = as_json(ropewalk("workspaces", "limit", "acme", "--bytes", "none", "--json"))
    assert (shown["limit_bytes"], shown["limit_files"]) == (None, 7)
    for words, scope, id in (
        (["acme", "--user", "ann"], "user", f"{acme}/ann"),
        (["--key", key], "key", key),
    ):
        shown = as_json(ropewalk("workspaces", "limit", *words, "--files", "3", "--json"))
        assert (shown["scope"], shown["id"], shown["limit_files"]) == (scope, id, 3)
    assert as_json(ropewalk("workspaces", "limit", "--organization", "--bytes", "1TB", "--json"))["limit_bytes"] == 10**12
    as_json(ropewalk("workspaces", "limit", "--new-workspaces", "--files", "9", "--json"))
    as_json(ropewalk("workspaces", "create", "beta", "--json"))
    assert as_json(ropewalk("workspaces", "limit", "beta", "--json"))["limit_files"] == 9
    ropewalk("workspaces", "limit", "beta", "--requests-per-minute", "30", "--downloads", "nobody")
    beta = as_json(ropewalk("workspaces", "list", "--json"))["data"][0]
    assert (beta["name"], beta["requests_per_minute"], beta["downloads"]) == ("beta", 30, "nobody")
    jobs = ["--jobs-running", "2", "--jobs-queued", "50", "--jobs-file-bytes", "20GB"]
    shown = as_json(ropewalk("workspaces", "limit", "beta", *jobs, "--json"))
    assert (shown["jobs_running"], shown["jobs_queued"], shown["jobs_file_bytes"]) == (2, 50, 20 * 10**9)
    assert ropewalk("workspaces", "limit", "beta", "--jobs-queued", "none")[1][-2] == "  jobs-queued  the server's default"
    ropewalk("workspaces", "limit", "beta", "--requests-per-minute", "none")
    assert as_json(ropewalk("workspaces", "list", "--json"))["data"][0]["requests_per_minute"] is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "whose limits?"),
        (["acme", "--organization"], "whose limits?"),
        (["--user", "ann"], "whose limits?"),
        (["default", "--bytes", "much"], "'much' is no size; expected a number of bytes, such as 1000, 10GB"),
        (["default", "--bytes", "-1"], "limit_bytes: -1 is no limit"),
        (["default", "--files", "1.5"], "'1.5' is no whole number"),
        (["--organization", "--downloads", "nobody"], "downloads: only a workspace has that, and no organization"),
        (["default", "--requests-per-minute", "0"], "requests_per_minute: 0 is not a setting"),
        (["default", "--jobs-running", "10001"], "jobs_running: 10001 is not a setting"),
        (["gamma", "--files", "1"], "Workspace `gamma` not found."),
        (["--key", "key_none"], "API key `key_none` not found."),
    ],
)
def test_a_limit_that_cannot_be_set_is_named(ropewalk, words, told):
    code, lines, error = ropewalk("workspaces", "limit", *words)
    assert (code, lines) == (2, [])
    assert error.startswith(f"ropewalk: {told}")


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked(ropewalk):
    code, lines, _ = ropewalk("keys", "create", "--name", "laptop", "--user", "ann", "--expires-in-days", "0.5")
    secret = lines[0]
    assert (code, len(lines)) == (0, 1)
    assert secret.startswith("rw-user-")
    first = as_json(ropewalk("keys", "create", "--name", "first", "--every-workspace", "--rights", "all", "--json"))
    assert first["key"].startswith("rw-admin-")
    assert first["workspace_id"] is None
    assert first["rights"] == ["admin", "download", "read", "users", "write"]
    listed = as_json(ropewalk("keys", "list", "--workspace", "default", "--json"))["data"]
    assert [(key["name"], key["status"], key["user_id"]) for key in listed] == [("laptop", "active", "ann")]
    assert listed[0]["expires_at"] is not None
    whole = "\n".join(ropewalk("keys", "list")[1] + ropewalk("keys", "list", "--json")[1])
    assert secret not in whole
    assert secret[-4:] in whole
    assert as_json(ropewalk("keys", "revoke", first["id"], "--json"))["status"] == "archived"
    assert [key["name"] for key in as_json(ropewalk("keys", "list", "--status", "active", "--json"))["data"]] == ["laptop"]
    assert ropewalk("keys", "revoke", "key_none")[0] == 2
    assert ropewalk("keys", "create", "--name", "x", "--rights", "fly")[2].startswith("ropewalk: 'fly' is no right")


def test_the_root_key_is_rotated(ropewalk, tmp_path, monkeypatch):
    ropewalk("keys", "create", "--name", "laptop")
    new = tmp_path / "keys" / "new.key"
    code, _, error = ropewalk("keys", "rotate-root", "--to", str(tmp_path / "data" / "new.key"))
    assert code == 2
    assert "lies inside the data folder" in error
    code, _, error = ropewalk("keys", "rotate-root", "--to", str(tmp_path / "root.key"))
    assert code == 2
    assert "is the store's own already" in error
    assert as_json(ropewalk("keys", "rotate-root", "--to", str(new), "--json")) == {"keys": 5, "root_key_file": str(new)}
    assert new.stat().st_mode & 0o777 == 0o600
    code, _, error = ropewalk("keys", "list")
    assert code == 2
    assert "the root key does not open this store" in error
    monkeypatch.setenv("ROPEWALK_ROOT_KEY_FILE", str(new))
    assert len(ropewalk("keys", "list")[1]) == 1
    assert ropewalk("audit", "verify")[0] == 0
    assert as_json(ropewalk("audit", "list", "--action", "root_rotated", "--json"))["data"][0]["detail"] == {"keys": 5}


def test_the_audit_log_is_listed_verified_and_exported(ropewalk, tmp_path):
    ropewalk("workspaces", "create", "acme")
    head, out, pem = tmp_path / "head.json", tmp_path / "audit.jsonl", tmp_path / "key.pem"
    code, lines, _ = ropewalk("audit", "verify", "--save-head", str(head))
    assert code == 0
    assert lines[0].startswith("2 entries, every one as it was written; the last is 2, ")
    ropewalk("workspaces", "archive", "acme")
    report = as_json(ropewalk("audit", "verify", "--head", str(head), "--json"))
    assert (report["entries"], report["faults"], report["head"]["sequence"]) == (3, [], 3)
    assert [entry["action"] for entry in as_json(ropewalk("audit", "list", "--workspace", "acme", "--json"))["data"]] == [
        "workspace_archived",
        "workspace_created",
    ]
    assert len(ropewalk("audit", "list", "--before", "3", "--limit", "1")[1]) == 1
    assert ropewalk("audit", "export", "--out", str(out)) == (0, [], "")
    assert out.read_text().splitlines()[:3] == ropewalk("audit", "export")[1][:3]
    pem.write_text("\n".join(ropewalk("files", "receipt-key")[1]) + "\n")
    assert ropewalk("audit", "verify", str(out), "--public-key", str(pem))[0] == 0
    assert ropewalk("audit", "verify", str(out))[0] == 0
    assert ropewalk("audit", "verify", "--head", str(out))[0] == 0
    out.write_text(out.read_text().replace("workspace_archived", "workspace_created"))
    code, _, error = ropewalk("audit", "verify", str(out), "--public-key", str(pem))
    assert (code, error) == (1, "ropewalk: the audit log is not what was written: entry 3 was changed")
    code, _, error = ropewalk("audit", "verify", "--head", str(pem))
    assert code == 2
    assert "is no exported audit log" in error
    head.write_text("{}\n")
    assert "holds no signed head" in ropewalk("audit", "verify", "--head", str(head))[2]
    assert ropewalk("audit", "verify", "--head", str(tmp_path / "absent"))[0] == 2


def test_a_log_that_was_changed_fails_with_its_faults(ropewalk, tmp_path):
    import sqlite3

    ropewalk("workspaces", "create", "acme")
    with sqlite3.connect(tmp_path / "data" / "ropewalk.db") as connection:
        connection.execute("UPDATE audit SET subject = 'wrkspc_other' WHERE seq = 2")
    connection.close()
    code, lines, error = ropewalk("audit", "verify", "--json")
    assert code == 1
    assert json.loads(lines[0])["faults"] == ["entry 2 was changed"]
    assert error == "ropewalk: the audit log is not what was written: entry 2 was changed"


def test_sizes_counts_and_rights_are_read():
    assert [parse_size(text) for text in ("0", "1000", "1.5kB", "10 GB", "2GiB", "none")] == [
        0,
        1000,
        1500,
        10_000_000_000,
        2_147_483_648,
        None,
    ]
    assert [parse_count("12"), parse_count("NONE")] == [12, None]
    assert parse_rights("read, write,") == ["read", "write"]
    for text in ("", "GB", "1e999", "nan"):
        with pytest.raises(BadInput, match="is no size"):
            parse_size(text)


def test_usage_is_told_as_a_table_as_json_and_as_csv(ropewalk, tmp_path):
    acme = as_json(ropewalk("workspaces", "create", "acme", "--json"))["id"]

    async def ask(database, _):
        ledger = TokenLedger(database)
        ledger.add(Caller("o", acme, None), "house", Spent(10, 0, 990, 20), {})
        ledger.add(Caller("o", acme, None, "ann"), "other", Spent(1, 2, 3, 4), {})
        await ledger.close()

    Place(f"sqlite:///{tmp_path}/data/ropewalk.db", tmp_path / "data").run(ask)
    models = tmp_path / "models.yml"
    models.write_text("models: {house: {base: x, price: {input: 10, cache_read: 1, output: 20, as_of: 2026-11-22}}}")
    told = as_json(ropewalk("workspaces", "usage", "acme", "--models", str(models), "--json"))
    by_model = {found["model"]: found for found in told["models"]}
    # 10 at 10, 990 at 1 and 20 at 20 are 1,490 millionths; 990 at 9 more would have been 8,910.
    assert (by_model["house"]["cost"], by_model["house"]["saved"]) == ({"USD": 0.00149}, {"USD": 0.00891})
    assert (by_model["other"]["cost"], by_model["other"]["cached_share"]) == ({}, 0.5)
    assert (told["workspace_id"], told["total"]["requests"], len(told["days"])) == (acme, 2, 30)
    assert as_json(ropewalk("workspaces", "usage", "acme", "--user", "ann", "--json"))["total"]["requests"] == 1
    lines = ropewalk("workspaces", "usage", "--days", "1", "--models", str(models))[1]
    assert any(re.search(r"^house +1 +1,000 +990 \(99%\) +20 +0.00149 USD +0.00891 USD$", line) for line in lines)
    assert any(re.search(r"^acme +2 +1,006 +993", line) for line in lines)
    lines = ropewalk("workspaces", "usage", "acme", "--csv", "--models", str(models))[1]
    assert lines[0].startswith("day,model,requests,input_tokens")
    assert lines[1].endswith(",house,1,10,0,990,20,0.00149000,0.00891000,USD,0,0,0.000,,")
    assert lines[2].endswith(",other,1,1,2,3,4,,,,0,0,0.000,,")
    assert ropewalk("workspaces", "usage", "--days", "0")[0] == 2
    assert ropewalk("workspaces", "usage", "--user", "ann")[2].endswith("name the workspace as well")
    assert ropewalk("workspaces", "usage", "gamma") == (2, [], "ropewalk: Workspace `gamma` not found.")
