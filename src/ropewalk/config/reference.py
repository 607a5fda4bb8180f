"""The reference of configuration keys, made from keys.py and axolotl.py: a page and a JSON Schema."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ropewalk.config import axolotl
from ropewalk.config.cluster import ClusterKeys
from ropewalk.config.keys import (
    AdapterKeys,
    DataKeys,
    DataSource,
    ModelKeys,
    OutputKeys,
    PromptFormat,
    SpecialTokens,
    TrainingKeys,
)
from ropewalk.config.memory import MemoryKeys
from ropewalk.config.parallel import FsdpKeys, ParallelKeys
from ropewalk.config.preference import PreferenceKeys
from ropewalk.config.reinforcement import ReinforcementKeys, TrlKeys
from ropewalk.config.rounding import QatKeys, RoundingKeys
from ropewalk.config.run import Run
from ropewalk.config.scoring import ScoringKeys

_HEAD = """# Configuration

A run is one YAML file with Axolotl's keys. Every key that has an effect is below; `ropewalk check CONFIG` tells about any other.
A value may be set on the command line too: `ropewalk train CONFIG learning_rate=1e-4 datasets.0.path=rows.jsonl`.
A key left blank is as if it were not there. This page is made by `ropewalk config docs`.
"""

_SECTIONS: tuple[tuple[type[BaseModel], str], ...] = (
    (ModelKeys, "The base model"),
    (AdapterKeys, "What is trained"),
    (DataKeys, "Data"),
    (DataSource, "Data: an entry of `datasets`"),
    (PromptFormat, "Data: `type` as a mapping"),
    (SpecialTokens, "Data: `special_tokens`"),
    (TrainingKeys, "Training"),
    (ReinforcementKeys, "Training by rewards"),
    (TrlKeys, "Training by rewards: the block `trl`"),
    (PreferenceKeys, "Training by preferences"),
    (ScoringKeys, "Training of reward models"),
    (RoundingKeys, "Training for quantisation"),
    (QatKeys, "Training for quantisation: the block `qat`"),
    (ParallelKeys, "Several processes"),
    (FsdpKeys, "Several processes: the block `fsdp_config`"),
    (MemoryKeys, "Memory"),
    (ClusterKeys, "On a Ray cluster"),
    (OutputKeys, "Evaluation, saving and logging"),
)


def schema() -> dict[str, Any]:
    """JSON Schema of a configuration file."""
    made = Run.model_json_schema(by_alias=False)
    known = made["properties"]
    known |= {info.alias: known[name] for name, info in Run.model_fields.items() if info.alias}
    known |= {name: {"description": f"Not needed: {reason}", "deprecated": True} for name, reason in axolotl.IGNORED.items()}
    known["plugins"] = {"description": "Plugins of Axolotl's; what they do is built in, or refused.", "deprecated": True}
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["title"] = "A run of Ropewalk"
    return made


def reference_page() -> str:
    """The page docs/config.md."""
    parts = [_HEAD]
    parts += [_section(group, title) for group, title in _SECTIONS]
    parts.append(_others("Axolotl's keys that are not needed", "They are accepted and listed in the plan.", axolotl.IGNORED))
    parts.append(_others("Axolotl's keys of `trl` that are not needed", "They are accepted too.", axolotl.IGNORED_IN_TRL))
    parts.append(_others("Axolotl's keys of `trl` that are not supported", "They stop the run.", axolotl.REFUSED_IN_TRL))
    parts.append(
        _others("Axolotl's keys of `fsdp_config` that are not needed", "They are accepted too.", axolotl.IGNORED_IN_FSDP)
    )
    parts.append(_others("Axolotl's keys that are not supported", "They stop the run, unless switched off.", axolotl.REFUSED))
    return "\n".join(parts)


def _section(group: type[BaseModel], title: str) -> str:
    rows = [f"| `{name}` | {_kind(info)} | {_default(info)} | {_sentence(info)} |" for name, info in group.model_fields.items()]
    return "\n".join([f"## {title}\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _sentence(info: FieldInfo) -> str:
    also = f" Also written `{info.alias}`." if info.alias else ""
    return f"{info.description}{also}".replace("|", "\\|")


def _kind(info: FieldInfo) -> str:
    """The type in words a reader of YAML knows."""
    return _plain(info.annotation)


def _plain(annotation: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true/false", type(None): "", Any: "any"}
    if annotation in names:
        return names[annotation]
    origin = typing.get_origin(annotation)
    inner: list[Any] = list(typing.get_args(annotation))
    if origin is typing.Annotated:
        return _plain(inner[0])
    if origin is tuple:
        return f"list of {_plain(inner[0])}"
    if origin is dict:
        return f"mapping to {_plain(inner[1])}"
    if origin is typing.Literal:
        return ", ".join(str(word) for word in inner)
    if inner:
        return " or ".join(word for word in map(_plain, inner) if word)
    return {"DataSource": "entries, see below", "PromptFormat": "mapping, see below"}.get(
        annotation.__name__, "mapping, see below"
    )


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    if info.default is None:
        return ""
    return f"`{str(info.default).lower() if isinstance(info.default, bool) else info.default}`"


def _others(title: str, sentence: str, table: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in table.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    rows = [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]
    return "\n".join([f"## {title}\n", f"{sentence}\n", "| keys | reason |", "|---|---|", *rows, ""])
