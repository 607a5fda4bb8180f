"""From a name to a model folder: a folder on disk, the hub's cache, or a download that goes on where it was cut. No torch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ropewalk.errors import ModelError, OutputError, RopewalkError
from ropewalk.models.folder import check_folder

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "README.md")
UNWANTED = ("*/*", "consolidated*", "adapter_*", "optimizer*", "training_args*")
"""Folders hold other formats of the same weights, and consolidated files a second copy of them."""

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PART = ".part"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Pulled:
    """What a pull brought: the folder, the exact commit it is, and under which licence."""

    name: str
    folder: Path
    commit: str
    licence: str
    bytes: int
    fetched: int


def resolve_base(
    name: str | Path, revision: str | None = None, *, trust_remote_code: bool = False, tell: Tell | None = None
) -> Path:
    """The complete model folder that a name stands for: a folder, a cached download, or a new one."""
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path)
        return path
    if _looks_like_a_path(str(name)):
        check_folder(path)  # raises: not found, with the nearest name
    cached = cached_folder(str(name), revision)
    if cached is not None:
        try:
            check_folder(cached)
            return cached
        except ModelError:
            pass  # an unfinished or damaged download: pull completes it, or says why it cannot
    return pull(str(name), revision, trust_remote_code=trust_remote_code, tell=tell).folder


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """Where the hub's cache keeps this revision, complete or not."""
    repository = _repository_cache(name)
    wanted = revision or "main"
    reference = repository / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    snapshot = repository / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def pull(name: str, revision: str | None = None, *, trust_remote_code: bool = False, tell: Tell | None = None) -> Pulled:
    """Fetch a model from the hub, safetensors only, pinned to a commit; a cut download goes on where it stopped."""
    tell = tell or (lambda line: None)
    info = _look_up(name, revision)
    commit, licence = str(info.sha), _licence(info)
    files = _select(name, info.siblings or [], trust_remote_code)
    total = sum(file.size or 0 for file in files)
    tell(f"{name} at {commit[:12]}: licence {licence}, {len(files)} files, {_gb(total)}")
    blobs = _repository_cache(name) / "blobs"
    try:
        blobs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the hub's cache {blobs} cannot be written: {error.strerror}; set HF_HOME to another folder"
        ) from error
    missing = sum(_still_to_fetch(blobs, file) for file in files)
    free = shutil.disk_usage(blobs).free
    if missing > free:
        raise OutputError(
            f"{name} still needs {_gb(missing)} and {blobs} has {_gb(free)} free; free some, or set HF_HOME to a folder on "
            "another disk"
        )
    with ThreadPoolExecutor(max_workers=4) as pool:
        for file in pool.map(lambda file: _fetch(name, commit, revision, file, blobs), files):
            tell(f"  {file.rfilename}  {_gb(file.size or 0)}")
    folder = cached_folder(name, commit)
    if folder is None:
        raise ModelError(f"the hub's cache has no folder for {name} at {commit} after its download; remove {blobs.parent}")
    check_folder(folder)
    return Pulled(name, folder, commit, licence, total, missing)


def ensure_tokenizer(folder: Path, home: Path | None = None) -> Path:
    """A folder with this model's tokenizer.json: the model's own, or one converted once into Ropewalk's cache."""
    if (folder / "tokenizer.json").is_file():
        return folder
    sources = [folder / name for name in ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tiktoken.model")]
    present = [path for path in sources if path.is_file()]
    if not present:
        raise ModelError(f"{folder} has no tokenizer: expected tokenizer.json (or tokenizer.model, vocab.json)")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in present)).hexdigest()[:16]
    home = home or Path(os.environ.get("ROPEWALK_HOME", Path.home() / ".ropewalk"))
    target = home / "cache" / "tokenizers" / digest
    if not (target / "tokenizer.json").is_file():
        _convert_tokenizer(folder, target)
    return target


