"""The job for TRL, as its documentation would have it written: trl_sft.py STEPS, started in the folder of a run."""

from __future__ import annotations

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    model="../../assets/base",
    train_dataset=load_dataset("json", data_files="../../assets/sft.jsonl", split="train"),
    args=SFTConfig(
        output_dir="out",
        max_length=256,
        packing=True,
        assistant_only_loss=True,
        per_device_train_batch_size=4,
        max_steps=int(sys.argv[1]),
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=20,
        bf16=False,
        gradient_checkpointing=False,
        seed=42,
        report_to="none",
    ),
    peft_config=LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
)
trainer.train()
trainer.save_model()
