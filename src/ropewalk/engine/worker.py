"""The engine as a process of its own: requests come in as lines of JSON on standard input, what they bring goes out on standard output.

Nothing but lines of ours is ever written to that output: whatever else prints, prints to the error stream.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import resource
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

import torch

from ropewalk.chat.replies import stop_ids
from ropewalk.chat.template import Template
from ropewalk.engine.adapters import Adapters
from ropewalk.engine.engine import Engine
from ropewalk.engine.grammar import Grammars
from ropewalk.engine.lines import EngineSettings, read_request, write_event
from ropewalk.engine.prefixes import Prefixes
from ropewalk.engine.runner import Runner
from ropewalk.engine.scheduler import Limits
from ropewalk.engine.sight import Sight
from ropewalk.errors import ModelError, RopewalkError
from ropewalk.models.blocked import arrange
from ropewalk.models.folder import sees
from ropewalk.models.hub import ensure_tokenizer
from ropewalk.models.load import load_base
from ropewalk.models.seeing import load_seeing

Command = dict[str, Any]

log = logging.getLogger("ropewalk.engine")


def main() -> None:
    """Serves one base until its input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        engine = build(EngineSettings(**json.loads(sys.stdin.readline())))
    except RopewalkError as error:
        _write(out, {"failed": type(error).__name__, "message": str(error)})
        return
    ready = {"ready": True, "longest": engine.longest, "device": str(engine.runner.device)}
    if isinstance(engine.sight, Sight):
        ready["sight"] = {"token": engine.sight.token, "digest": engine.sight.digest}
    _write(out, ready)
    commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(commands,), daemon=True).start()
    Server(engine, commands, out).run()


def build(settings: EngineSettings) -> Engine:
    """An engine over the base of these settings."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folder = Path(settings.base)
    template = Template.load(ensure_tokenizer(folder))
    model, sight = _loaded(folder, _precision(settings, folder), settings)
    runner = Runner(model)
    if settings.quantize is None:
        arrange(runner.model)
    adapters = Adapters(runner.model)
    prefixes = Prefixes(
        runner.layout,
        f"{settings.weights} {settings.quantize or runner.model.dtype} {template.digest}",
        memory_bytes=settings.memory_bytes,
        disk_bytes=settings.disk_bytes,
        folder=Path(settings.folder) if settings.folder else None,
        disk_format="int8" if settings.int8_on_disk else "exact",
        device=runner.device,
    )
    grammars = Grammars(ensure_tokenizer(folder) / "tokenizer.json", stop_ids(template))
    limits = Limits(settings.running, settings.waiting, settings.chunk)
    return Engine(runner, prefixes, adapters, grammars, limits, settings.longest, sight)


def _precision(settings: EngineSettings, folder: Path) -> torch.dtype | str:
    """As asked for; otherwise the weights' own, except on a CPU that computes it slowly or not at all."""
    if settings.dtype != "auto" or (torch.cuda.is_available() and settings.device != "cpu"):
        return settings.dtype
    kinds = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    quick = any(known is not None and known() for known in kinds)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = config.get("dtype") or config.get("torch_dtype")
    return "auto" if own == "bfloat16" and quick else torch.float32


def _loaded(folder: Path, dtype: torch.dtype | str, settings: EngineSettings) -> tuple[Any, Sight | None]:
    """The model that writes, and its eyes if it has some that can be used here; one in fewer bits has none."""
    if sees(folder) and settings.quantize is None:
        try:
            seeing = load_seeing(folder, dtype=dtype, device=settings.device)
            return seeing.text, Sight(seeing)
        except ModelError as error:
            log.warning("%s is served without its eyes: %s", folder, error)
    return load_base(folder, dtype=dtype, device=settings.device, quantize=settings.quantize), None


def _peak() -> int:
    """Bytes that this process has held at most, on its device and beside it."""
    device = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return device + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Server:
    """Commands in, events out, a step at a time."""

    def __init__(self, engine: Engine, commands: queue.SimpleQueue[Command | None], out: TextIO) -> None:
        self.engine, self.commands, self.out = engine, commands, out

    def run(self) -> None:
        while self._take():
            if self.engine.busy:
                events = self.engine.step()
                if events:
                    _write(self.out, {"events": [write_event(event) for event in events]})

    def _take(self) -> bool:
        """Does what was asked meanwhile; waits if there is nothing else to do. False once the input has ended."""
        while not self.engine.busy or not self.commands.empty():
            command = self.commands.get()
            if command is None:
                self._prefixes().close()
                return False
            try:
                answer = self._do(command)
            except RopewalkError as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            if "call" in command:
                _write(self.out, {"call": command["call"], **answer})
        return True

    def _do(self, command: Command) -> Command:
        match command["do"]:
            case "submit":
                request = read_request(command["request"])
                if lacking := self.engine.lacking(request):
                    return {"lacking": lacking}
                self.engine.submit(request)
            case "measure":
                assert isinstance(self.engine.sight, Sight)
                return {"ids": [self.engine.sight.ids(*size) for size in command["sizes"]]}
            case "cancel":
                self.engine.cancel(command["id"], command.get("sample"))
            case "load_adapter":
                self._adapters().load(command["name"], Path(command["folder"]))
                return {"digest": self._adapters().digest(command["name"])}
            case "forget":
                self._prefixes().forget(command["paths"])
            case "flush":
                self._prefixes().flush()
            case "stats":
                counts, used = vars(self._prefixes().counts), self._prefixes().memory_used
                return {"prefixes": counts, "memory_used": used, "requests": self.engine.requests, "peak_memory": _peak()}
        return {}

    def _adapters(self) -> Adapters:
        assert isinstance(self.engine.adapters, Adapters)
        return self.engine.adapters

    def _prefixes(self) -> Prefixes:
        assert isinstance(self.engine.prefixes, Prefixes)
        return self.engine.prefixes


def _read(commands: queue.SimpleQueue[Command | None]) -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    commands.put(None)


def _write(out: TextIO, message: Command) -> None:
    out.write(json.dumps(message, separators=(",", ":")) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
