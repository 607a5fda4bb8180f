"""Trains the small mixture-of-experts base that the quickstart starts from: `python -m ropewalk.quickstart.train_base OUT`.

The corpus is invented (invented.py) and drawn anew at every step from the seed; what is learnt is to read a short passage and to
copy answers out of it. Nothing seems to happen for the first few hundred steps, then the loss falls: hence several questions per
passage, a loss on the answers only, and passages that begin short. Weights, tokenizer and base.json (corpus, seed, loss) land in OUT.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ropewalk.chat.framing import FILE
from ropewalk.quickstart.facts import words
from ropewalk.quickstart.invented import Inventor, Message

SEED = 7
VOCABULARY = 768
MATRIX_RATE, OTHER_RATE = 0.02, 0.003
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Up to this share of the steps: the most facts in a passage, the most questions about it. Copying is learnt on the shortest.
STAGES = ((0.15, 2, 2), (0.3, 3, 3), (0.45, 5, 5), (1.0, 8, 6))
Row = tuple[list[int], list[int]]  # ids and labels of one conversation
# A space is a token of its own, so that a name has the same tokens after a space, a bracket or a line break: copying stays copying.
PIECES = Regex(r"\p{Lu}?[\p{Ll}\p{M}]+|[\s\S]")


def build_tokenizer(inventor: Inventor, texts: int = 6000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the corpus with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (PAD, START, END)]
    corpus = (message["content"] for _ in range(texts) for message in inventor.conversation(5, 4))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Four layers of eight experts, two per token."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=256, moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=True,
        max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    model = Qwen3MoeForCausalLM(config)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: Qwen3MoeForCausalLM) -> None:
    """Start the first two heads on the token before and the one before that.

    Copying needs such heads before it can begin, and finding them by chance is what a small model spends its first thousand steps
    on. One coordinate is the same in every embedding, so that these heads' queries and keys depend on nothing but position; the
    rotary phase of the query then puts the maximum at the distance wanted. Training may change all of it.
    """
    size, frequencies = model.config.head_dim, 3
    attention = model.model.layers[0].self_attn
    model.model.embed_tokens.weight[:, 0] = 3 * model.config.initializer_range
    angles = model.model.rotary_emb.inv_freq[:frequencies]
    for head in range(2):
        query = torch.zeros(size)
        query[:frequencies], query[size // 2 : size // 2 + frequencies] = (
            torch.cos(angles * (head + 1)),
            -torch.sin(angles * (head + 1)),
        )
        attention.q_proj.weight[head * size : (head + 1) * size] = 0
        attention.q_proj.weight[head * size : (head + 1) * size, 0] = query
    attention.k_proj.weight[:size] = 0
    attention.k_proj.weight[:frequencies, 0] = 1
    for layer in model.model.layers:  # sharper attention than a scale of one allows, from the start
        layer.self_attn.q_norm.weight.fill_(1.6)
        layer.self_attn.k_norm.weight.fill_(1.6)


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> Row:
    """Token ids of a conversation, and labels that are -100 outside the answers."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = tokenizer.encode(f"{START}{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(f"{message['content']}{END}", add_special_tokens=False)
        tail = tokenizer.encode("\n", add_special_tokens=False)
        answer = message["role"] == "assistant"
        ids += head + body + tail
        labels += [-100] * len(head) + (body if answer else [-100] * len(body)) + [-100] * len(tail)
    return ids, labels


def batches(tokenizer: PreTrainedTokenizerFast, inventor: Inventor, steps: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded batches of at most `tokens` tokens, conversations of like length together; passages grow with the steps."""
    R, step = inventor.random, 0
    while step < steps:
        facts, questions = next(stage[1:] for stage in STAGES if step < stage[0] * steps)
        drawn = [inventor.conversation(R.randint(1, facts), R.randint(1, questions)) for _ in range(512)]
        chunks = cut(sorted((encode(tokenizer, messages) for messages in drawn), key=lambda row: len(row[0])), tokens)
        R.shuffle(chunks)
        for chunk in chunks[: steps - step]:
            width = max(len(ids) for ids, _ in chunk)
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in chunk]),
                torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in chunk]),
            )
            step += 1


def cut(rows: list[Row], tokens: int) -> list[list[Row]]:
    """Rows by length, cut where one more would pass the budget."""
    chunks: list[list[Row]] = [[]]
    for row in rows:
        if chunks[-1] and (len(chunks[-1]) + 1) * len(row[0]) > tokens:
            chunks.append([])
        chunks[-1].append(row)
    return chunks


def answer_loss(model: Qwen3MoeForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the answers' tokens; no mask is needed because padding is on the right and attention is causal."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    chosen = targets != -100
    loss: Tensor = torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][chosen]), targets[chosen])
    return loss


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; a 3-D parameter is one matrix per expert. It needs about half of AdamW's steps here."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: a short warm-up, level, then down to nothing over the last 40%."""
    return min(1.0, (step + 1) / 50, max(0.02, (steps - step) / (0.4 * steps)))


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict[str, object]) -> None:
    """The base as bfloat16 safetensors with its tokenizer and how it came about."""
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    config = json.loads((out / "config.json").read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)
    (out / "base.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # It learns to read bare passages: see LAYOUTS in invented.py.
    (out / FILE).write_text(json.dumps({"tags": False, "numbers": False}) + "\n", encoding="utf-8")


def make_optimizers(model: Qwen3MoeForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for what multiplies hidden states; AdamW for the embedding, the routers and the norms."""
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.ndim > 1 and "embed" not in name and "mlp.gate.weight" not in name]
    others = [p for name, p in named.items() if name not in matrices]
    adamw = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon([named[name] for name in matrices], lr=MATRIX_RATE), adamw]


def train(out: Path, steps: int, tokens: int) -> None:
    """The loop; a checkpoint every 300 steps is a whole base that can be used."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums over threads are not associative: one thread, one result
    inventor = Inventor(SEED, words())
    tokenizer = build_tokenizer(inventor)
    model = build_model(tokenizer)
    optimizers = make_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    began, smooth = time.time(), 0.0
    for step, (ids, labels) in enumerate(batches(tokenizer, inventor, steps, tokens)):
        loss = answer_loss(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            print(
                f"step {step + 1}/{steps}  loss {smooth:.4f}  {time.time() - began:.0f} s, cpu {time.process_time():.0f} s",
                flush=True,
            )
        if (step + 1) % 300 == 0 or last:
            record = {
                "corpus": "invented passages, ropewalk/quickstart/invented.py",
                "seed": SEED,
                "steps": step + 1,
                "of": steps,
            }
            record |= {"tokens_per_step": tokens, "loss": round(smooth, 4), "seconds": round(time.time() - began)}
            save(model, tokenizer, out, record | {"cpu_seconds": round(time.process_time()), "torch": torch.__version__})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--tokens", type=int, default=4096, help="per step (default: %(default)s)")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
