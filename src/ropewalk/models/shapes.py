"""Published models whose shape is known without fetching anything: for planning, and for bases of true width and fewer layers. No torch.

A folder below shapes/ holds the text part of the config.json that the model's repository publishes; what it leaves out is the default of
transformers' configuration class. The sum of parameters is that of the model's card.
"""

from __future__ import annotations

from pathlib import Path

SHAPES = Path(__file__).with_name("shapes")

# Every repository that holds weights of a shape -> its folder. Sizes of one family share a shape with their chat versions.
KNOWN = {
    **{f"google/gemma-4-{size}{version}": f"gemma-4-{size.lower()}" for size in ("E2B", "E4B", "12B", "26B-A4B", "31B") for version in ("", "-it")},
    **dict.fromkeys(("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Base"), "qwen3-30b-a3b"),
    **dict.fromkeys(("Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.5-35B-A3B-Base"), "qwen3.5-35b-a3b"),
    **dict.fromkeys(("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"), "mixtral-8x7b"),
    "openai/gpt-oss-20b": "gpt-oss-20b",
}  # fmt: skip


def shape_folder(name: str) -> Path | None:
    """The folder with the config.json of a model by its name on the hub, or by the folder's own; None: its shape is not known."""
    known = {hub.lower(): folder for hub, folder in KNOWN.items()}
    folder = known.get(name.lower(), name.lower())
    return SHAPES / folder if folder in known.values() else None
