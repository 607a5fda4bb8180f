"""TRL's GRPOTrainer without vLLM: trl_grpo.py ORDER, started in a folder of its own; the order is JSON, see benchmarks/grpo.py.

Prints a line of JSON for every step. Everything is set so that TRL does least: no reference model, no gradient checkpointing, one
optimizer step for each batch of completions, so that it needs no pass for old log-probabilities either.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from datasets import load_dataset
from grpo_assets import LINEAR, Shape, processor, rewards, targets
from peft import LoraConfig
from transformers import GenerationMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

order = json.loads(sys.argv[1])
shape = Shape(**order["shape"])
cuda = order["device"] == "cuda"
torch.set_num_threads(1 if not cuda else torch.get_num_threads())
plain_generate, Prescribed = GenerationMixin.generate, processor(shape)


def generate(self, *args, **kwargs):
    return plain_generate(self, *args, logits_processor=[Prescribed(kwargs["input_ids"])], **kwargs)


GenerationMixin.generate = generate


class Told(TrainerCallback):
    """A line for every optimizer step."""

    def on_step_end(self, *args, **kwargs):
        if cuda:
            torch.cuda.synchronize()
        print(json.dumps({"step": time.process_time(), "wall": time.perf_counter()}), flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "completions/mean_length" in logs:
            print(json.dumps({"mean_length": logs["completions/mean_length"], "reward": logs["reward"]}), flush=True)


trainer = GRPOTrainer(
    model=order["base"],
    reward_funcs=rewards,
    train_dataset=load_dataset("json", data_files=f"{order['base']}/prompts.jsonl", split="train"),
    callbacks=[Told()],
    args=GRPOConfig(
        output_dir="out",
        per_device_train_batch_size=shape.micro,
        gradient_accumulation_steps=shape.completions // shape.micro,
        num_generations=shape.samples,
        max_completion_length=shape.longest,
        max_steps=order["steps"],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        loss_type="dapo",
        beta=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=42,
        model_init_kwargs={"dtype": shape.dtype},
    ),
    peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets(shape)),
)
trainer.train()
trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
assert any(part in name for name in trained for part in LINEAR), "nothing is adapted"
peak = torch.cuda.max_memory_allocated() if cuda else 0
print(json.dumps({"trainable": sum(p.numel() for p in trained.values()), "peak": peak}), flush=True)
