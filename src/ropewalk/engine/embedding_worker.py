"""An encoder as a process of its own: texts come in as lines of JSON on standard input, their vectors go out on standard output."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ropewalk.errors import BadInput, RopewalkError

AT_ONCE = 16  # texts of one pass
LONGEST = 8192  # tokens, where the model says nothing smaller


class Encoder:
    """A model of transformers that makes one vector of a text."""

    def __init__(self, folder: Path, pooling: str, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(f"embeddings: '{folder}' is no encoder that transformers can load: {error}") from error
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        self._pooling = pooling or _pooling_of(folder)
        known = (getattr(config, "max_position_embeddings", LONGEST), self._tokenizer.model_max_length, LONGEST)
        self._longest = int(min(n for n in known if n))
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @torch.inference_mode()
    def vectors(self, texts: list[str]) -> tuple[torch.Tensor, int, list[int]]:
        """A vector of length 1 for each text, the tokens read, and which texts were cut; like lengths are encoded together."""
        tokens, cut = 0, list[int]()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), AT_ONCE):
            chosen = order[start : start + AT_ONCE]
            asked = [texts[i] for i in chosen]
            batch = self._tokenizer(asked, padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
            batch = {name: batch[name].to(self._device) for name in ("input_ids", "attention_mask")}
            lengths = batch["attention_mask"].sum(1).tolist()
            tokens += sum(lengths)
            cut += [i for i, length in zip(chosen, lengths) if length >= self._longest and self._is_longer(texts[i])]
            hidden = self._model(**batch).last_hidden_state.float()  # B, L, H
            for i, vector in zip(chosen, torch.nn.functional.normalize(self._pooled(hidden, batch["attention_mask"]), dim=-1)):
                found[i] = vector.cpu()
        return torch.stack(found), tokens, sorted(cut)

    def _is_longer(self, text: str) -> bool:
        return len(self._tokenizer(text, truncation=False, verbose=False)["input_ids"]) > self._longest

    def _pooled(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        weights = mask[:, :, None].float()
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def main() -> None:
    """Serves one encoder until its input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else prints, prints to the error stream
    settings = json.loads(sys.stdin.readline())
    try:
        encoder = Encoder(Path(settings["folder"]), settings["pooling"], settings["threads"])
    except RopewalkError as error:
        _write(out, {"error": type(error).__name__, "message": str(error)})
        return
    _write(out, {"ready": True})
    for line in sys.stdin:
        vectors, tokens, cut = encoder.vectors(json.loads(line)["texts"])
        data = vectors.to(torch.float16).numpy().astype("<f2").tobytes()
        _write(out, {"vectors": base64.b64encode(data).decode(), "tokens": tokens, "cut": cut})


def _pooling_of(folder: Path) -> str:
    """What the folder says of it, as sentence-transformers writes it."""
    try:
        found: dict[str, Any] = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "mean"
    if found.get("pooling_mode_cls_token"):
        return "cls"
    return "last" if found.get("pooling_mode_lasttoken") else "mean"


def _write(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message, separators=(",", ":")) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
