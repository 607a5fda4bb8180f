"""Where rows come from: a file, a folder, an id of the file store, or a data set of the hub."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from ropewalk.config.run import DataSource
from ropewalk.errors import ConfigError, DataError, FileExpired, MissingExtra
from ropewalk.files.catalog import File
from ropewalk.files.local import is_id, open_local

Kind = Literal["jsonl", "json", "csv", "parquet", "arrow", "text"]
ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
KINDS: tuple[Kind, ...] = ("jsonl", "json", "csv", "parquet", "arrow", "text")


@dataclass(frozen=True)
class DataFile:
    """One file of a source: of this machine, or of the file store, which keeps it sealed and is read by id."""

    place: Path | File
    kind: Kind
    name: str  # what the user calls it

    @property
    def zipped(self) -> bool:
        return self.name.endswith(".gz")

    @property
    def size(self) -> int:
        """Its bytes as they are kept."""
        return self.place.stat().st_size if isinstance(self.place, Path) else self.place.size

    def digest(self) -> bytes:
        """The SHA-256 of its bytes as they are kept."""
        if not isinstance(self.place, Path):
            return bytes.fromhex(self.place.sha256)
        with self.place.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").digest()

    def open(self) -> BinaryIO:
        """Its bytes, unpacked."""
        if isinstance(self.place, Path):
            # By its path, since a gzip file closes only what it has opened itself.
            return cast(BinaryIO, gzip.open(self.place, "rb")) if self.zipped else self.place.open("rb")
        kept = open_local().open(self.place.id)
        return cast(BinaryIO, gzip.open(kept, "rb")) if self.zipped else kept


@dataclass(frozen=True)
class HubSet:
    """A data set that the `datasets` library loads."""

    path: str
    name: str | None
    split: str
    revision: str | None
    data_files: tuple[str, ...]


Found = list[DataFile] | HubSet


def locate(source: DataSource) -> Found:
    """The files that a source names, or the data set of the hub; nothing is read yet."""
    listed = tuple(source.data_files or ())
    if is_id(source.path):
        file = open_local().show(source.path)
        if file.expired:
            raise FileExpired(f"the file '{file.id}' ({file.filename}) has expired; put it again")
        return [_data_file(file, file.filename, file.size, source.ds_type)]
    if source.path in KINDS and listed:
        return [_file(Path(name).expanduser(), source.path) for name in listed]
    path = Path(source.path).expanduser()
    if path.is_file():
        return [_file(path, source.ds_type)]
    if path.is_dir():
        return _in_folder(path, listed, source.ds_type, split_name(source))
    if _looks_local(source.path):
        raise DataError(f"there is no data file or folder '{source.path}'{_near(path)}")
    return HubSet(source.path, source.name, split_name(source), source.revision, listed)


def stored_ids(found: Found) -> list[str]:
    """The ids of its files that are of the file store."""
    return [] if isinstance(found, HubSet) else [file.place.id for file in found if isinstance(file.place, File)]


def content_digest(found: Found) -> str:
    """A hash of what a source holds: the bytes of its files, or the hub's own fingerprint."""
    if isinstance(found, HubSet):
        return str(load_hub_set(found)._fingerprint)
    total = hashlib.sha256()
    for file in found:
        total.update(f"{file.kind} {file.zipped} {file.size}".encode())
        total.update(file.digest())
    return total.hexdigest()


def size(found: Found) -> int:
    """About how many bytes of text there are."""
    if isinstance(found, HubSet):
        return int(load_hub_set(found).dataset_size or 0)
    return sum(file.size * (4 if file.zipped or file.kind == "parquet" else 1) for file in found)


@cache
def load_hub_set(found: HubSet, streaming: bool = False) -> Any:
    """The data set itself; with `streaming`, its rows as they come."""
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra("datasets", "data", f"'{found.path}' is no file or folder here; reading it from the hub")
    import datasets

    try:
        return datasets.load_dataset(
            found.path,
            found.name,
            split=found.split,
            revision=found.revision,
            data_files=list(found.data_files) or None,
            streaming=streaming,
        )
    except Exception as error:  # the library raises many kinds, each for the same reason: the data set cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the data set '{found.path}' is neither a file or folder here nor to be had from the hub: {reason}"
        ) from error


def _file(path: Path, ds_type: str | None) -> DataFile:
    if not path.is_file():
        raise DataError(f"there is no data file '{path}'{_near(path)}")
    return _data_file(path, str(path), path.stat().st_size, ds_type)


def _data_file(place: Path | File, name: str, size: int, ds_type: str | None) -> DataFile:
    if size == 0:
        raise DataError("the file is empty", path=name)
    kind = _kind(Path(name), ds_type)
    if kind is None:
        raise ConfigError(f"{name}: its ending does not say what it is; add 'ds_type', one of {', '.join(KINDS)}")
    return DataFile(place, kind, name)


def _kind(name: Path, ds_type: str | None) -> Kind | None:
    ending = ENDINGS.get((name.with_suffix("") if name.suffix == ".gz" else name).suffix.lower())
    if ds_type is None:
        return ending
    if ds_type not in KINDS:
        raise ConfigError(f"ds_type: '{ds_type}' is not one of {', '.join(KINDS)}")
    # Axolotl writes `json` for JSON lines too.
    return "jsonl" if ds_type == "json" and ending == "jsonl" else ds_type


def split_name(source: DataSource) -> str:
    """The split without its slice: slices are taken of tokenised rows, the same for every kind of source."""
    return (source.split or "train").partition("[")[0]


def _in_folder(folder: Path, listed: tuple[str, ...], ds_type: str | None, split: str) -> list[DataFile]:
    if listed:
        return [_file(folder / name, ds_type) for name in listed]
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    kept = [_file(path, ds_type) for path in paths if _kind(path, ds_type) and path.name not in _NOT_DATA]
    tables = [file for file in kept if file.kind != "text"] or kept
    if not tables:
        raise DataError(f"the folder '{folder}' holds no data file; expected {', '.join(ENDINGS)}")
    # Where names tell of splits (train-00000.parquet, test/1.jsonl), only the one asked for is read.
    of_split = [file for file in tables if split in re.split(r"[^a-z]+", str(Path(file.name).relative_to(folder)).lower())]
    return of_split or tables


# Written beside data by other tools.
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "README.md")


def _looks_local(path: str) -> bool:
    """Whether a path can be no data set of the hub: those are NAME or OWNER/NAME, without an ending of ours."""
    known = Path(path.removesuffix(".gz")).suffix.lower() in ENDINGS
    return known or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def _near(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder '{folder}')"
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], 1)
    return f"; did you mean '{folder / near[0]}'?" if near else ""
