"""Which models wrote a file: what is trained on it is their kin, and they may not judge it."""

from __future__ import annotations

from ropewalk.files.catalog import File

LINEAGE = "data_generator"  # in the lineage of a file that was written here: a list of names
TAG = "generator:"  # begins a tag of an uploaded one, by which somebody says the same


def generators(file: File) -> tuple[str, ...]:
    """The names of the models that wrote it, as far as anybody has said so."""
    lineage = file.lineage or {}
    told = lineage.get(
        LINEAGE, filter(None, [lineage.get("model")])
    )  # files that were written earlier say what was asked alone
    tagged = (tag.removeprefix(TAG).strip() for tag in file.tags if tag.startswith(TAG))
    return tuple(dict.fromkeys(filter(None, (*told, *tagged))))
