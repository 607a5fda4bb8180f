"""Training by rewards that writes the next steps' completions beside the present one: how old they get, and what stays as it is."""

import hashlib
import threading

import pytest
import torch

from ropewalk.train.generator import Generator
from ropewalk.train.policy_step import PolicyStep
from ropewalk.train.reinforcement import Rewarded
from ropewalk.train.trainer import Fit
from train.rewarded import fit, steps, told


def digest(pupil):
    """Of every weight of the base."""
    total = hashlib.sha256()
    for name, tensor in pupil.model.state_dict().items():
        if "lora" not in name:
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def ahead(rewarding):
    """A run of six steps, two over each batch of completions, written up to two steps ahead, over a base of 16 bits: its folder, what
    it did in order, and what it was at its beginning.
    """
    done, seen = [], {}
    with pytest.MonkeyPatch.context() as patch:

        def noted(kind, name, word):
            was = getattr(kind, name)
            patch.setattr(kind, name, lambda self, *given: (done.append(word), was(self, *given))[1])

        start = Rewarded.start

        def watched(self, pupil, *rest):
            start(self, pupil, *rest)
            seen.update(pupil=pupil, base=digest(pupil), dtypes={p.dtype for _, p in pupil.trainable()})

        patch.setattr(Rewarded, "start", watched)
        noted(PolicyStep, "losses", "begin")
        noted(PolicyStep, "_loss", "learn")
        noted(Generator, "step", "write")
        noted(Rewarded, "learnt", "end")
        trl = {"async_prefetch": True, "prefetch_depth": 2, "num_iterations": 2, "max_completion_length": 24}
        path = rewarding(trl, max_steps=6, micro_batch_size=1, bf16=True)
        fit(path)
    return path.parent / "run", done, seen


def test_with_several_steps_over_a_batch_nothing_is_older_than_the_depth_either(ahead):
    folder, _, _ = ahead
    ages = [most for (most,) in told(folder, "staleness_max")]
    assert ages == [0, 0, 2, 2, 2, 2]  # the second batch was begun with the first, the third two steps before its own


def test_completions_are_written_between_the_micro_batches_of_a_step(ahead):
    _, done, _ = ahead
    within = [step.rpartition("begin ")[2] for step in " ".join(done).split(" end")]
    assert within[2].startswith("learn write write write write learn")  # the third step's begins the third batch


def test_writing_ahead_leaves_a_base_of_16_bits_as_it_is_and_what_is_trained_in_32(ahead):
    _, _, seen = ahead
    pupil = seen["pupil"]
    assert pupil.model.dtype == torch.bfloat16
    assert digest(pupil) == seen["base"]
    assert {p.dtype for _, p in pupil.trainable()} == seen["dtypes"] == {torch.float32}


def test_a_run_that_wrote_ahead_and_was_ended_goes_on_from_its_checkpoint(rewarded, tmp_path, monkeypatch):
    after = Fit._after_step

    def ended(self):
        after(self)
        if self.position.step == 3:
            raise KeyboardInterrupt

    trl = {"async_prefetch": True, "prefetch_depth": 2, "max_completion_length": 24}
    path = rewarded(trl, max_steps=5, save_steps=2)
    monkeypatch.setattr(Fit, "_after_step", ended)
    with pytest.raises(KeyboardInterrupt):
        fit(path)
    before = told(tmp_path / "run", "step", "staleness_max")
    assert before == [[1, 0], [2, 1], [3, 2]]
    monkeypatch.undo()
    assert fit(path).steps == 5
    # What had been written ahead is written again, by the adapter of the checkpoint.
    assert told(tmp_path / "run", "step", "staleness_max") == [[1, 0], [2, 1], [3, 0], [4, 1], [5, 2]]
    assert steps(tmp_path / "run")[2]["mismatch"] < 1e-5
    assert not [thread for thread in threading.enumerate() if thread.name in ("generator", "reward workers")]