def _convert_tokenizer(folder: Path, target: Path) -> None:
    from transformers import AutoTokenizer  # only old checkpoints need this, and it takes seconds to import

    target.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(target)
    except (ImportError, ValueError, OSError, AttributeError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be converted to tokenizer.json: {error}") from error
    if not (target / "tokenizer.json").is_file():
        raise ModelError(f"the tokenizer in {folder} has no fast form, so no tokenizer.json can be made of it")


def _looks_like_a_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~", ".")) or "\\" in name or not REPOSITORY.fullmatch(name)


def _repository_cache(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _look_up(name: str, revision: str | None) -> Any:
    import huggingface_hub
    from huggingface_hub import constants, errors

    neither = f"'{name}' is neither a folder here nor"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{neither} in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it")
    try:
        return huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=20)
    except errors.GatedRepoError as error:
        raise ModelError(f"{name} asks for its terms to be accepted: do so on its page, then `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision '{revision}' on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"base model not found: {neither} a model on the hub (a private one needs `hf auth login`)") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _unreachable(name, error) from error
    except Exception as error:  # the hub's HTTP library, whose errors have no common public base across its versions
        if "httpx" in type(error).__module__:
            raise _unreachable(name, error) from error
        raise


def _unreachable(name: str, error: Exception) -> ModelError:
    from huggingface_hub import constants

    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"base model not found: '{name}' is neither a folder here nor cached, and the hub at {constants.ENDPOINT} does not "
        f"answer ({reason}); check the name, the network, or HF_ENDPOINT"
    )


def _licence(info: Any) -> str:
    card = getattr(info, "card_data", None)
    licence = getattr(card, "license", None) if card else None
    if licence == "other":
        licence = getattr(card, "license_name", None) or licence
    return str(licence) if licence else "not stated (see its page before you use it)"


def _select(name: str, siblings: Sequence[Any], trust_remote_code: bool) -> list[Any]:
    wanted = (*WANTED, "*.py") if trust_remote_code else WANTED
    files = [
        file
        for file in siblings
        if any(fnmatch(file.rfilename, pattern) for pattern in wanted)
        and not any(fnmatch(file.rfilename, pattern) for pattern in UNWANTED)
    ]
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        raise ModelError(f"{name} has no safetensors weights on the hub; Ropewalk opens no pickle files, which can run code")
    return files


def _digest(file: Any) -> str | None:
    """The sha256 by which the hub's cache names a large file; small files are left to the hub's own client."""
    return str(file.lfs.sha256) if getattr(file, "lfs", None) else None


def _still_to_fetch(blobs: Path, file: Any) -> int:
    digest = _digest(file)
    if digest is None:
        return 0
    done, part = blobs / digest, blobs / (digest + PART)
    if done.is_file():
        return 0
    return max(0, int(file.size or 0) - (part.stat().st_size if part.is_file() else 0))


def _fetch(name: str, commit: str, revision: str | None, file: Any, blobs: Path) -> Any:
    import huggingface_hub

    digest = _digest(file)
    if digest is not None:
        # One process of a run fetches, the others wait for it.
        with huggingface_hub.utils.WeakFileLock(blobs / f"{digest}{PART}.lock"):
            if not (blobs / digest).is_file():
                _fetch_blob(huggingface_hub.hf_hub_url(name, file.rfilename, revision=commit), file, digest, blobs)
    # Fetches what is small, links what is there, and writes down which commit the branch stands for.
    at = (revision or "main") if file.rfilename == "config.json" else commit
    huggingface_hub.hf_hub_download(name, file.rfilename, revision=at)
    return file


def _fetch_blob(url: str, file: Any, digest: str, blobs: Path) -> None:
    """Fetch one large file; the hub's own client starts again from nothing in a new process, this goes on."""
    import huggingface_hub

    part = blobs / (digest + PART)
    for attempt in range(4):
        have = part.stat().st_size if part.is_file() else 0
        if have >= file.size:
            break
        headers = {**huggingface_hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with huggingface_hub.get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as answer:
                if answer.status_code not in (200, 206):
                    raise ModelError(f"the hub answers {answer.status_code} for {url}")
                with part.open("ab" if answer.status_code == 206 else "wb") as out:
                    for chunk in answer.iter_bytes():
                        out.write(chunk)
        except OSError as error:
            raise OutputError(f"{part} cannot be written: {error.strerror or error}") from error
        except Exception as error:
            if "httpx" not in type(error).__module__:
                raise
            if attempt == 3:
                raise ModelError(
                    f"the download of {file.rfilename} was cut ({error}); run it again to go on from here"
                ) from error
    _keep_if_right(part, file, digest)


def _keep_if_right(part: Path, file: Any, digest: str) -> None:
    with part.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if part.stat().st_size < file.size:
        raise ModelError(f"the download of {file.rfilename} was cut; run it again to go on from here")
    if found != digest:
        part.unlink()
        raise ModelError(
            f"{file.rfilename} arrived damaged: sha256 {found[:12]} where {digest[:12]} was promised; run it again"
        )
    part.rename(part.with_name(digest))


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e3:.0f} kB"


def push(folder: Path, name: str, revision: str | None = None) -> str:
    """Upload a result as a private hub repository and give its address; what is on disk stays whatever happens."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        api = huggingface_hub.HfApi()
        address = str(api.create_repo(name, private=True, exist_ok=True))
        if revision:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message="Upload by Ropewalk")
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, OSError) as error:
        raise RopewalkError(f"hub_model_id {name}: the upload failed ({error}); the result is safe in {folder}") from error
    return address
