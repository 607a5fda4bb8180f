"""What the generator has read lately."""

import torch

from ropewalk.engine.cache import Segment
from ropewalk.train.recent_prefixes import RecentPrefixes


def segment(key, size=16):
    pair = torch.zeros(1, 1, size, 1), torch.zeros(1, 1, size, 1)
    return Segment(key, 0, tuple(range(size)), (pair,))


def test_the_least_recently_used_is_given_up_first():
    recent = RecentPrefixes(room=2 * segment("").nbytes)
    for key in ("a", "b"):
        recent.put(segment(key), None)
    assert recent.find("a", None) is not None
    recent.put(segment("c"), None)
    assert recent.find("b", None) is None
    assert recent.find("a", None) is not None
    assert recent.held == recent.room


def test_a_key_names_its_ids_and_what_they_stand_behind():
    recent = RecentPrefixes()
    first = recent.key("", "", "", [1, 2])
    assert first == recent.key("", "", "", [1, 2])
    assert len({first, recent.key("", "", "", [1, 3]), recent.key(first, "", "", [1, 2])}) == 3


def test_nothing_that_an_older_adapter_has_read_is_left():
    recent = RecentPrefixes()
    recent.put(segment("a"), None)
    recent.forget()
    assert recent.find("a", None) is None
    assert recent.held == 0
