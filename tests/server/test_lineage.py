"""The drawing of where models come from, and which step of the loop is next; both without a browser."""

from types import SimpleNamespace

import pytest

from ropewalk.server.home_page import Counts, the_loop
from ropewalk.server.lineage import ALIAS, COLUMNS, FILE, GAP, HEAD, JOB, MODEL, MOST_ROWS, PITCH, WIDTH, Graph


def test_boxes_stand_in_their_columns_beside_what_they_are_made_of():
    graph = Graph()
    for number in range(3):
        file, job = graph.add(FILE, f"f{number}", f"{number}.jsonl"), graph.add(JOB, f"j{number}", f"job {number}")
        graph.link(file, job)
    model = graph.add(MODEL, "m", "ft:tiny:house:AAAABBBBCCCCDDDD")
    graph.link("j2", model)
    graph.link(model, graph.add(ALIAS, "a", "answers"))
    drawing = graph.drawn()
    at = {box.key: (box.x, box.y) for box in drawing.boxes}
    assert at["f2"] == (0, HEAD + 2 * PITCH)
    assert at["m"] == (2 * (WIDTH + GAP), HEAD + 2 * PITCH)  # level with its job
    assert at["a"] == (3 * (WIDTH + GAP), at["m"][1])  # a column that holds nothing takes no room
    assert [name for name, _ in drawing.columns] == ["Files", "Jobs", "Models", "Aliases"]
    assert [(edge.source.title, edge.target.title) for edge in drawing.edges][-1][1] == "answers"
    assert next(box.short for box in drawing.boxes if box.key == "m") == "ft:tiny:house…CCCDDDD"
    assert drawing.width == 3 * (WIDTH + GAP) + WIDTH


def test_what_has_no_room_is_counted_and_nothing_is_no_drawing():
    graph = Graph()
    assert graph.drawn() is None
    for number in range(MOST_ROWS + 3):
        graph.link(graph.add(FILE, f"f{number}", str(number)), graph.add(MODEL, "m", "model"))
    drawing = graph.drawn()
    assert (drawing.left_out, len(drawing.edges), len(COLUMNS)) == (3, MOST_ROWS, 6)


NOTHING = Counts(files=0, jobs=(), trained=0, verdicts=0, shippable="", aliases=0, served=0, questions=0)


@pytest.mark.parametrize(
    ("more", "number", "href"),
    [
        ({}, 0, "/files"),
        ({"files": 1}, 1, "/jobs"),
        ({"files": 1, "jobs": [SimpleNamespace(id="x", state="running", step=1, steps=4)]}, 1, "/jobs/x"),
        ({"files": 1, "trained": 1}, 2, "/compare/new"),
        ({"files": 1, "trained": 1, "verdicts": 2, "shippable": "/compare/c/ship"}, 3, "/compare/c/ship"),
        ({"files": 1, "trained": 1, "verdicts": 2, "aliases": 1}, 4, "/chat"),
    ],
)
def test_the_next_step_is_the_first_that_was_not_taken(more, number, href):
    steps, advice, leads = the_loop(Counts(**{**vars(NOTHING), **more}))
    assert [step.next for step in steps].index(True) == number
    assert len(steps) == 5
    assert (leads, advice.endswith(".")) == (href, True)
