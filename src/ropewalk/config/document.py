"""A YAML file and the line of each of its keys: the one door to YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ropewalk.errors import ConfigError

Place = tuple[str | int, ...]  # ("datasets", 0, "path")
# The fast parser of libyaml where the wheel has it; both give the same nodes.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """YAML 1.1 as PyYAML reads it, but `1e-4` is a number and dates stay texts."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in table if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for letter, table in _Base.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


@dataclass
class Document:
    """The values of a configuration, without those left blank, and where each key stands."""

    path: Path | None
    values: dict[str, Any]
    lines: dict[Place, int] = field(default_factory=dict)
    blank: list[Place] = field(default_factory=list)
    overrides: dict[Place, str] = field(default_factory=dict)

    def line(self, place: Sequence[str | int]) -> int | None:
        """The line of a key, or of the nearest key above it."""
        for end in range(len(place), 0, -1):
            if tuple(place[:end]) in self.overrides:
                return None
            if tuple(place[:end]) in self.lines:
                return self.lines[tuple(place[:end])]
        return None

    def override(self, place: Sequence[str | int]) -> str | None:
        """The `key=value` of the command line that a key came from."""
        return next(
            (self.overrides[tuple(place[:n])] for n in range(len(place), 0, -1) if tuple(place[:n]) in self.overrides), None
        )

    def where(self, place: Sequence[str | int]) -> str:
        """`file.yml:12: `, to stand before a message."""
        if given := self.override(place):
            return f"override '{given}': "
        line = self.line(place)
        return f"{self.path}:{line}: " if self.path and line else f"{self.path}: " if self.path else ""


def read_document(path: Path | str, overrides: Sequence[str] = ()) -> Document:
    """Reads a YAML file and lays `key=value` overrides over it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; check the path") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a YAML file: {error}") from None
    return parse_document(text, overrides, path)


def parse_document(text: str, overrides: Sequence[str] = (), path: Path | None = None) -> Document:
    """The same from a text."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ConfigError(f"not valid YAML: {error.problem}", path=path, line=mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", path=path) from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            "a configuration is a mapping of keys to values, for example `base_model: my/model`", path=path, line=1
        )
    document = Document(path, {})
    try:
        document.values = _mapping(node, (), document)
    except RecursionError:
        raise ConfigError("an anchor contains itself; write the values out", path=path) from None
    for override in overrides:
        _override(document, override)
    return document


def dump(values: Mapping[str, Any]) -> str:
    """Values as YAML, in the order given."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
    return text


def _mapping(node: yaml.MappingNode, place: Place, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError("a key is a plain word", path=document.path, line=key_node.start_mark.line + 1)
    for key_node, value_node in _merged(node):
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"key '{key}' is given twice, first on line {seen[key]}; keep one", path=document.path, line=line)
        seen[key] = line
        here = (*place, key)
        document.lines[here] = line
        value = _value(value_node, here, document)
        if value is None:
            document.blank.append(here)
        else:
            result[key] = value
    return result


def _merged(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The pairs of a mapping; those of a `<<: *anchor` come first and may be overwritten."""
    own = [(k, v) for k, v in node.value if k.tag != "tag:yaml.org,2002:merge"]
    names = {k.value for k, _ in own}
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in sources:
                if isinstance(source, yaml.MappingNode):
                    yield from ((k, v) for k, v in source.value if k.value not in names)
    yield from own


def _value(node: yaml.Node, place: Place, document: Document) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, place, document)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            document.lines[(*place, index)] = item.start_mark.line + 1
            items.append(_value(item, (*place, index), document))
        return items
    try:
        return _scalar(node)
    except ValueError as error:
        raise ConfigError(f"key '{dotted(place)}': {error}", path=document.path, line=node.start_mark.line + 1) from None


def _scalar(node: yaml.Node) -> Any:
    maker = yaml.SafeLoader("")
    try:
        return maker.construct_object(node)
    except yaml.YAMLError as error:
        raise ValueError(f"the YAML tag {node.tag} is not allowed; write a plain value") from error


def _override(document: Document, text: str) -> None:
    name, equals, raw = text.partition("=")
    if not equals or not name:
        raise ConfigError(
            f"override '{text}': expected key=value, for example learning_rate=1e-4 or datasets.0.path=rows.jsonl"
        )
    place: Place = tuple(int(part) if part.isdigit() else part for part in name.strip().removeprefix("--").split("."))
    try:
        node = yaml.compose(raw, Loader=_Loader)
        value = None if node is None else _value(node, place, Document(None, {}))
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"override '{text}': the value is not valid YAML; quote it") from None
    document.overrides[place] = text
    try:
        _put(document.values, place, value)
    except (TypeError, IndexError, KeyError):
        raise ConfigError(f"override '{text}': there is no '{dotted(place[:-1])}' to set it in") from None


def _put(target: Any, place: Place, value: Any) -> None:
    part: Any
    last: Any
    for part, following in pairwise(place):
        fresh: Any = [] if isinstance(following, int) else {}
        if isinstance(target, list) and part == len(target):
            target.append(fresh)
        elif isinstance(target, dict) and part not in target:
            target[part] = fresh
        target = target[part]
    last = place[-1]
    if isinstance(target, list) and last == len(target):
        target.append(value)
    elif value is None and isinstance(target, dict):
        target.pop(last, None)
    else:
        target[last] = value


def dotted(place: Sequence[str | int]) -> str:
    """datasets.0.path"""
    return ".".join(map(str, place))
