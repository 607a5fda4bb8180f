"""What is served, by one YAML file: `ropewalk serve --models models.yml`. Without one, all that the registry has published is.

engine: {memory_gb: 4, disk_gb: 50}
retrieval: {chunk: 1500}
embeddings: {base: ./models/e5-small, query: "query: ", passage: "passage: "}     or remote: openai, with url, model, key_env
warm_at_upload: [answers]
preload: [answers]
models:
  answers: {adapter: house}              a name or an alias of the registry, followed when it is shipped anew
  qwen: {base: ./models/qwen3-0.6b, price: {input: 0.1, output: 0.4, cache_read: 0.01, as_of: 2026-11-22}}
  tuned: {adapter: runs/x/adapter, base: ./models/qwen3-0.6b}
  big: {remote: openai, url: http://gpu:8000, model: qwen3-30b, key_env: UPSTREAM_KEY}     another server's; or remote: anthropic
vllm: {url: http://gpu:8000, base: qwen3-30b}     a vLLM server writes in the place of this machine's engine (docs/vllm.md)
jobs: ray                              or {ray: {address: "head:6379", workers: 4}}: trainings on a Ray cluster (docs/ray.md)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from ropewalk.config.cluster import RayCluster, read_cluster
from ropewalk.config.document import Document, Place, read_document
from ropewalk.config.section import made, mapping, only, wrong
from ropewalk.tenants.prices import Price, is_day

Api = Literal["anthropic", "openai"]
KEY_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
POOLINGS = ("", "mean", "cls", "last")
KEYS = ("models", "engine", "retrieval", "embeddings", "preload", "warm_at_upload", "fetch_urls", "vllm", "jobs")
CURRENCY = re.compile(r"[A-Z]{3}")
T = TypeVar("T")


@dataclass(frozen=True)
class Remote:
    """A model that another server answers for."""

    api: Api  # what it speaks: Anthropic's Messages, or OpenAI's chat completions
    url: str
    model: str = ""  # as it is called there; '': as here
    key_env: str = ""  # the environment variable that holds the key
    longest: int = 0  # tokens of its context; 0: not known
    files: str = "inline"  # their text in every request; or upload: copies of them lie there, as long as the files are here


@dataclass(frozen=True)
class ServedModel:
    """One name, and what answers for it."""

    base: str = ""  # a name of the registry, or a folder
    adapter: str = ""  # a name or alias of the registry, or a folder over `base`
    remote: Remote | None = None
    price: Price | None = None


@dataclass(frozen=True)
class EngineOptions:
    """What the engine of each base may use."""

    memory_gb: float = 2.0  # of keys and values in memory
    disk_gb: float = 20.0  # of keys and values on disk, for each base
    int8_on_disk: bool = False  # a fourth of float32's size, at a small error
    dtype: str = "auto"
    device: str = "auto"
    longest: int = 0  # tokens of a conversation; 0: what the model knows
    running: int = 64  # requests that are answered side by side
    waiting: int = 256  # requests that may wait; more are answered 529
    chunk: int = 512  # tokens of a prompt read in one step
    threads: int = 0  # of the CPU; 0: all


@dataclass(frozen=True)
class Retrieval:
    """How files are shown that are longer than a model's context."""

    chunk: int = 1500  # characters of the pieces they are cut into
    tokens: int = 16_384  # of pieces that one question is shown at most; 0: as many as fit


@dataclass(frozen=True)
class Embeddings:
    """What tells how near two texts are in meaning: an encoder of this machine, or another server's /v1/embeddings."""

    base: str = ""  # a folder, or a name that has been pulled
    remote: Remote | None = None
    query: str = ""  # what the model wants before a question ...
    passage: str = ""  # ... and before a passage
    pooling: str = ""  # mean, cls or last; '': as the model's folder says, else mean
    threads: int = 0  # of the CPU; 0: all


@dataclass(frozen=True)
class Vllm:
    """A vLLM server that writes for one base and the adapters over it, in the place of this machine's engine."""

    url: str
    base: str = ""  # a name of the registry, or a folder: tokenizer and chat template are read here; '': the only one published
    model: str = ""  # what the server calls that base; '': the model that it lists first
    key_env: str = ""  # the environment variable that holds the key; '': VLLM_API_KEY, if that is set
    adapters: str = ""  # a folder that both see, to which adapters are copied; '': they are read where they are published
    adapters_there: str = ""  # that folder, as the server sees it


