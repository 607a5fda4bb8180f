"""Whether packed samples see each other, in ours: isolation.py CONFIG, started in the folder of a run; prints one line of JSON.

Two packed neighbours A and B of a real batch, an adapter with random factors: the loss of B must not move when A's tokens change
(while A's own does), and must be that of B alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from ropewalk.config.run import load_run
from ropewalk.data.packing import batches
from ropewalk.train.prepare import prepare
from ropewalk.train.pupil import Pupil

TOLERANCE = 1e-5  # relative; the experts sum their rows in another order when other rows change


def main() -> None:
    torch.set_num_threads(1)
    run = load_run(Path(sys.argv[1]))
    prepared = prepare(run, restart=True, quiet=True)
    batch = batches(prepared.data.train, run, seed=run.seed, epoch=0)[0]
    pupil = Pupil.load(prepared, torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameter in pupil.trainable():
            parameter.normal_(std=0.05)
    ids, labels, places = (torch.from_numpy(a[:1].copy()) for a in (batch.ids, batch.labels, batch.position_ids))
    starts = [*(places[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    first, second = slice(0, starts[1]), slice(starts[1], starts[2])
    changed = ids.clone()
    changed[0, 1 : starts[1] - 1] = 77

    def loss(tokens: torch.Tensor, part: slice) -> float:
        only = torch.full_like(labels, -100)
        only[0, part] = labels[0, part]
        with torch.no_grad():
            return float(pupil.loss(tokens, only, places))

    with torch.no_grad():
        alone = float(pupil.loss(ids[:, second], labels[:, second], places[:, second]))
    there = loss(ids, second)
    found = {
        "neighbour_moved": abs(loss(changed, second) - there) / there,
        "itself_moved": abs(loss(changed, first) - loss(ids, first)) / loss(ids, first),
        "against_alone": abs(there - alone) / alone,
    }
    isolated = max(found["neighbour_moved"], found["against_alone"]) <= TOLERANCE < found["itself_moved"]
    print(json.dumps({"isolated": isolated, **found, "tolerance": TOLERANCE}))


if __name__ == "__main__":
    main()
