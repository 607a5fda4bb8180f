"""What every chat server is given: a model in transformers' format with a tokenizer made here, and documents of so many tokens.

The tokenizer is a byte-level BPE written down, not trained: every word of a space and three letters is one token, so that a document
of 4,096 tokens is the same text for all, whatever they put around it.
"""

from __future__ import annotations

import itertools
import json
import random
import string
from pathlib import Path
from typing import Any

VOCABULARY = 32_000
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCE = 12  # tokens, with the full stop


def save_model(model: Any, folder: Path) -> None:
    """Weights, configuration and tokenizer, as from_pretrained and every server read them."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 4], pad_token_id=0, do_sample=False)
    model.save_pretrained(folder)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    config = folder / "tokenizer_config.json"  # a class that older readers know too
    found = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(found, indent=1))


def tokenizer() -> Any:
    """32,000 tokens: bytes, and the words of three letters, and as many of four as there is room for."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    space = "Ġ"  # how the byte-level alphabet writes a space
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    left = VOCABULARY - len(tokens)
    for length in (1, 2, 3, 4):
        for letters in itertools.islice(itertools.product(string.ascii_lowercase, repeat=length), left):
            merges.append((space + "".join(letters[:-1]), letters[-1]))
            tokens.append(space + "".join(letters))
            left -= 1
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


def document(tokens: int, seed: int) -> str:
    """Sentences of words that mean nothing."""
    chance = random.Random(seed)

    def sentence(length: int) -> str:
        return "".join(" " + "".join(chance.choices(string.ascii_lowercase, k=3)) for _ in range(length - 1)) + "."

    whole, rest = divmod(tokens, SENTENCE)
    return "".join(sentence(SENTENCE) for _ in range(whole)) + (sentence(rest) if rest else "")
