"""One architecture, tiny, served: the engine's answers beside those of its own `generate()`, in float32.

Several requests come and go, prompts are read in chunks beside others' single ids, and a segment is read before and again. Weights are
spread wide enough that an answer depends on what was read: `depends` says by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropewalk.engine.cache import Reading
from ropewalk.engine.runner import Runner
from ropewalk.models.tiny import FIRST_FREE_ID, VOCABULARY, expert_architectures, shrink

TOLERANCE = 1e-5
NEW = 8
CHUNK = 16
PROMPTS = (5, 52, 33)
_FIXED: dict[str, dict[str, Any]] = {  # where sizes must fit in ways that names do not tell
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128},
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "LongcatFlashForCausalLM": {
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 4,
        "moe_topk": 2,
    },
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "NemotronForCausalLM": {"num_key_value_heads": 2, "head_dim": 16},
    "PLBartForCausalLM": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "RecurrentGemmaForCausalLM": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "lru_width": 64,
        "attention_window_size": 16,
    },
    "XLMWithLMHeadModel": {"emb_dim": 64, "n_layers": 2, "n_heads": 4},
}
SPREAD = 0.06  # standard deviation of every matrix


@dataclass(frozen=True)
class Served:
    """How far the engine's log-probabilities are from those of `generate()`."""

    architecture: str
    model: str
    layers: tuple[str, ...]  # how they keep the past
    error: float  # largest difference of a log-probability
    same_ids: bool
    warm_as_cold: bool
    depends: float  # what another id in the prompt changes: an error below it could hide nothing

    @property
    def passed(self) -> bool:
        return self.same_ids and self.warm_as_cold and self.error <= TOLERANCE < self.depends


def architectures() -> Iterator[tuple[str, Any]]:
    """Every causal language model of the installed transformers, and every other mixture of experts: its name and its class."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    found = {model_type_to_module_name(config.model_type): kind for config, kind in MODEL_FOR_CAUSAL_LM_MAPPING.items()}
    for name, kind in expert_architectures():
        if not any(kind is other for other in found.values()):
            found.setdefault(name, kind)
    yield from sorted(found.items())


def serve(architecture: str, kind: Any, device: torch.device | str = "cpu") -> Served:
    """Asks a tiny model of this class, by itself and through the engine."""
    model = build(kind).to(device)
    prompts = [_ids(count, seed) for seed, count in enumerate(PROMPTS)]
    wanted = [generated(model, prompt) for prompt in prompts]
    other = [*prompts[1][:-4], FIRST_FREE_ID, *prompts[1][-3:]]
    depends = float((generated(model, other, 1)[1] - wanted[1][1][:1]).abs().max())
    runner = Runner(model)
    out, logs = through_engine(runner, prompts)
    error = max(float((torch.stack(mine) - theirs).abs().max()) for mine, (_, theirs) in zip(logs, wanted))
    same = out == [ids for ids, _ in wanted]
    kinds = tuple(dict.fromkeys(runner.layout.kinds))
    return Served(architecture, kind.__name__, kinds, error, same, warm_as_cold(runner), depends)


@torch.no_grad()
def build(kind: Any) -> Any:
    """The tiny model, its weights spread; the same every time."""
    torch.manual_seed(0)
    model = kind._from_config(shrink(kind.config_class, **_FIXED.get(kind.__name__, {}))).float().eval()
    for parameter in model.parameters():
        if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter) * SPREAD)  # zeros and ones would hide what is left out
        elif parameter.dim() == 2:
            parameter.mul_(SPREAD / parameter.std())
    return model


def generated(model: Any, prompt: list[int], count: int = NEW) -> tuple[list[int], Tensor]:
    """What greedy generation says: new ids, and the log-probabilities [count, V] of every step."""
    out = model.generate(
        input_ids=torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).float().log_softmax(-1)


def through_engine(runner: Runner, prompts: list[list[int]], count: int = NEW) -> tuple[list[list[int]], list[list[Tensor]]]:
    """The same through the engine; a new request every other step."""
    readings = [Reading.after(runner.layout, []) for _ in prompts]
    waiting = [list(prompt) for prompt in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    logs: list[list[Tensor]] = [[] for _ in prompts]
    step = 0
    while any(len(ids) < count for ids in out):
        work, who = [], []
        for i in range(len(prompts)):
            if step >= 2 * i and len(out[i]) < count:
                chunk, waiting[i] = (waiting[i][:CHUNK], waiting[i][CHUNK:]) if waiting[i] else ([out[i][-1]], [])
                work.append((readings[i], chunk))
                who.append(i)
        for i, logits in zip(who, runner.forward(work)):
            if not waiting[i]:
                out[i].append(int(logits.argmax()))
                logs[i].append(logits.log_softmax(-1))
        step += 1
    return out, logs


def warm_as_cold(runner: Runner) -> bool:
    """Whether a segment read before gives the very logits of one read now."""
    document, question = _ids(45, 7), _ids(6, 8)
    cold = Reading.after(runner.layout, [])
    runner.forward([(cold, document[:30])])
    runner.forward([(cold, document[30:])])
    segment = cold.close("document", document)
    expected = runner.forward([(cold, question)]), runner.forward([(cold, question[:1])])
    warm = Reading.after(runner.layout, [segment])
    return torch.equal(runner.forward([(warm, question)]), expected[0]) and torch.equal(
        runner.forward([(warm, question[:1])]), expected[1]
    )


def _ids(count: int, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_FREE_ID, VOCABULARY, (count,), generator=random).tolist()
