"""The job for transformers and PEFT alone: transformers_sft.py STEPS, started in the folder of a run.

The plain Trainer does not pack: 16 rows a step, padded to the longest, hold as many real tokens as 4 packed rows of 256.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

set_seed(42)
tokenizer = AutoTokenizer.from_pretrained("../../assets/base")


def tokenise(row):
    out = tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, max_length=256, truncation=True
    )
    labels = [i if trained else -100 for i, trained in zip(out["input_ids"], out["assistant_masks"])]
    return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"], "labels": labels}


rows = load_dataset("json", data_files="../../assets/sft.jsonl", split="train").map(tokenise, remove_columns=["messages"])
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained("../../assets/base"),
    LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    ),
)
trainer = Trainer(
    model=model,
    train_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    args=TrainingArguments(
        output_dir="out",
        per_device_train_batch_size=16,
        max_steps=int(sys.argv[1]),
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=20,
        include_num_input_tokens_seen="non_padding",
        use_cpu=True,
        seed=42,
        report_to="none",
    ),
)
trainer.train()
trainer.save_model()
