"""A folder of transformers as GGUF, by llama.cpp's own converter.

    python benchmarks/peers/to_gguf.py SOURCE_OF_LLAMA_CPP FOLDER OUT

The converter knows tokenizers by what they make of one text, and so none that was made here. What it is told instead: it splits text
as GPT-2's does, whatever the architecture, which is how chat_assets.py made it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    source, folder, out = sys.argv[1:]
    sys.path[:0] = [str(Path(source) / "gguf-py"), source]
    import gguf
    from conversion import ModelBase, ModelType, TextModel, get_model_class

    hparams = ModelBase.load_hparams(Path(folder), False)
    name = hparams["architectures"][0]
    kind = get_model_class(name)
    transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast  # some families' own class adds tokens
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    kind.no_mtp = True  # no layers that guess ahead
    kind.set_vocab = lambda self: self._set_vocab_gpt2()
    with torch.inference_mode():
        kind(Path(folder), gguf.LlamaFileType.MOSTLY_BF16, Path(out), hparams=hparams).write()
    print(ModelType.TEXT, name)


if __name__ == "__main__":
    main()
