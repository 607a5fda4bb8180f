"""Receipts: signed, chained, and refused as soon as anything in them is changed."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.database import Database
from ropewalk.errors import BadInput, NotFound, VerificationFailed
from ropewalk.files import receipts
from ropewalk.files.receipts import FIRST, Receipt, read_receipt, verify, verify_chain
from ropewalk.files.settings import Settings
from ropewalk.tenants.signing import public_pem, read_public_key

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
UNSIGNED = Receipt(
    sequence=1,
    previous=FIRST,
    file_id_sha256=receipts.id_digest("file_one"),
    workspace_id="wrkspc_one",
    sha256="ab" * 32,
    size_bytes=4711,
    created_at=receipts.timestamp(1_700_000_000_000_001),
    deleted_at=receipts.timestamp(1_700_000_100_000_000),
    content="erased",
    shared_with=0,
    derived=("text", "tokens"),
    adapters=("house-é",),
    key_id="",
)
SIGNED = UNSIGNED.sign(KEY)


def test_a_signed_receipt_verifies_with_the_public_key_and_comes_back_equal() -> None:
    assert verify(json.loads(json.dumps(SIGNED.as_dict())), KEY.public_key()) == SIGNED
    assert SIGNED.is_of("file_one")
    assert not SIGNED.is_of("file_two")


@pytest.mark.parametrize("name", sorted(SIGNED.as_dict()))
def test_a_receipt_with_any_value_changed_is_refused(name: str) -> None:
    changed = SIGNED.as_dict()
    value = changed[name]
    changed[name] = value + 1 if isinstance(value, int) else [*value, "more"] if isinstance(value, list) else value[:-1] + "!"
    with pytest.raises(VerificationFailed):
        verify(changed, KEY.public_key())


@pytest.mark.parametrize("name", sorted(SIGNED.as_dict()))
def test_a_receipt_with_a_value_left_out_is_refused(name: str) -> None:
    changed = SIGNED.as_dict()
    del changed[name]
    with pytest.raises(VerificationFailed):
        verify(changed, KEY.public_key())


@given(st.data())
def test_any_changed_character_of_the_file_is_refused_or_changes_nothing_in_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = json.dumps(SIGNED.as_dict(), indent=1)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from(' \n"0aA,:}é'))
    path = tmp_path_factory.mktemp("changed") / "receipt.json"
    path.write_text(text[:at] + other + text[at + 1 :], encoding="utf-8")
    try:
        found = verify(read_receipt(path), KEY.public_key())
    except VerificationFailed:
        return
    assert found == SIGNED


def test_another_key_is_named_as_the_reason() -> None:
    with pytest.raises(VerificationFailed, match="names the key"):
        verify(SIGNED.as_dict(), Ed25519PrivateKey.generate().public_key())


def test_the_signature_in_capital_letters_is_a_changed_receipt() -> None:
    with pytest.raises(VerificationFailed):
        verify({**SIGNED.as_dict(), "signature": SIGNED.signature.upper()}, KEY.public_key())


def test_a_chain_with_a_receipt_taken_out_or_swapped_is_refused() -> None:
    second = replace(UNSIGNED, sequence=2, previous=SIGNED.digest()).sign(KEY)
    third = replace(UNSIGNED, sequence=3, previous=second.digest()).sign(KEY)
    verify_chain([SIGNED, second, third], KEY.public_key())
    for broken in ([SIGNED, third], [second, third], [SIGNED, third, second]):
        with pytest.raises(VerificationFailed, match="does not follow"):
            verify_chain(broken, KEY.public_key())


def test_receipts_issued_at_once_form_one_chain(tmp_path: Path) -> None:
    async def issue_all() -> list[Receipt]:
        database = await Database.open(Settings(data=tmp_path).database)

        async def issue(number: int, undone: bool = False) -> None:
            async with database.writing() as connection:
                await receipts.issue(
                    connection,
                    KEY,
                    file_id=f"file_{number}",
                    workspace_id="wrkspc_one",
                    sha256="ab" * 32,
                    size=number,
                    created_at=0,
                    content="shared",
                    shared_with=2,
                    derived=["text", "text"],
                )
                if undone:
                    raise RuntimeError("undone")

        await asyncio.gather(*(issue(number) for number in range(5)))
        with pytest.raises(RuntimeError, match="undone"):
            await issue(9, undone=True)
        await issue(5)
        async with database.reading() as connection:
            found = await receipts.issued(connection, 6)
        await database.close()
        return found

    found = asyncio.run(issue_all())
    assert {receipt.size_bytes for receipt in found} == set(range(6))
    assert {receipt.derived for receipt in found} == {("text",)}
    verify_chain(found, KEY.public_key())


def test_what_is_no_receipt_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    with pytest.raises(NotFound, match=r"receipt\.json"):
        read_receipt(path)
    for content in ("", "[1]", "{", '{"a": 1, "a": 2}', "\udcff"):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(VerificationFailed, match=r"receipt\.json"):
            read_receipt(path)
    path.write_text("{}")
    with pytest.raises(VerificationFailed):
        verify(read_receipt(path), KEY.public_key())


def test_the_public_key_goes_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text(public_pem(KEY.public_key()))
    assert verify(SIGNED.as_dict(), read_public_key(path)) == SIGNED
    path.write_text("no key")
    with pytest.raises(BadInput, match="receipt-key"):
        read_public_key(path)
    with pytest.raises(NotFound):
        read_public_key(tmp_path / "absent.pem")
