from __future__ import annotations

from pathlib import Path

import pytest

from ropewalk.engine.reply import Served, load_served, replies, reply
from ropewalk.errors import NotFound
from ropewalk.quickstart.run import BASE
from ropewalk.registry import Registry

PASSAGE = "Kelmar is a town. The capital of Kelmar is Lodravo. Its code is QX. 4,312 people live there."


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{PASSAGE}\n\n{question}"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Served:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    registry.publish_base("base", BASE)
    registry.ship("answers", "base")
    return load_served(registry, "answers")


def test_the_shipped_base_copies_answers_out_of_an_invented_passage(base: Served) -> None:
    assert reply(base, ask("What is the capital of Kelmar?"), 16) == "Lodravo"
    assert reply(base, ask("How many people live in Kelmar?"), 16) == "4,312"


def test_a_batch_gives_what_its_rows_give_alone(base: Served) -> None:
    asked = [
        ask("What is the capital?"),
        [{"role": "user", "content": "Short?"}],
        ask("What is the code of Kelmar? And do tell it in full."),
    ]
    assert replies(base, asked, 12, batch=3) == [reply(base, messages, 12) for messages in asked]


def test_a_reply_is_no_longer_than_asked_for(base: Served) -> None:
    (short,) = replies(base, [ask("How many people live in Kelmar?")], 2)
    assert len(base.template.encode(short)) <= 2


def test_a_name_that_is_not_published_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="'nobody'"):
        load_served(Registry(tmp_path), "nobody")
