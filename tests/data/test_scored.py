"""Rows that are scored: steps with their verdicts, pairs with a margin, and what is wrong with them."""

import pytest

from ropewalk.config.run import DataSource, parse_run
from ropewalk.data.preferences import example_reader
from ropewalk.data.stepwise import Steps, steps_reader
from ropewalk.errors import DataError

STEPS = DataSource(path="x.jsonl", type="stepwise_supervised")
RUN = "base_model: b\nlearning_rate: 1e-4\nreward_model: true\ndatasets: [{path: x.jsonl, type: bradley_terry.chat_template}]\n"


def test_a_row_of_steps_is_read_with_labels_of_any_writing():
    row = {"prompt": "2 + 2?", "completions": ["4", "so 5", "done"], "labels": [True, "-", 1]}
    assert steps_reader(STEPS)(row) == Steps("2 + 2?", ("4", "so 5", "done"), (True, False, True))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"completions": ["4"], "labels": [True]}, "prompt"),
        ({"prompt": "p", "completions": "4", "labels": [True]}, "expected a list of texts"),
        ({"prompt": "p", "completions": ["4", ""], "labels": [True, True]}, "none of them empty"),
        (
            {"prompt": "p", "completions": ["4", "5"], "labels": [True]},
            "expected a list of 2, one for each of completions, found 1",
        ),
        ({"prompt": "p", "completions": ["4"], "labels": ["maybe"]}, "step 1: expected true or false, found 'maybe'"),
    ],
)
def test_what_is_wrong_with_a_row_of_steps_is_told(row, said):
    with pytest.raises(DataError) as caught:
        steps_reader(STEPS)(row)
    assert said in str(caught.value)


def test_a_pair_may_have_a_margin_which_must_be_a_number():
    run = parse_run(RUN)
    read = example_reader(run.datasets[0], run)
    pair = {"system": "Be brief.", "input": "?", "chosen": "yes", "rejected": "no, no"}
    assert read(pair).margin == 0.0
    assert read(pair | {"margin": 1.5}).margin == 1.5
    assert [m["role"] for m in read(pair).chosen.messages] == ["system", "user", "assistant"]
    with pytest.raises(DataError, match="expected a number, found 'much'"):
        read(pair | {"margin": "much"})
