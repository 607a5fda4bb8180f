"""Synchronous GRPO as a plain loop over transformers and PEFT: plain_grpo.py ORDER; the order is JSON, see benchmarks/grpo.py.

Completions by `generate`, padded; a pass for the old log-probabilities; then the update, in micro-batches of padded rows. What a
trainer does that has neither an engine nor packing. Prints a line of JSON for every step.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from grpo_assets import END, PAD, Shape, processor, prompt_ids, share_of_even, targets
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

EPSILON, EPSILON_HIGH = 0.2, 0.28


def main(order: dict[str, Any]) -> None:
    shape, device = Shape(**order["shape"]), order["device"]
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    torch.manual_seed(42)
    base = AutoModelForCausalLM.from_pretrained(order["base"], dtype=shape.dtype).to(device)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets(shape)))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    asked = torch.tensor(prompt_ids(shape), device=device).repeat_interleave(shape.samples, 0)
    prescribe = processor(shape)
    for _ in range(order["steps"]):
        marks = [now(device)]
        whole = write(model, asked, prescribe, shape)
        marks.append(now(device))
        completion = whole[:, shape.prompt :]
        mask = mask_of(completion)
        counts = mask.int().sum(1).tolist()
        reward = torch.tensor([share_of_even(row[:count]) for row, count in zip(completion.tolist(), counts)], device=device)
        groups = reward.view(shape.prompts, shape.samples)
        spread = groups.std(1, keepdim=True) + 1e-4
        advantage = ((groups - groups.mean(1, keepdim=True)) / spread).flatten()
        rows = range(0, len(whole), shape.micro)
        with torch.no_grad():
            old = [log_probs(model, whole[row : row + shape.micro], mask[row : row + shape.micro], shape) for row in rows]
        marks.append(now(device))
        tokens = mask.sum()
        for row, before in zip(rows, old):
            part = slice(row, row + shape.micro)
            ratio = (log_probs(model, whole[part], mask[part], shape) - before).exp()
            gain = advantage[part, None]
            loss = -torch.minimum(ratio * gain, ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH) * gain)
            ((loss * mask[part]).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(now(device))
        phases = {n: b[0] - a[0] for n, a, b in zip(("generate", "old", "update"), marks, marks[1:])}
        told = {"step": marks[-1][0], "wall": marks[-1][1], "tokens": int(tokens), "phases": phases}
        print(json.dumps(told | {"reward": float(reward.mean())}), flush=True)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(json.dumps({"trainable": sum(p.numel() for p in trained), "peak": peak}), flush=True)


def write(model: Any, asked: Tensor, prescribe: Any, shape: Shape) -> Tensor:
    model.eval()
    with torch.no_grad():
        whole: Tensor = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=shape.longest,
            eos_token_id=END,
            pad_token_id=PAD,
            logits_processor=[prescribe(asked)],
        )
    model.train()
    return whole


def mask_of(completion: Tensor) -> Tensor:
    """1 through the first end."""
    ends = (completion == END).long()
    return (ends.cumsum(1) - ends == 0).float()


def log_probs(model: Any, whole: Tensor, mask: Tensor, shape: Shape) -> Tensor:
    new = whole.shape[1] - shape.prompt
    attention = torch.cat([torch.ones_like(whole[:, : shape.prompt]), mask.long()], 1)
    logits = model(input_ids=whole, attention_mask=attention, logits_to_keep=new + 1).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(2, whole[:, shape.prompt :, None])[..., 0]


def now(device: str) -> tuple[float, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
