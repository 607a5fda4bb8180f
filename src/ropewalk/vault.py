"""Keys and seals: everything at rest is encrypted under a key of its own, and dies with that key.

    root key                 from outside the data folder; never stored by us beside what it opens
    └── workspace key        wraps data keys; names content within a workspace
        └── data key         one per stored content; seals its bytes, and what is derived from them

Sealed bytes are chunks of CHUNK plain bytes, each AES-256-GCM under the data key (NIST SP 800-38D). The nonce of a chunk is its
number and whether it is the last, so that no chunk can be moved, dropped or cut off unnoticed (the STREAM construction, Hoang et
al., "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", 2015). Each name is sealed under a key of its own, derived
from the data key, and is written once, so that no nonce is used twice.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import subprocess
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ropewalk.errors import BadInput, DamagedContent
from ropewalk.folders import make_folder, sync_folder

CHUNK = 1 << 20  # plain bytes of a sealed chunk
TAG = 16
KEY_BYTES = 32
ROOT_KEY_WAYS = "$ROPEWALK_ROOT_KEY, $ROPEWALK_ROOT_KEY_FILE or $ROPEWALK_ROOT_KEY_COMMAND"


def new_key() -> bytes:
    """A random key."""
    return secrets.token_bytes(KEY_BYTES)


def wrap(outer: bytes, key: bytes, purpose: str) -> bytes:
    """A key under another; opens only for the same purpose."""
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(outer).encrypt(nonce, key, purpose.encode())


def unwrap(outer: bytes, sealed: bytes, purpose: str) -> bytes:
    """The key that `wrap` was given."""
    try:
        return AESGCM(outer).decrypt(sealed[:12], sealed[12:], purpose.encode())
    except InvalidTag:
        raise DamagedContent(f"a key ({purpose}) does not open: its wrapping, or the key around it, is another") from None


def derive(key: bytes, purpose: str) -> bytes:
    """A key for one purpose from a key for several (HKDF, RFC 5869)."""
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=purpose.encode()).derive(key)


def sealed_size(size: int) -> int:
    """How many bytes `size` plain bytes take when sealed; no bytes are one empty chunk."""
    return size + TAG * max(1, -(-size // CHUNK))


class Sealer:
    """Seals one stream of bytes, chunk after chunk."""

    def __init__(self, key: bytes, name: str) -> None:
        self._cipher, self._name, self._index = AESGCM(derive(key, name)), name.encode(), 0

    def seal(self, plain: bytes | memoryview, last: bool) -> bytes:
        """The next chunk: CHUNK plain bytes, or fewer in the last."""
        assert len(plain) == CHUNK or (last and len(plain) < CHUNK)
        sealed = self._cipher.encrypt(_nonce(self._index, last), plain, self._name)
        self._index += 1
        return sealed


class Opener:
    """Opens chunks of one stream, in any order."""

    def __init__(self, key: bytes, name: str) -> None:
        self._cipher, self._name = AESGCM(derive(key, name)), name

    def open(self, sealed: bytes | memoryview, index: int, last: bool) -> bytes:
        """The plain bytes of a chunk, or DamagedContent: never other bytes than were sealed."""
        try:
            return self._cipher.decrypt(_nonce(index, last), sealed, self._name.encode())
        except (InvalidTag, ValueError):  # ValueError: shorter than a tag
            raise DamagedContent(f"stored bytes are damaged: chunk {index} of {self._name} is not what was sealed") from None

    def open_into(self, sealed: bytes | memoryview, out: memoryview, index: int, last: bool) -> None:
        """The same into a place of exactly the chunk's plain size, without a copy."""
        try:
            self._cipher.decrypt_into(_nonce(index, last), sealed, self._name.encode(), out)
        except (InvalidTag, ValueError):
            raise DamagedContent(f"stored bytes are damaged: chunk {index} of {self._name} is not what was sealed") from None


class Vault:
    """What the root key opens."""

    def __init__(self, root: bytes) -> None:
        if len(root) != KEY_BYTES:
            raise BadInput(f"the root key has {len(root)} bytes; expected {KEY_BYTES}, written in base64")
        self._root = root

    @classmethod
    def open(cls, data_folder: Path) -> Vault:
        """The root key from the environment, from a file, from a command (a key manager's), or made at the first use."""
        if text := os.environ.get("ROPEWALK_ROOT_KEY"):
            return cls(_decoded(text, "$ROPEWALK_ROOT_KEY"))
        if command := os.environ.get("ROPEWALK_ROOT_KEY_COMMAND"):
            return cls(_decoded(_printed_by(command), "what $ROPEWALK_ROOT_KEY_COMMAND printed"))
        return cls.from_file(Path(os.environ.get("ROPEWALK_ROOT_KEY_FILE") or default_key_file()), data_folder)

    @classmethod
    def from_file(cls, path: Path, data_folder: Path) -> Vault:
        """The root key in a file outside the data folder, made there if there is none."""
        path = path.expanduser()
        if path.resolve().is_relative_to(data_folder.expanduser().resolve()):
            raise BadInput(
                f"the root key {path} lies inside the data folder {data_folder}: whoever copies the one has the other; "
                f"move it out and name it in $ROPEWALK_ROOT_KEY_FILE"
            )
        return cls(_decoded(_read_or_make(path), str(path)))

    def wrap(self, key: bytes, purpose: str) -> bytes:
        """A key under the root key."""
        return wrap(self._root, key, purpose)

    def unwrap(self, sealed: bytes, purpose: str) -> bytes:
        """The key that `wrap` was given."""
        return unwrap(self._root, sealed, purpose)


def default_key_file() -> Path:
    """Where the root key lies when nobody says otherwise: with the user's settings, apart from the data."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "ropewalk" / "root.key"


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(11, "big") + bytes([last])


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        raise BadInput(
            f"{where} is not base64; expected 32 random bytes, as `head -c 32 /dev/urandom | base64` prints them"
        ) from None


def _printed_by(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise BadInput(f"$ROPEWALK_ROOT_KEY_COMMAND failed with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _read_or_make(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the root key {path}: {error}; name another file in $ROPEWALK_ROOT_KEY_FILE") from error
    try:
        make_folder(path.parent)
        # Written aside and linked: of two processes that start at once, one key wins and none is ever half there.
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(base64.b64encode(new_key()).decode() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)
        except FileExistsError:
            pass
        finally:
            beside.unlink()
        sync_folder(path.parent)
    except OSError as error:
        raise BadInput(f"cannot make a root key at {path}: {error.strerror or error}; give one in {ROOT_KEY_WAYS}") from error
    return path.read_text(encoding="ascii")
