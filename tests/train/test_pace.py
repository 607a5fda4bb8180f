"""Which batches belong to which step."""

from ropewalk.train.pace import Pace


def pace(lengths, group, **options):
    options = {"num_epochs": 1, "max_steps": None} | options
    return Pace(lambda epoch: range(lengths[epoch % len(lengths)]), group=group, **options)


def test_an_epoch_of_five_batches_in_groups_of_two_is_three_steps_of_which_the_last_is_short():
    steps = pace([5], 2)
    assert steps.total == 3
    assert [(steps.at(i).first, steps.at(i).last) for i in range(3)] == [(0, 2), (2, 4), (4, 5)]


def test_epochs_of_different_length_follow_each_other():
    steps = pace([4, 3], 2, num_epochs=2)
    assert steps.total == 4  # 2 + 2
    assert [(steps.at(i).epoch, steps.at(i).first) for i in range(4)] == [(0, 0), (0, 2), (1, 0), (1, 2)]


def test_half_an_epoch_is_half_of_its_steps_rounded_up():
    assert pace([6], 2, num_epochs=1.5).total == 3 + 2


def test_max_steps_decides_whatever_the_epochs_say():
    steps = pace([4], 2, max_steps=5)
    assert steps.total == 5
    assert steps.at(4).epoch == 2


def test_any_step_can_be_asked_for_without_those_before():
    assert pace([4], 2, max_steps=50).at(41).epoch == 20


def test_epochs_done_after_so_many_steps():
    steps = pace([4], 1, num_epochs=2)
    assert [steps.epoch_after(n) for n in (0, 1, 4, 6)] == [0.0, 0.25, 1.0, 1.5]
