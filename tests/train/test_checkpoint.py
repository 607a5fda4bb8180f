"""A checkpoint exists whole or not at all."""

import pytest
import torch

from ropewalk.errors import ConfigError, ModelError, OutputError
from ropewalk.train.checkpoint import Checkpoints, Position, read_position, restore_optimizer
from ropewalk.train.folder import open_folder


def optimizer():
    parameter = torch.nn.Parameter(torch.ones(3))
    made = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    made.step()
    return made


def weights(folder):
    (folder / "weights.bin").write_bytes(b"w" * 100)


def test_position_and_optimizer_come_back_as_they_were(tmp_path):
    position = Position(step=3, tokens=77, best_loss=0.1, best_step=2, first_loss=2.5)
    path = Checkpoints(tmp_path).save(position, optimizer(), weights)
    again = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.5)
    restore_optimizer(path, again)
    assert read_position(path) == position
    assert torch.equal(again.state_dict()["state"][0]["exp_avg"], optimizer().state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize("damage", ["shorter", "changed", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(Position(step=1), optimizer(), weights)
    second = checkpoints.save(Position(step=2), optimizer(), weights)
    assert checkpoints.newest() == second
    file = second / "weights.bin"
    file.unlink() if damage == "gone" else file.write_bytes(b"w" * 50 if damage == "shorter" else b"x" * 100)
    assert checkpoints.newest() == first
    with pytest.raises(ModelError, match="not a whole checkpoint"):
        read_position(second)


def test_a_failure_while_writing_leaves_the_last_good_one_and_names_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Position(step=1), optimizer(), weights)

    def full(folder):
        (folder / "weights.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"No space left on device; the run is safe up to step-00000001"):
        checkpoints.save(Position(step=2), optimizer(), full)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_only_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(Position(step=step), optimizer(), weights)
    checkpoints.prune(2, but=1)
    assert [p.name for p in checkpoints.list()] == ["step-00000001", "step-00000004", "step-00000005"]


def test_a_checkpoint_without_optimizer_is_not_gone_on_from(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Position(step=1), None, weights)
    assert checkpoints.newest() is None


def test_a_run_of_an_earlier_version_goes_on_where_newer_keys_are_off_and_is_refused_where_one_is_not(tmp_path):
    open_folder(tmp_path, {"base_model": "b"}).close()
    open_folder(tmp_path, {"base_model": "b", "reward_model": False, "qat": None}).close()
    with pytest.raises(ConfigError, match="holds a run of another configuration: reward_model"):
        open_folder(tmp_path, {"base_model": "b", "reward_model": True})
    with pytest.raises(ConfigError, match="base_model"):
        open_folder(tmp_path, {"reward_model": False})
