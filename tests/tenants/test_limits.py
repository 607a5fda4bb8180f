"""Request limits: a bucket that fills by the minute, one per workspace."""

import pytest
import time_machine

from ropewalk.errors import RateLimited
from ropewalk.tenants.limits import MOST_BUCKETS, Limits


class Clock:
    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


def test_a_workspace_without_a_limit_is_never_refused_and_told_nothing():
    limits = Limits()
    assert [limits.take("a").headers() for _ in range(1000)] == [{}] * 1000


@time_machine.travel("2026-11-22T12:00:00Z", tick=False)
def test_a_bucket_empties_and_fills_by_the_minute():
    clock = Clock()
    limits = Limits(clock=clock)
    # 3 a minute: three at once, then one every 20 seconds.
    assert [limits.take("a", 3).remaining for _ in range(3)] == [2, 1, 0]
    with pytest.raises(RateLimited, match=r"3 requests a minute; the next one in 20 seconds") as refused:
        limits.take("a", 3)
    assert refused.value.retry_after == pytest.approx(20)
    # Empty at 12:00:00, so full a minute later.
    assert limits.left("a").headers() == {
        "anthropic-ratelimit-requests-limit": "3",
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": "2026-11-22T12:01:00Z",
    }
    clock.at += 19
    with pytest.raises(RateLimited):
        limits.take("a", 3)
    clock.at += 1.001
    assert limits.take("a", 3).remaining == 0
    clock.at += 3600
    assert limits.take("a", 3).remaining == 2  # never more than a minute's


def test_waiting_as_long_as_told_is_enough():
    clock = Clock()
    limits = Limits(7, clock)
    for _ in range(7):
        limits.take("a")
    for _ in range(20):
        with pytest.raises(RateLimited) as refused:
            limits.take("a")
        clock.at += refused.value.retry_after + 1e-6
        limits.take("a")


def test_workspaces_do_not_share_a_bucket_and_their_own_limit_goes_before_the_default():
    limits = Limits(1, Clock())
    limits.take("a")
    limits.take("b")
    with pytest.raises(RateLimited):
        limits.take("a")
    assert limits.take("c", 5).limit == 5


def test_a_changed_limit_holds_at_once():
    limits = Limits(clock=Clock())
    limits.take("a", 1)
    with pytest.raises(RateLimited):
        limits.take("a", 1)
    assert limits.take("a", 10).remaining == 9


def test_many_workspaces_do_not_fill_the_memory():
    clock = Clock()
    limits = Limits(60, clock)
    for number in range(MOST_BUCKETS):
        limits.take(f"w{number}")
    clock.at += 1.5  # each has its one request back
    limits.take("new")
    assert len(limits._buckets) == 1


def test_buckets_in_use_are_kept_when_room_is_made():
    clock = Clock()
    limits = Limits(2, clock)
    limits.take("busy")
    limits.take("busy")
    for number in range(MOST_BUCKETS + 10):
        limits.take(f"w{number}")
    with pytest.raises(RateLimited):
        limits.take("busy")
