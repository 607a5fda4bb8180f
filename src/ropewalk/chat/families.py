"""Chat templates by the names that configurations use, each written from the tokens that its model family was trained with.

Most families are a table: what stands before and after each role's text. The few that do more (calls, thinking) follow it.
A model's own template is the better choice where it has one; these serve bases that come without.
"""

from __future__ import annotations

from dataclasses import dataclass

NOT_TEXT = "{{ raise_exception('only text can be shown to this model') }}"

# `words(m)` gives a message's text, whether it came as a string or as a list of parts.
_WORDS = (
    "{%- macro words(m) -%}{%- if m.content is string -%}{{ m.content }}{%- elif m.content is iterable -%}"
    "{%- for part in m.content -%}{%- if part.text is defined -%}{{ part.text }}{%- else -%}" + NOT_TEXT + "{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)


@dataclass(frozen=True)
class Family:
    """What a family writes around each role's text; `system` None folds the system message into the first user turn."""

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None = None
    tool: tuple[str, str] | None = None
    begin: str = ""
    end: str = ""
    prompt: str = ""
    trim: bool = False

    def source(self) -> str:
        """The family as a Jinja template."""
        roles = {"user": self.user, "assistant": self.assistant, "system": self.system, "tool": self.tool}
        text = "words(m) | trim" if self.trim else "words(m)"
        fold = "{%- set fold = namespace(text='') -%}"
        cases = []
        if self.system is None:
            cases.append("{%- if m.role == 'system' -%}{%- set fold.text = " + text + " ~ '\\n\\n' -%}")
        for role, sides in roles.items():
            if sides is not None:
                before, after = (_quoted(side) for side in sides)
                said = f"fold.text ~ ({text})" if role == "user" else text
                test = f"m.role == '{role}'" if role != "tool" else "m.role in ('tool', 'ipython')"
                reset = "{%- set fold.text = '' -%}" if role == "user" else ""
                cases.append(
                    "{%- " + ("elif" if cases else "if") + f" {test} -%}}{{{{- {before} ~ ({said}) ~ {after} -}}}}" + reset
                )
        other = "{%- else -%}{{ raise_exception('there is no role ' ~ m.role ~ ' in this chat template') }}{%- endif -%}"
        loop = "{%- for m in messages -%}" + "".join(cases) + other + "{%- endfor -%}"
        prompt = "{%- if add_generation_prompt -%}{{- " + _quoted(self.prompt) + " -}}{%- endif -%}" if self.prompt else ""
        begin, end = ("{{- " + _quoted(side) + " -}}" if side else "" for side in (self.begin, self.end))
        return _WORDS + begin + fold + loop + end + prompt


def _quoted(text: str) -> str:
    """A Jinja expression for a text in which BOS and EOS stand for the tokenizer's own tokens."""
    body = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    joined = "'" + body.replace("BOS", "' ~ bos_token ~ '").replace("EOS", "' ~ eos_token ~ '") + "'"
    return joined.replace("'' ~ ", "").replace(" ~ ''", "")


def _headed(open_: str, middle: str, close: str, names: dict[str, str] | None = None, **more: object) -> Family:
    """A family whose roles differ in nothing but their name."""
    sides = {role: (open_ + (names or {}).get(role, role) + middle, close) for role in ("user", "assistant", "system", "tool")}
    return Family(prompt=sides["assistant"][0], **{**sides, **more})  # type: ignore[arg-type]


_CHATML = _headed("<|im_start|>", "\n", "<|im_end|>\n")
_LLAMA3 = _headed("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", {"tool": "ipython"}, begin="BOS", trim=True)
_GEMMA = _headed(
    "<start_of_turn>", "\n", "<end_of_turn>\n", {"assistant": "model"}, system=None, tool=None, begin="BOS", trim=True
)
_MISTRAL = Family(("[INST] ", " [/INST]"), (" ", "EOS"), begin="BOS", trim=True)
_TEKKEN = Family(("[INST]", "[/INST]"), ("", "EOS"), begin="BOS")
_PHI3 = _headed("<|", "|>\n", "<|end|>\n", tool=None)
_COHERE = _headed(
    "<|START_OF_TURN_TOKEN|><|",
    "_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    {"user": "USER", "assistant": "CHATBOT", "system": "SYSTEM", "tool": "SYSTEM"},
    begin="BOS",
    trim=True,
)

TABLE: dict[str, Family] = {
    "chatml": _CHATML,
    "qwen2_vl": _CHATML,
    "llama3": _LLAMA3,
    "llama3_2_vision": _LLAMA3,
    "llama4": _headed("<|header_start|>", "<|header_end|>\n\n", "<|eot|>", {"tool": "ipython"}, begin="BOS", trim=True),
    "gemma": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3n": _GEMMA,
    "gemma4": _headed("<|turn>", "\n", "<turn|>\n", {"assistant": "model"}, begin="BOS", trim=True, tool=None),
    "gemma4_unified": _headed("<|turn>", "\n", "<turn|>\n", {"assistant": "model"}, begin="BOS", trim=True, tool=None),
    "mistral_v1": _MISTRAL,
    "mistral_v2v3": Family(("[INST] ", "[/INST]"), (" ", "EOS"), begin="BOS", trim=True),
    "mistral_v3_tekken": _TEKKEN,
    "mistral_v7_tekken": Family(
        ("[INST]", "[/INST]"),
        ("", "EOS"),
        ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        begin="BOS",
    ),
    "pixtral": _TEKKEN,
    "phi_3": _PHI3,
    "phi_35": _PHI3,
    "phi_4": _headed("<|im_start|>", "<|im_sep|>", "<|im_end|>", tool=None),
    "llava": Family(("USER: ", "\n"), ("ASSISTANT: ", "EOS\n"), ("", "\n"), prompt="ASSISTANT:"),
    "cohere": _COHERE,
    "aya": _COHERE,
    "deepseek_v2": Family(("User: ", "\n\n"), ("Assistant: ", "EOS"), ("", "\n\n"), begin="BOS", prompt="Assistant:"),
    "deepseek_v3": Family(("<｜User｜>", ""), ("<｜Assistant｜>", "EOS"), ("", ""), begin="BOS", prompt="<｜Assistant｜>"),
    "falcon_h1": _CHATML,
    "exaone": _headed("[|", "|]", "[|endofturn|]\n", tool=None),
    "jamba": Family(
        ("<|bom|><|user|> ", "<|eom|>"),
        ("<|bom|><|assistant|> ", "<|eom|>"),
        ("<|bom|><|system|> ", "<|eom|>"),
        ("<|bom|><|tool|> ", "<|eom|>"),
        begin="BOS",
        prompt="<|bom|><|assistant|> ",
    ),
    "metharme": Family(("<|user|>", ""), ("<|model|>", "EOS"), ("<|system|>", ""), begin="BOS", prompt="<|model|>"),
    "alpaca": Family(
        ("### Instruction:\n", "\n\n"), ("### Response:\n", "EOS\n\n"), ("", "\n\n"), begin="BOS", prompt="### Response:\n"
    ),
}

# Qwen's models: calls in <tool_call>, answers of tools in a user turn, thinking kept only after the last question.
_QWEN = (
    _WORDS
    + """\
{%- set tail = namespace(asked=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'user' and not words(m).startswith('<tool_response>') -%}{%- set tail.asked = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set first = words(messages[0]) if messages[0].role == 'system' else DEFAULT_SYSTEM -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' ~ (first ~ '\\n\\n' if first else '') -}}
  {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' ~ tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' -}}
  {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n' -}}
  {{- '</tool_call><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' or first -%}
  {{- '<|im_start|>system\\n' ~ first ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ words(m) ~ '<|im_end|>\\n' -}}
  {%- elif m.role == 'assistant' -%}
    {%- set said = words(m) -%}
    {{- '<|im_start|>assistant\\n' -}}
    THINKING
    {{- said -}}
    {%- for call in m.tool_calls or [] -%}
      {%- set call = call.function or call -%}
      {{- ('\\n' if said or not loop.first else '') ~ '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' -}}
      {{- (call.arguments if call.arguments is string else call.arguments | tojson) ~ '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif m.role == 'tool' -%}
    {{- '' if loop.previtem is defined and loop.previtem.role == 'tool' else '<|im_start|>user' -}}
    {{- '\\n<tool_response>\\n' ~ words(m) ~ '\\n</tool_response>' -}}
    {{- '' if loop.nextitem is defined and loop.nextitem.role == 'tool' else '<|im_end|>\\n' -}}
  {%- elif m.role != 'system' -%}
    {{ raise_exception('there is no role ' ~ m.role ~ ' in this chat template') }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}PROMPT{%- endif -%}"""
)
_THINKING = """\
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
    {%- if not thought and '</think>' in said -%}
      {%- set thought = said.split('</think>')[0].split('<think>')[-1] -%}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if loop.index0 > tail.asked and (loop.last or thought) -%}
      {%- set said = said.lstrip('\\n') -%}
      {{- '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' -}}
    {%- endif -%}"""


def _qwen(system: str, thinking: str, prompt: str) -> str:
    return _QWEN.replace("DEFAULT_SYSTEM", repr(system)).replace("THINKING", thinking).replace("PROMPT", prompt)


_UNTHINKING = "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}"
_OPENED = "{%- else -%}{{- '<think>\\n' -}}"

SOURCES: dict[str, str] = {
    **{name: family.source() for name, family in TABLE.items()},
    "qwen_25": _qwen("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "", ""),
    "qwen3": _qwen("", _THINKING, _UNTHINKING + "{%- endif -%}"),
    "qwen3_5": _qwen("", _THINKING, _UNTHINKING + _OPENED + "{%- endif -%}"),
}
