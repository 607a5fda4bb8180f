"""Which family a model's chat template is of: seen from the words that it writes, not from the model's name."""

from __future__ import annotations

import re

from ropewalk.chat.dialects.dialect import Dialect
from ropewalk.chat.dialects.gemma import Gemma
from ropewalk.chat.dialects.harmony import Harmony
from ropewalk.chat.dialects.hermes import Hermes, Told
from ropewalk.chat.dialects.llama import Llama
from ropewalk.chat.dialects.mistral import Mistral
from ropewalk.chat.dialects.tagged import Tagged
from ropewalk.chat.template import Template

# The first family all of whose words stand in the template.
DIALECTS: dict[tuple[str, ...], type[Dialect]] = {
    ("<|channel|>", "<|message|>"): Harmony,
    ("<tool_call>", "<function="): Tagged,
    ("<tool_call>", "arguments"): Hermes,
    ("<|tool_call>", "call:"): Gemma,
    ("[TOOL_CALLS]",): Mistral,
    ("<|start_header_id|>", "tools", "parameters"): Llama,
}


def dialect_of(template: Template) -> Dialect:
    """The family of a chat template; one that knows no tools is told of them."""
    source = template.needed.source
    for words, family in DIALECTS.items():
        if all(word in source for word in words):
            return family(template)
    told = Told(template)
    if "<|turn>" in source:  # Gemma 4's turns, without its tools
        told.thinking = Gemma.thinking
    return Dialect(template) if re.search(r"\btools\b", source) else told
