from __future__ import annotations

import math

import numpy as np
import pytest

from ropewalk.compare.evidence import Kind, Row
from ropewalk.compare.statistics import counts, group_means, holm, mid_p, more_prompts, of_means, paired, two_figures


def rows(both: int, only_new: int, only_old: int, neither: int) -> list[Row]:
    pairs = [(1.0, 1.0)] * both + [(0.0, 1.0)] * only_new + [(1.0, 0.0)] * only_old + [(0.0, 0.0)] * neither
    return [Row(f"p{i}", f"g{i}", old, new) for i, (old, new) in enumerate(pairs)]


def test_the_p_value_is_that_of_fair_coins_with_half_of_the_exact_draw() -> None:
    # 9 to 1: 2 * (C(10,0) + C(10,1)) / 2^10 - C(10,1) / 2^10 = (22 - 10) / 1024
    assert mid_p(9, 1) == mid_p(1, 9) == pytest.approx(12 / 1024)
    # 6 to 0: 2 / 2^6 - 1 / 2^6
    assert mid_p(6, 0) == pytest.approx(1 / 64)
    assert mid_p(0, 0) == 1.0
    assert mid_p(3, 3) == pytest.approx(1.0)


def test_rows_are_counted_in_pairs() -> None:
    told = counts(rows(4, 9, 1, 6))
    assert (told.both, told.only_new, told.only_old, told.neither) == (4, 9, 1, 6)


def test_a_group_has_one_mean() -> None:
    found = group_means([Row("1", "a", 0, 1), Row("2", "b", 1, 0.5), Row("3", "a", 0, 0)])
    assert found == [0.5, -0.5]


def test_the_interval_is_that_of_bonett_and_price_for_single_pass_fail_prompts() -> None:
    # 100 prompts, 15 fixed and 5 broken: (15+1)/102 - (5+1)/102 = .09804; variance of a prompt .09804's:
    # (16 + 6)/102 - .09804^2 = .20607, times 102/101 = .20811; error sqrt(.20811/102) = .04517; t(99) = 1.9842
    found = paired(rows(40, 15, 5, 40))
    assert found is not None
    assert found.interval.effect == pytest.approx(0.10)
    assert found.interval.low == pytest.approx(0.09804 - 1.9842 * 0.04517, abs=1e-4)
    assert found.interval.high == pytest.approx(0.09804 + 1.9842 * 0.04517, abs=1e-4)
    assert found.method == "mid-p McNemar"
    assert found.p == mid_p(15, 5)


def test_prompts_of_one_group_count_once() -> None:
    # the same ten prompts said ten times are ten groups, whatever their number
    single = [Row(f"{i}", f"{i}", 0, float(i < 7)) for i in range(10)]
    tenfold = [Row(f"{i}.{j}", f"{i}", 0, float(i < 7)) for i in range(10) for j in range(10)]
    one, ten = paired(single), paired(tenfold)
    assert one is not None
    assert ten is not None
    assert ten.n_groups == 10
    assert ten.method == "t-test on groups"
    # seven groups at 1, three at 0, and two made-up ones at 1/10 and -1/10: centre 7/12, squares 7.02,
    # variance (7.02 - 12 * .3403)/11 = .26697, error sqrt(.26697/12) = .14916, t(9) = 2.2622
    assert ten.interval.low == pytest.approx(7 / 12 - 2.2622 * 0.14916, abs=1e-4)


def test_judged_prompts_are_not_coins() -> None:
    found = paired([Row(f"{i}", f"{i}", 0.25, 0.75, Kind.JUDGE) for i in range(4)])
    assert found is not None
    assert found.method == "t-test on groups"


def test_one_group_has_no_interval() -> None:
    assert paired([Row("1", "a", 0, 1), Row("2", "a", 0, 1)]) is None
    assert paired([]) is None


def test_what_never_differed_is_known_to_within_what_could_have_been_missed() -> None:
    # 100 times no difference, and the made-up two: variance 2/101, error sqrt(2/101/102) = .013933, t(99) = 1.9842
    found = of_means([0.0] * 100, 100)
    assert found is not None
    assert found.interval.high == -found.interval.low == pytest.approx(1.9842 * 0.013933, abs=1e-5)
    assert found.p == 1.0


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    # .01 * 4; .03 * 3 = .09; .04 * 2 = .08, raised to .09; .5 * 1
    assert holm([0.04, 0.01, 0.5, 0.03]) == pytest.approx([0.09, 0.04, 0.5, 0.09])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_number_of_prompts_asked_for_is_enough_four_times_in_five() -> None:
    # 200 prompts, 24 fixed, 16 broken: 4 points up; sd = sqrt((25+17)/202 - (8/202)^2) * sqrt(202/201) = .45534
    # at p <= .05 either way and power .8: (1.95996 + .84162)^2 * .20733 / .0016 = 1017, of which 200 are there
    found = paired(rows(100, 24, 16, 60))
    assert found is not None
    assert more_prompts(found, margin=0.0, level_better=0.05) == pytest.approx(820, abs=10)
    # twice the disagreement, twice the prompts; a wider margin may be met sooner
    louder = paired(rows(60, 44, 36, 60))
    assert louder is not None
    assert more_prompts(louder, 0.0, 0.05) > 1.9 * 820
    assert more_prompts(found, 0.2, 0.05) < 200


def test_an_estimate_has_two_figures() -> None:
    assert [two_figures(x) for x in (1.0, 9.2, 43.1, 311.0, 1021.0)] == [1, 10, 44, 320, 1100]


@pytest.mark.parametrize(("n_groups", "size", "shared"), [(300, 1, 0.0), (40, 1, 0.0), (20, 10, 0.3), (12, 4, 0.5)])
def test_intervals_hold_the_truth_as_often_as_they_say(n_groups: int, size: int, shared: float) -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(1000):
        # each prompt is fixed (.15), broken (.08) or neither; prompts of one document share their luck at the given rate
        own = rng.choice([1.0, -1.0, 0.0], p=[0.15, 0.08, 0.77], size=(n_groups, size))
        common = rng.choice([1.0, -1.0, 0.0], p=[0.15, 0.08, 0.77], size=(n_groups, 1))
        means = np.where(rng.random((n_groups, size)) < math.sqrt(shared), common, own).mean(1)
        found = of_means(means.tolist(), n_groups * size)
        assert found is not None
        inside += found.interval.low <= 0.07 <= found.interval.high
    assert 0.93 <= inside / 1000 <= 0.99
