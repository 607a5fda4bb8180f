"""Adapters in a vLLM server: each under a name that stands for its weights alone, since the server keeps what it has read under a name.

What is relied on, from vLLM's sources (entrypoints/openai/models/serving.py, lora/peft_helper.py; 2026):

    POST /v1/load_lora_adapter     {lora_name, lora_path, is_3d_lora_weight}; 400 where the name is taken
    POST /v1/unload_lora_adapter   {lora_name}; 404 where it is unknown
    Both only under --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; the server reads the path itself.
    Experts' factors as PEFT saves them (target_parameters) are is_3d_lora_weight, which --enable-mixed-moe-lora-format reads.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from ropewalk.config.serving import Vllm
from ropewalk.engine.upstream import Upstream
from ropewalk.errors import BadInput, ModelError, OutputError, RopewalkError, UpstreamFailed, UpstreamUnknown

LOADED = "already been loaded"
START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-loras 4 --max-lora-rank {rank}{experts}"

log = logging.getLogger("ropewalk.engine")


class VllmAdapters:
    """Those that this process has had loaded."""

    def __init__(self, options: Vllm, upstream: Upstream) -> None:
        self._options, self._upstream = options, upstream
        self._folders: dict[str, Path] = {}  # name there -> folder here
        self._gone: dict[str, Path] = {}  # those that were let go of: who was about to be answered by one still is
        self._unwanted: set[str] = set()  # something is still written with them
        self._turn = asyncio.Lock()

    async def load(self, name: str, folder: Path) -> None:
        """Has the server read it; nothing where it has."""
        async with self._turn:
            self._unwanted.discard(name)
            if name not in self._folders:
                await self._load(name, folder)
                self._folders[name] = folder

    async def restore(self, name: str) -> bool:
        """Has a server that does not know it any more read it once more; whether it did."""
        async with self._turn:
            folder = self._folders.get(name) or self._gone.get(name)
            if folder is None:
                return False
            await self._load(name, folder)
            if name not in self._folders:
                self._folders[name] = folder
                self._unwanted.add(name)
        return True

    async def unload(self, name: str, *, busy: bool) -> None:
        """Has the server let go of it; with `busy`, once `left` says that nothing is written with it any more."""
        if busy:
            self._unwanted.add(name)
            return
        async with self._turn:
            await self._unload(name)

    async def left(self, name: str) -> None:
        """Nothing is written with it at the moment."""
        if name in self._unwanted:
            self._unwanted.discard(name)
            await self.unload(name, busy=False)

    async def close(self) -> None:
        for name in list(self._folders):
            await self._unload(name)

    async def _load(self, name: str, folder: Path) -> None:
        config = await asyncio.to_thread(_checked, folder)
        path = await asyncio.to_thread(self._shared, name, folder)
        asked = {"lora_name": name, "lora_path": path, "is_3d_lora_weight": bool(config.get("target_parameters"))}
        try:
            await self._upstream.tell("load_lora_adapter", asked)
        except BadInput as refused:
            if LOADED not in str(refused):  # by another process of ours: the name stands for these weights
                raise self._refused(config, path, str(refused)) from None
        except UpstreamUnknown as refused:
            raise self._refused(config, path, str(refused)) from None
        except UpstreamFailed as refused:
            if type(refused) is not UpstreamFailed:
                raise
            raise self._refused(config, path, str(refused)) from None

    async def _unload(self, name: str) -> None:
        if (folder := self._folders.pop(name, None)) is not None:
            self._gone[name] = folder
        try:
            await self._upstream.tell("unload_lora_adapter", {"lora_name": name})
        except RopewalkError as error:  # one that is gone, or was started anew, holds it no more; else it is only memory there
            log.info("%s is not unloaded: %s", name, error)
        if self._options.adapters:
            await asyncio.to_thread(shutil.rmtree, Path(self._options.adapters).expanduser() / _filename(name), True)

    def _shared(self, name: str, folder: Path) -> str:
        """Where the server finds it."""
        if not self._options.adapters:
            return str(folder.resolve())
        there = Path(self._options.adapters).expanduser()
        copy = there / _filename(name)
        try:
            if not copy.is_dir():
                there.mkdir(parents=True, exist_ok=True)
                fresh = copy.with_suffix(".new")
                shutil.rmtree(fresh, ignore_errors=True)
                shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("optimizer.pt"))
                fresh.replace(copy)
        except OSError as error:
            raise OutputError(
                f"cannot copy an adapter to {there}, which vllm.adapters names: {error.strerror or error}"
            ) from error
        return f"{(self._options.adapters_there or str(there.resolve())).rstrip('/')}/{copy.name}"

    def _refused(self, config: dict[str, Any], path: str, said: str) -> UpstreamFailed:
        rank = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
        experts = " --enable-mixed-moe-lora-format" if config.get("target_parameters") else ""
        log.error("the vLLM server does not take the adapter %s: %s", path, said)
        return self._upstream.failed(
            f"does not take the adapter: {said}. It must see the adapter's folder, and be started as by "
            f"`{START.format(rank=rank, experts=experts)}`"
        )


def _checked(folder: Path) -> dict[str, Any]:
    """An adapter's configuration; ModelError where no vLLM writes with such an adapter."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    wrong = {
        "is activated LoRA": config.get("alora_invocation_tokens"),
        "is DoRA": config.get("use_dora"),
        "holds whole layers (modules_to_save)": config.get("modules_to_save"),
    }
    if refused := [what for what, there in wrong.items() if there]:
        raise ModelError(
            f"the adapter {refused[0]}, which a vLLM server does not write with; serve it with --engine own, "
            "or merge it with its base and serve that"
        )
    return config


def _filename(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".")