@dataclass(frozen=True)
class Serving:
    """The file. `models` None: whatever the registry has published."""

    models: Mapping[str, ServedModel] | None = None
    engine: EngineOptions = EngineOptions()
    retrieval: Retrieval = Retrieval()
    embeddings: Embeddings | None = None
    preload: tuple[str, ...] = ()  # models whose engines start with the server
    warm_at_upload: tuple[str, ...] = ()  # models that read a file as soon as it is uploaded
    fetch_urls: bool = True  # documents at addresses of the public internet
    vllm: Vllm | None = None  # None: this machine's engine writes
    jobs: RayCluster | None = None  # None: beside this server, on its machine
    folder: Path = field(default=Path("."))  # relative paths are of here

    def price(self, name: str) -> Price | None:
        """What a model's tokens cost."""
        found = (self.models or {}).get(name)
        return found.price if found is not None else None

    def training_price(self, base: str) -> Price | None:
        """What training on a base of the registry costs: the price of the model of that name, or of one that is served from it."""
        if (own := self.price(base)) is not None:
            return own
        served = (one.price for one in (self.models or {}).values() if one.base == base and not one.adapter)
        return next((price for price in served if price is not None), None)


def read_serving(path: Path | str) -> Serving:
    """Reads the file; what is wrong with it is told with its line."""
    document = read_document(path)
    values = document.values
    only(document, (), values, KEYS)
    models: dict[str, ServedModel] | None = None
    if "models" in values:
        named = mapping(document, ("models",), values["models"])
        models = {name: _served(document, ("models", name), found) for name, found in named.items()}
        if not models:
            raise wrong(document, ("models",), "no model is named; leave the key out to serve what the registry has published")
    serving = Serving(
        models,
        made(EngineOptions, document, ("engine",), values.get("engine", {})),
        made(Retrieval, document, ("retrieval",), values.get("retrieval", {})),
        _embeddings(document, values["embeddings"]) if "embeddings" in values else None,
        _names(document, "preload", models),
        _names(document, "warm_at_upload", models),
        _bool(document, "fetch_urls", True),
        _vllm(document, values["vllm"]) if "vllm" in values else None,
        read_cluster(document, values.get("jobs")),
        Path(path).resolve().parent,
    )
    for name in ("memory_gb", "disk_gb", "longest", "threads"):
        if getattr(serving.engine, name) < 0:
            raise wrong(document, ("engine", name), f"{name} is {getattr(serving.engine, name)}; expected 0 or more")
    for name in ("running", "waiting", "chunk"):
        if getattr(serving.engine, name) < 1:
            raise wrong(document, ("engine", name), f"{name} is {getattr(serving.engine, name)}; expected 1 or more")
    for name, least in (("chunk", 100), ("tokens", 0)):
        if (value := getattr(serving.retrieval, name)) < least:
            raise wrong(document, ("retrieval", name), f"{name} is {value}; expected {least} or more")
    return serving


def _served(document: Document, place: Place, found: Any) -> ServedModel:
    values = mapping(document, place, found)
    own = [name.name for name in fields(Remote) if name.name != "api"] if "remote" in values else []
    only(document, place, values, ("base", "adapter", "remote", *own, "price"))
    ways = [key for key in ("base", "adapter", "remote") if key in values]
    if not ways or ("remote" in ways and len(ways) > 1):
        raise wrong(
            document,
            place,
            f"'{place[-1]}' is served by {' and '.join(ways) or 'nothing'}; name a base, an adapter, or a remote",
        )
    for key in ("base", "adapter"):
        if key in values and not isinstance(values[key], str):
            raise wrong(document, (*place, key), f"{key} is {values[key]!r}; expected a name of the registry or a folder")
    remote = _remote(document, place, values) if "remote" in values else None
    price = _price(document, (*place, "price"), values["price"]) if "price" in values else None
    return ServedModel(values.get("base", ""), values.get("adapter", ""), remote, price)


