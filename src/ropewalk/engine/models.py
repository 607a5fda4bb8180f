"""What is served: names and aliases -> whoever answers for them. Engines start at first use, adapters are loaded as they are asked for.

name -> folders of this machine, or a remote -> engine, adapter -> Answerer
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from ropewalk.chat.messages import Document, FileId, Image, MessagesRequest, Turn, Usage
from ropewalk.chat.template import Template
from ropewalk.chat.tokenizer import own_source, read_json
from ropewalk.config.serving import Remote, Serving, Vllm
from ropewalk.engine.answer import Answerer, Places
from ropewalk.engine.client import EngineClient
from ropewalk.engine.counted import Answers, Counted
from ropewalk.engine.embedding import Encoded, LocalEncoder, Meanings, RemoteEncoder
from ropewalk.engine.lines import EngineSettings
from ropewalk.engine.remote import RemoteAnswerer
from ropewalk.engine.remote_files import PLACE, RemoteFiles, erase
from ropewalk.engine.sources import Sources
from ropewalk.engine.token_engine import TokenEngine
from ropewalk.engine.upstream import Upstream, http_client
from ropewalk.engine.vllm import VllmEngine
from ropewalk.errors import ConfigError, EngineDied, NotFound, Overloaded, RopewalkError
from ropewalk.files.catalog import File
from ropewalk.files.fetch import fetch
from ropewalk.files.pictures import is_picture
from ropewalk.files.store import Store
from ropewalk.files.token_ledger import TokenLedger
from ropewalk.models.folder import sees
from ropewalk.models.hub import cached_folder, ensure_tokenizer
from ropewalk.models.identity import stamp, weights_digest
from ropewalk.registry import Entry, Registry
from ropewalk.tenants.caller import RIGHTS, Caller
from ropewalk.vault import derive

START_SECONDS = 45.0  # a request waits so long for its model to be loaded; the SDK's own patience is 10 minutes
RETRY_SECONDS = 15.0
LEND_SECONDS = 120.0  # an answer that takes longer is cut off when a job wants the device
LENT = "a training job has the device; ask again in a while"
THINKING = ("<think>", "[THINK]", "<|channel", "enable_thinking", "reasoning_content")  # in a chat template
AHEAD = 2  # files that are read ahead at once: questions come first
AHEAD_TRIES = 20
PROBE = "The lighthouse was built in 1907; its light reaches 23 miles.\n\tÜber alles: 灯台!"  # two bases read it as other ids

log = logging.getLogger("ropewalk.engine")


@dataclass(frozen=True)
class Senses:
    """What a base can do beside reading and writing text, as far as its folder says."""

    sees: bool
    thinks: bool


@dataclass(frozen=True)
class Listed:
    """A served model, as lists show it."""

    name: str
    shown: str
    created: str
    longest: int | None  # tokens; None: not known before it has been loaded
    senses: Senses | None = None  # None: a remote, or its folder cannot be read


@dataclass(frozen=True)
class Target:
    """What a name stands for now: folders of this machine, or (both None) the remote of that name."""

    base: Path | None = None
    adapter: Path | None = None


@dataclass
class Base:
    """A base and its engine."""

    stamp: str
    weights: str
    template: Template
    client: TokenEngine
    adapters: dict[str, Adapter] = field(default_factory=dict)  # stamp -> what the engine has loaded
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    starting: asyncio.Task[None] | None = None

    @property
    def loading(self) -> bool:
        """Whether its engine is on its way, and somebody may wait for it."""
        return self.starting is not None and not self.starting.done()


@dataclass(frozen=True)
class Adapter:
    """An adapter in an engine."""

    name: str  # there
    folder: Path
    digest: str
    invocation: tuple[int, ...] | None  # of an activated one


class Models:
    """The models of one server."""

    def __init__(self, store: Store, registry: Registry, serving: Serving | None = None) -> None:
        self.store, self.registry, self.serving = store, registry, serving or Serving()
        self.ledger = TokenLedger(store.database)
        self._sources = Sources(store, fetch if self.serving.fetch_urls else None)
        self._places = Places(store)
        self._bases: dict[Path, Base] = {}
        self._http: httpx.AsyncClient | None = None  # to the servers of remote models
        self._remotes: dict[str, RemoteAnswerer] = {}
        self._remote_files = RemoteFiles(store)
        self._meanings: Meanings | None = None  # made at the first question
        self._stood: dict[str, Path | None] = {}  # with vLLM: names that were asked for -> their adapters, None: their bases
        self._opening = asyncio.Lock()
        self._lent, self._lent_bases = "", list[Path]()  # why no engine may start, while a job has the device; those that ran
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._ahead: set[asyncio.Task[None]] = set()  # files that are being read, or wait for it
        self._reading_ahead = asyncio.Semaphore(AHEAD)
        # Puts an adapter's folder there that lies with another server; whoever knows how lies above this room.
        self.bring: Callable[[Path], Awaitable[None]] | None = None
        store.forgetters.append(self.forget)
        store.erasers[PLACE] = self._erase_copy
        store.arrivals.append(self._arrived)

    async def answerer(self, name: str, caller: Caller | None = None, *, loaded: bool = True) -> Answers:
        """Who answers for this name now, to this caller (None: the machine itself). `loaded`: to answer, not only to count."""
        await asyncio.to_thread(self.admit, name, caller)
        return Counted(name, await self._answerer(name, loaded), self.ledger)

    async def _answerer(self, name: str, loaded: bool) -> Answers:
        target = await asyncio.to_thread(self.target, name)
        if target.base is None:
            return self._remote(name)
        base = await self._base(target.base)
        places = self._places if self.serving.vllm is None else None  # what a vLLM server has read lies in its own memory
        parts = self.store, self._sources, places, base.client, base.template, base.weights
        answerer = Answerer(*parts, retrieval=self.serving.retrieval, meanings=self._meant())
        if not loaded:
            return answerer
        await self._started(name, base)
        adapter = await self._adapter(base, target.adapter) if target.adapter is not None else None
        await self._let_go(base, name, target.adapter)
        if adapter is None:
            return answerer
        return replace(answerer, adapter=adapter.name, adapter_digest=adapter.digest, invocation=adapter.invocation)

    async def brought(self, target: Target) -> None:
        """Has an adapter lie here that another server has made."""
        if self.bring is not None and target.adapter is not None and not target.adapter.is_dir():
            await self.bring(target.adapter)

    async def load(self, target: Target) -> None:
        """Makes what lies in these folders ready to answer, whatever name it will be asked by."""
        if target.base is not None:
            base = await self._base(target.base)
            await self._started(target.base.name, base)
            if target.adapter is not None:
                await self._adapter(base, target.adapter)

    async def follow(self, alias: str) -> None:
        """An alias was moved: a vLLM server is told at once, and not by the next who asks."""
        if self.serving.vllm is not None:
            try:
                await self._answerer(alias, loaded=True)
            except RopewalkError as error:  # whoever asks next is told
                log.warning("'%s' was moved, and the vLLM server does not follow: %s", alias, error)

    async def well(self) -> bool | None:
        """Whether the vLLM server answers; None where there is none."""
        if self.serving.vllm is None:
            return None
        try:
            base = await self._base(await asyncio.to_thread(self._vllm_base, self.serving.vllm))
        except RopewalkError:
            return False
        assert isinstance(base.client, VllmEngine)
        return await base.client.well()

    async def warm(self, caller: Caller, name: str, file_id: str) -> Usage:
        """Reads a file ahead of the first question about it."""
        picture = is_picture(await self.store.show(caller, file_id))
        block = Image(FileId(file_id)) if picture else Document(FileId(file_id))
        request = MessagesRequest(name, 0, (Turn("user", (block,)),))
        return await (await self.answerer(name, caller)).warm(caller, request)

    def admit(self, name: str, caller: Caller | None) -> None:
        """NotFound for what was trained in another workspace, or for another of its users; an alias is everybody's."""
        if caller is None or (self.serving.models is not None and name in self.serving.models):
            return
        try:
            entry = self.registry.resolve(name)
        except NotFound:  # a name of the serving configuration, or none: that is told where it is looked up
            return
        if entry.name == name and not _may_see(caller, entry):
            raise _unknown(name)

    def listed(self, caller: Caller | None = None) -> list[Listed]:
        """All that is served to a caller (None: to anybody), newest first."""
        entries = {entry.name: entry for entry in self.registry.entries()}
        if self.serving.models is not None:
            trained = [name for name, entry in entries.items() if "job" in entry.lineage and name not in self.serving.models]
            names = [*self.serving.models, *(name for name in trained if caller is None or _may_see(caller, entries[name]))]
        else:
            seen = [name for name, entry in entries.items() if caller is None or _may_see(caller, entry)]
            names = [*seen, *(alias for alias, to in self.registry.aliases().items() if to in entries)]
        found = [self._listed(name) for name in dict.fromkeys(names) if self._is_answered(name)]
        return sorted(found, key=lambda listed: (listed.created, listed.name), reverse=True)

    def find(self, name: str, caller: Caller | None = None) -> Listed:
        """One of them; NotFound for a name that is not served."""
        self.admit(name, caller)
        if self.serving.models is not None and name not in self.serving.models and not self._by_job(name):
            raise _unknown(name)
        return self._listed(name)

    @property
    def embedding(self) -> Listed | None:
        """The encoder of texts, where one is configured."""
        options = self.serving.embeddings
        if options is None:
            return None
        name = options.remote.model if options.remote is not None else Path(options.base).name
        return Listed(name, name, self._since, None)

    async def embed(self, texts: Sequence[str]) -> Encoded:
        """Vectors of texts, as the encoder that is configured makes them."""
        meanings = self._meant()
        assert meanings is not None, "callers look at `embedding` first"
        return await meanings.encoded(texts)

    async def preload(self) -> None:
        """Starts the engines that shall not wait for the first question; what keeps one from starting is logged."""
        for name in self.serving.preload:
            try:
                await self.answerer(name)
            except Overloaded:
                continue  # it goes on loading
            except RopewalkError as error:
                log.error("%s cannot be loaded: %s", name, error)

    async def forget(self, paths: Sequence[str]) -> None:
        """Drops what was read from deleted files from the memory of all engines."""
        for base in self._bases.values():
            with suppress(EngineDied):
                await base.client.forget(paths)

    async def forget_gone(self, digests: Collection[str] | None = None) -> None:
        """The same for files that another server has deleted, whose ids have these digests; None: for all that are no more."""
        if paths := await self._places.let_go(digests):
            await self.forget(paths)

    async def flush(self) -> None:
        """Returns when all that was read is on disk."""
        for base in self._bases.values():
            await base.client.flush()

    async def stats(self) -> dict[str, Any]:
        """What the engines' prefix stores did, by base."""
        return {str(folder): await base.client.stats() for folder, base in self._bases.items()}

    async def lend(self) -> None:
        """Answers what is being answered, ends all engines and so frees their device; until it is taken back, no answer is begun."""
        self._lent = LENT
        for base in self._bases.values():
            base.client.held = LENT
        late = time.monotonic() + LEND_SECONDS
        while any(base.client.busy or base.loading for base in self._bases.values()) and time.monotonic() < late:
            await asyncio.sleep(0.05)
        self._lent_bases = [folder for folder, base in self._bases.items() if base.client.running]
        for base in self._bases.values():
            await _stop(base)

    async def take_back(self) -> None:
        """Answers again; engines that ran before are started again."""
        self._lent = ""
        for folder, base in self._bases.items():
            base.client.held = ""
            if folder in self._lent_bases:
                base.starting = asyncio.create_task(base.client.start())
                base.starting.add_done_callback(_noticed)
        self._lent_bases = []

    async def close(self) -> None:
        """Ends all engines."""
        self.store.forgetters.remove(self.forget)
        self.store.erasers.pop(PLACE, None)
        self.store.arrivals.remove(self._arrived)
        for task in self._ahead:
            task.cancel()
        for base in self._bases.values():
            await _stop(base)
        self._bases.clear()
        if self._http is not None:
            await self._http.aclose()
            self._http = None
            self._remotes.clear()
        if self._meanings is not None:
            await self._meanings.close()
            self._meanings = None
        await self.ledger.close()

    # -- files read as they are uploaded

    def _arrived(self, caller: Caller, file: File) -> None:
        for name in self.serving.warm_at_upload:
            task = asyncio.create_task(self._read_ahead(caller, name, file.id))
            self._ahead.add(task)
            task.add_done_callback(self._ahead.discard)

    async def _read_ahead(self, caller: Caller, name: str, file_id: str) -> None:
        """Reads a new file, when there is room for it; one that cannot be read is told to whoever asks about it."""
        caller = replace(caller, rights=RIGHTS)  # it is the server that reads: a key may only upload
        async with self._reading_ahead:
            for _ in range(AHEAD_TRIES):
                try:
                    await self.warm(caller, name, file_id)
                    return
                except Overloaded:
                    await asyncio.sleep(RETRY_SECONDS)
                except RopewalkError as error:
                    log.info("%s is not read ahead for %s: %s", file_id, name, type(error).__name__)
                    return

    # -- names

    def target(self, name: str) -> Target:
        """What a name stands for now; NotFound for one that is not served."""
        if self.serving.models is None:
            return self._published(name)
        served = self.serving.models.get(name)
        if served is None:
            if self._by_job(name):
                return self._published(name)
            raise _unknown(name)
        if served.remote is not None:
            return Target()
        base = self._base_folder(served.base) if served.base else None
        if not served.adapter:
            return Target(base)
        folder = self.serving.folder / served.adapter
        if base is not None and (folder / "adapter_config.json").is_file():
            return Target(base, folder.resolve())
        found = self._published(served.adapter)
        return found if base is None else Target(base, found.adapter)

    def _by_job(self, name: str) -> bool:
        """Whether a job has made it: that is served at once, also where names are listed."""
        try:
            entry = self.registry.resolve(name)
        except NotFound:
            return False
        return entry.name == name and "job" in entry.lineage

    def _published(self, name: str) -> Target:
        try:
            entry = self.registry.resolve(name)
            base = self.registry.resolve(entry.base) if entry.base is not None else entry
        except NotFound:
            raise _unknown(name) from None
        return Target(Path(base.path), Path(entry.path) if entry.kind == "adapter" else None)

    def _base_folder(self, name: str) -> Path:
        folder = self.serving.folder / Path(name).expanduser()
        if (folder / "config.json").is_file():
            return folder.resolve()
        with suppress(NotFound):
            return self._published(name).base or folder
        if (cached := cached_folder(name)) is not None:
            return cached
        raise ConfigError(
            f"base '{name}' is no folder, no name of the registry, and not downloaded: ropewalk models pull {name}"
        )

    def _vllm_base(self, vllm: Vllm) -> Path:
        """The folder of the base that the vLLM server writes for."""
        if vllm.base:
            return self._base_folder(vllm.base)
        bases = [entry for entry in self.registry.entries() if entry.kind == "base"]
        if len(bases) != 1:
            raise ConfigError(
                f"which base the vLLM server serves is not said, and {len(bases)} are published here; name it by --vllm-base, or "
                "by `base` in the block vllm of the file of models"
            )
        return Path(bases[0].path)

    def name_behind(self, name: str) -> str:
        """What an alias points at now; any other name is its own."""
        if name in (self.serving.models or ()):
            return name
        try:
            return self.registry.resolve(name).name
        except NotFound:
            return name

    def is_here(self, name: str) -> bool:
        """Whether this machine's engine answers for it, and not another server."""
        return self.serving.vllm is None and self.target(name).base is not None

    def _is_answered(self, name: str) -> bool:
        """Whether somebody is there to answer for it: a vLLM server does for one base."""
        if self.serving.vllm is None or (base := self.target(name).base) is None:
            return True
        with suppress(ConfigError):  # which base it is, whoever asks is told
            return base == self._vllm_base(self.serving.vllm)
        return True

    def _listed(self, name: str) -> Listed:
        target = self.target(name)
        if target.base is None:
            remote = (self.serving.models or {})[name].remote
            return Listed(name, name, self._since, (remote.longest if remote is not None else 0) or None)
        opened = self._bases.get(target.base)
        longest = opened.client.longest if opened is not None else 0
        try:
            entry = self.registry.resolve(name)
        except NotFound:
            written = datetime.fromtimestamp((target.adapter or target.base).stat().st_mtime, UTC)
            return Listed(name, name, written.isoformat(timespec="seconds"), longest or None, self._senses(target.base))
        shown = entry.name if entry.base is None else f"{entry.name} (over {entry.base})"
        return Listed(
            name,
            shown if name == entry.name else f"{name}, now {shown}",
            entry.created,
            longest or None,
            self._senses(target.base),
        )

    def _senses(self, folder: Path) -> Senses | None:
        found = _senses(folder)
        return replace(found, sees=found.sees and self.serving.vllm is None) if found is not None else None

    # -- engines

    async def _base(self, folder: Path) -> Base:
        mark = await asyncio.to_thread(stamp, folder)
        async with self._opening:
            base = self._bases.get(folder)
            if base is None or base.stamp != mark:
                if base is not None:  # other weights lie there now
                    await _stop(base)
                if self.serving.vllm is None:
                    weights, template = await asyncio.to_thread(_opened, folder)
                    base = Base(mark, weights, template, EngineClient(self._settings(folder, weights)))
                    base.client.held = self._lent
                else:
                    base = await asyncio.to_thread(self._elsewhere, self.serving.vllm, folder, mark)
                self._bases[folder] = base
            return base

    def _elsewhere(self, vllm: Vllm, folder: Path, mark: str) -> Base:
        """A base that a vLLM server writes for. Its weights need not lie here: tokenizer and chat template are read."""
        own = self._vllm_base(vllm)
        if folder != own:
            raise ConfigError(
                f"the base in '{folder.name}' is not the one that the vLLM server writes for, which is '{own.name}'; "
                "serve it by another `ropewalk serve`, or as a remote in the file of models"
            )
        template = Template.load(ensure_tokenizer(folder))
        self._http = self._http or http_client()
        key = vllm.key_env or ("VLLM_API_KEY" if os.environ.get("VLLM_API_KEY") else "")
        upstream = Upstream(vllm.base or folder.name, Remote("openai", vllm.url, key_env=key), self._http)
        probe = PROBE, template.encode_content(PROBE)
        return Base(mark, "", template, VllmEngine(folder, vllm, upstream, derive(self.store.cursor_key, "vllm"), probe))

    def _settings(self, folder: Path, weights: str) -> EngineSettings:
        options = self.serving.engine
        return EngineSettings(
            base=str(folder),
            weights=weights,
            dtype=options.dtype,
            device=options.device,
            memory_bytes=round(options.memory_gb * (1 << 30)),
            disk_bytes=round(options.disk_gb * (1 << 30)),
            folder=str(self._places.folder(weights)),
            int8_on_disk=options.int8_on_disk,
            running=options.running,
            waiting=options.waiting,
            chunk=options.chunk,
            longest=options.longest or None,
            threads=options.threads or None,
        )

    async def _started(self, name: str, base: Base) -> None:
        """Waits for the engine. It goes on starting when whoever waited for it leaves."""
        if base.client.running:
            return
        if base.starting is None or base.starting.done():
            base.starting = asyncio.create_task(base.client.start())
        await asyncio.wait({base.starting}, timeout=START_SECONDS)
        if not base.starting.done():
            error = Overloaded(f"{name} is being loaded; ask again in a moment")
            error.retry_after = RETRY_SECONDS
            raise error
        base.starting.result()

    async def _adapter(self, base: Base, folder: Path) -> Adapter:
        await self.brought(Target(adapter=folder))
        mark = await asyncio.to_thread(stamp, folder)
        async with base.busy:
            if mark not in base.adapters:
                config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
                invocation = config.get("alora_invocation_tokens")
                name = mark if self.serving.vllm is None else f"{self._published_as(folder)}@{mark[:12]}"
                digest = await base.client.load_adapter(name, folder)
                base.adapters[mark] = Adapter(name, folder, digest, tuple(invocation) if invocation else None)
            return base.adapters[mark]

    def _published_as(self, folder: Path) -> str:
        """What an adapter is called where others read its name."""
        return next((entry.name for entry in self.registry.entries() if Path(entry.path) == folder), folder.name)

    async def _let_go(self, base: Base, name: str, adapter: Path | None) -> None:
        """An adapter that none of the names stands for any more by which somebody has asked leaves the vLLM server."""
        if not isinstance(base.client, VllmEngine):
            return
        left, self._stood[name] = self._stood.get(name), adapter
        if left is None or left in self._stood.values():
            return
        async with base.busy:
            for mark in [mark for mark, one in base.adapters.items() if one.folder == left]:
                await base.client.unload_adapter(base.adapters.pop(mark).name)

    def _meant(self) -> Meanings | None:
        options = self.serving.embeddings
        if options is not None and self._meanings is None:
            encoder: LocalEncoder | RemoteEncoder
            if options.remote is not None:
                self._http = self._http or http_client()
                encoder = RemoteEncoder(Upstream("embeddings", options.remote, self._http))
            else:
                encoder = LocalEncoder(self._base_folder(options.base), options.pooling, options.threads)
            self._meanings = Meanings(self.store, encoder, options)
        return self._meanings

    def _remote(self, name: str) -> RemoteAnswerer:
        if name not in self._remotes:
            remote = (self.serving.models or {})[name].remote
            assert remote is not None
            if self._http is None:
                self._http = http_client()
            upstream = Upstream(name, remote, self._http)
            self._remotes[name] = RemoteAnswerer(self.store, self._sources, upstream, self._remote_files)
        return self._remotes[name]

    async def _erase_copy(self, stored: str) -> bool:
        """Deletes a copy of a file from the other server that has it; False where that is none of those that are served."""
        for name, served in (self.serving.models or {}).items():
            if served.remote is not None and await erase(self._remote(name).upstream, stored):
                return True
        return False


def _senses(folder: Path) -> Senses | None:
    try:
        template = own_source(folder, read_json(folder / "tokenizer_config.json")) or ""
        return Senses(sees(folder), any(word in template for word in THINKING))
    except (RopewalkError, OSError, ValueError):
        return None


def _opened(folder: Path) -> tuple[str, Template]:
    return weights_digest(folder), Template.load(ensure_tokenizer(folder))


async def _stop(base: Base) -> None:
    if base.starting is not None:
        base.starting.cancel()
        with suppress(RopewalkError, asyncio.CancelledError):
            await base.starting
    await base.client.stop()


def _noticed(starting: asyncio.Task[None]) -> None:
    if not starting.cancelled() and (error := starting.exception()) is not None:  # whoever asks next is told
        log.error("an engine has not come back: %s", error)


def _may_see(caller: Caller, entry: Entry) -> bool:
    """Whether what was trained in a workspace, if it was, is the caller's."""
    workspace, user = entry.lineage.get("workspace"), entry.lineage.get("user")
    return workspace in (None, caller.workspace_id) and (user is None or caller.user_id in (None, user))


def _unknown(name: str) -> NotFound:
    return NotFound(f"model: {name[:200]}")
