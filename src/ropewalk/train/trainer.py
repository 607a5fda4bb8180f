"""Supervised fine-tuning, top to bottom: `train(run)` prepares, loads, steps, evaluates, saves, verifies.

A killed run goes on from its last checkpoint with the same numbers: the batches of an epoch are a function of (seed, epoch), what
is random inside a step is drawn from (seed, step, rank), and weights and optimizer come from the checkpoint.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.errors import TrainingStopped
from ropewalk.models.head import Head, output_head
from ropewalk.models.load import keep_routing, load_base
from ropewalk.models.lora import Adapter, attach, verify_saved
from ropewalk.train.checkpoint import Checkpoints, Position, read_position, restore_optimizer
from ropewalk.train.config import Run
from ropewalk.train.data import Batch
from ropewalk.train.distributed import World, join_world
from ropewalk.train.folder import usable_cores
from ropewalk.train.optim import clip, make_optimizer, rate_factor, set_rate
from ropewalk.train.pace import Pace, rhythm
from ropewalk.train.packing import batches
from ropewalk.train.prepare import Prepared, prepare
from ropewalk.train.progress import EventLog, Screen, read_events, write_plots
from ropewalk.train.trackers import Tracker, start_trackers
