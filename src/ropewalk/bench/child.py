"""A process of the race: `python -m ropewalk.bench.child TASK`, which tells what it finds in lines of JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import asdict
from typing import Any

from ropewalk.bench.contenders import Entrant
from ropewalk.bench.shapes import Layer, Model


def main(task: dict[str, Any]) -> None:
    """One layer by everybody, one or many models by one contender, or how far gradients are apart."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer

    def tell(found: Any) -> None:
        print(json.dumps(found), file=out, flush=True)

    import torch

    device = task["device"]
    if device == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    if task["what"] == "layer":
        from ropewalk.bench.block import race

        entrants = [Entrant(**e) for e in task["entrants"]]
        for row in race(
            Layer(**task["shape"]), task["tokens"], task["dtype"], device, entrants, task["rounds"], task["stored"]
        ):
            tell(asdict(row))
        return
    from ropewalk.bench import model

    if task["what"] == "models":
        races = [(Model(**shape), dtype, stored, truth) for shape, dtype, stored, truth in task["races"]]
        model.one_by_one(races, [Entrant(**e) for e in task["entrants"]], device, task["seconds"], tell)
        return
    shape = Model(**task["shape"])
    if task["what"] == "errors":
        found, failed = model.errors(shape, task["names"], task["dtype"], device)
        tell({"errors": found, "failed": failed})
    elif task["what"] == "truth":
        model.write_truth(shape, task["dtype"], device, task["stored"], task["file"])
        tell({"ready": True})
    else:
        entrant = Entrant(**task["entrant"])
        model.serve(shape, entrant, task["dtype"], device, task["stored"], task["truth"], sys.stdin, tell)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