def _embeddings(document: Document, found: Any) -> Embeddings:
    place: Place = ("embeddings",)
    values = mapping(document, place, found)
    own = ("url", "model", "key_env") if "remote" in values else ()
    plain = ("query", "passage", *(() if "remote" in values else ("pooling", "threads")))
    only(document, place, values, ("base", "remote", *own, *plain))
    if ("base" in values) == ("remote" in values):
        raise wrong(document, place, "embeddings need one of a base of this machine, or a remote")
    if values.get("remote", "openai") != "openai":
        raise wrong(
            document, (*place, "remote"), f"remote is {values['remote']!r}; expected openai, whose /v1/embeddings is asked"
        )
    told = {name: values[name] for name in ("base", *plain) if name in values}
    parsed = made(Embeddings, document, place, told)
    if parsed.pooling not in POOLINGS:
        raise wrong(document, (*place, "pooling"), f"pooling is '{parsed.pooling}'; expected mean, cls or last")
    if parsed.threads < 0:
        raise wrong(document, (*place, "threads"), f"threads is {parsed.threads}; expected 0 or more")
    remote = _remote(document, place, values) if "remote" in values else None
    if remote is not None and not remote.model:
        raise wrong(document, place, "embeddings of a remote need the name of its model")
    return replace(parsed, remote=remote)


def _price(document: Document, place: Place, found: Any) -> Price:
    price = made(Price, document, place, found)
    for name in ("input", "output", "cache_read", "cache_creation", "training", "device_hour"):
        amount = getattr(price, name)
        if amount is not None and not 0 <= amount < math.inf:
            per = "an hour" if name == "device_hour" else "a million tokens"
            raise wrong(document, (*place, name), f"{name} is {amount}; expected 0 or more, for {per}")
    if not CURRENCY.fullmatch(price.currency):
        raise wrong(document, (*place, "currency"), f"currency is '{price.currency}'; expected three letters, such as USD")
    if price.as_of and not is_day(price.as_of):
        raise wrong(document, (*place, "as_of"), f"as_of is '{price.as_of}'; expected a day, such as 2026-11-22")
    return price


def _remote(document: Document, place: Place, values: Mapping[str, Any]) -> Remote:
    if values["remote"] not in get_args(Api):
        raise wrong(document, (*place, "remote"), f"remote is {values['remote']!r}; expected {' or '.join(get_args(Api))}")
    own = {f.name: values[f.name] for f in fields(Remote) if f.name in values}
    remote = made(Remote, document, place, {**own, "api": values["remote"]}, required=("url",))
    _address(document, (*place, "url"), remote.url)
    _variable(document, (*place, "key_env"), remote.key_env)
    if remote.files not in ("inline", "upload"):
        raise wrong(document, (*place, "files"), f"files is {remote.files!r}; expected inline or upload")
    if remote.files == "upload" and remote.api != "anthropic":
        raise wrong(document, (*place, "files"), "files: upload needs remote: anthropic; chat completions know no files")
    if remote.longest < 0:
        raise wrong(document, (*place, "longest"), f"longest is {remote.longest}; expected 0 or more")
    return remote


def _vllm(document: Document, found: Any) -> Vllm:
    place: Place = ("vllm",)
    vllm = made(Vllm, document, place, mapping(document, place, found), required=("url",))
    _address(document, (*place, "url"), vllm.url)
    _variable(document, (*place, "key_env"), vllm.key_env)
    if vllm.adapters_there and not vllm.adapters:
        raise wrong(
            document, (*place, "adapters_there"), "adapters_there says how the server sees the folder `adapters`; name both"
        )
    return vllm


def _address(document: Document, place: Place, url: str) -> None:
    if (why := wrong_address(url)) is not None:
        raise wrong(document, place, why)


def _variable(document: Document, place: Place, name: str) -> None:
    if name and not KEY_ENV.fullmatch(name):
        # Not repeated: it may be the key itself.
        raise wrong(document, place, "key_env is no name of an environment variable, such as UPSTREAM_KEY")


def wrong_address(url: str) -> str | None:
    """Why this is no address of a server; None for one that may be."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        named = False
    if not named or parts.scheme not in ("http", "https"):
        return f"url '{url}' is no address; expected http://... or https://..."
    if parts.username is not None or parts.query or parts.fragment:
        return "url holds a user, a query or a fragment; a key is named by key_env, and stands in no file"
    return None


def _names(document: Document, key: str, models: Mapping[str, ServedModel] | None) -> tuple[str, ...]:
    found = document.values.get(key, [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise wrong(document, (key,), f"{key} is {found!r}; expected a list of names of models")
    for name in found:
        if models is not None and name not in models:
            raise wrong(document, (key,), f"{key} names '{name}', which is not served; known: {', '.join(models)}")
    return tuple(found)


def _bool(document: Document, key: str, default: bool) -> bool:
    found = document.values.get(key, default)
    if not isinstance(found, bool):
        raise wrong(document, (key,), f"{key} is {found!r}; expected true or false")
    return found
