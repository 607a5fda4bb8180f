"""Keys and seals: what is sealed opens with its key, name and order only; the root key lies apart from the data."""

import base64
import os
import stat

import pytest

from ropewalk.errors import BadInput, DamagedContent
from ropewalk.vault import CHUNK, Opener, Sealer, Vault, derive, new_key, sealed_size, unwrap, wrap

KEY = bytes(range(32))
TEXT = base64.b64encode(KEY).decode()


@pytest.fixture(autouse=True)
def no_root_key(monkeypatch, tmp_path):
    for name in ("ROPEWALK_ROOT_KEY", "ROPEWALK_ROOT_KEY_FILE", "ROPEWALK_ROOT_KEY_COMMAND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_a_wrapped_key_opens_for_its_purpose_only():
    inner = new_key()
    sealed = wrap(KEY, inner, "workspace a")
    assert unwrap(KEY, sealed, "workspace a") == inner
    for outer, purpose in ((KEY, "workspace b"), (new_key(), "workspace a")):
        with pytest.raises(DamagedContent):
            unwrap(outer, sealed, purpose)


def test_chunks_open_only_where_they_were_sealed():
    first, last = bytes(CHUNK), b"the end"
    sealer = Sealer(KEY, "name")
    sealed = [sealer.seal(first, False), sealer.seal(last, True)]
    assert sum(map(len, sealed)) == sealed_size(CHUNK + len(last))
    opener = Opener(KEY, "name")
    assert [opener.open(sealed[0], 0, False), opener.open(sealed[1], 1, True)] == [first, last]
    for wrong in (
        lambda: opener.open(sealed[0], 0, True),  # cut off after it
        lambda: opener.open(sealed[1], 0, True),  # moved
        lambda: opener.open(sealed[1][:-1], 1, True),
        lambda: opener.open(b"", 0, True),
        lambda: Opener(KEY, "other").open(sealed[0], 0, False),
        lambda: Opener(new_key(), "name").open(sealed[0], 0, False),
    ):
        with pytest.raises(DamagedContent):
            wrong()


def test_two_names_under_one_data_key_share_no_key_stream():
    a, b = Sealer(KEY, "a").seal(bytes(64), True), Sealer(KEY, "b").seal(bytes(64), True)
    assert a[:64] != b[:64]


def test_no_bytes_are_one_empty_chunk():
    assert [sealed_size(n) for n in (0, 1, CHUNK, CHUNK + 1)] == [16, 17, CHUNK + 16, CHUNK + 33]
    assert Opener(KEY, "n").open(Sealer(KEY, "n").seal(b"", True), 0, True) == b""


def test_derived_keys_are_those_of_rfc_5869():
    """Worked out with HMAC alone: PRK = HMAC(0*32, key), T(1) = HMAC(PRK, info | 1)."""
    import hmac

    prk = hmac.digest(bytes(32), KEY, "sha256")
    assert derive(KEY, "content") == hmac.digest(prk, b"content\x01", "sha256")


def test_the_root_key_is_made_once_for_its_owner_alone(tmp_path):
    first = Vault.open(tmp_path / "data")
    path = tmp_path / "config" / "ropewalk" / "root.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["root.key"]
    sealed = first.wrap(KEY, "x")
    assert Vault.open(tmp_path / "data").unwrap(sealed, "x") == KEY


def test_a_root_key_comes_from_the_environment_a_file_or_a_command(monkeypatch, tmp_path):
    sealed = Vault(KEY).wrap(b"inner", "x")
    (tmp_path / "key").write_text(TEXT + "\n")
    for name, value in (
        ("ROPEWALK_ROOT_KEY", TEXT),
        ("ROPEWALK_ROOT_KEY_FILE", str(tmp_path / "key")),
        ("ROPEWALK_ROOT_KEY_COMMAND", f"printf %s {TEXT}"),
    ):
        with monkeypatch.context() as here:
            here.setenv(name, value)
            assert Vault.open(tmp_path / "data").unwrap(sealed, "x") == b"inner"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ROPEWALK_ROOT_KEY", "not base64!", "base64"),
        ("ROPEWALK_ROOT_KEY", base64.b64encode(b"short").decode(), "5 bytes; expected 32"),
        ("ROPEWALK_ROOT_KEY_COMMAND", "echo no such key >&2; exit 3", "exit code 3: no such key"),
        ("ROPEWALK_ROOT_KEY_FILE", "DATA/root.key", "inside the data folder"),
        ("ROPEWALK_ROOT_KEY_FILE", "/dev/null/root.key", "root key"),
    ],
)
def test_a_root_key_that_cannot_be_used_is_told(monkeypatch, tmp_path, name, value, says):
    monkeypatch.setenv(name, value.replace("DATA", str(tmp_path / "data")))
    with pytest.raises(BadInput, match=says):
        Vault.open(tmp_path / "data")
