"""The referee, the ratios and the page, over processes that are real once and else invented."""

import json
import sys

import pytest
from rich.console import Console

from ropewalk.bench import contenders, moe, race, report
from ropewalk.bench.contenders import Entrant, groups, present
from ropewalk.bench.moe import Plan, Result, compare, plan, shown
from ropewalk.bench.shapes import GEMMA, QWEN, Layer, Model
from ropewalk.cli import main
from ropewalk.errors import RopewalkError

TINY = Model("tiny", 1, 1, 32, 64, 32, 8, 2, vocab=128, rank=8)


def row(contender, policy="keep", ms=100.0, held=10.0, peak=20.0, level="model", **more):
    of = {
        "level": level,
        "shape": "s",
        "dtype": "float32",
        "stored": "",
        "tokens": 8,
        "layers": 1,
        "note": "",
        "share_of_ceiling": 0.5,
        "max_error": 1e-7,
    }
    return {**of, "contender": contender, "policy": policy, "ms": ms, "held_mb": held, "peak_mb": peak, **more}


def result(*rows, models=()):
    return Result(Plan("cpu", (), models, 1, True), {}, {"ours": 1e-7}, list(rows))


def test_ratios_are_taken_at_the_same_policy_and_against_the_fastest_peer():
    found = result(
        row("ours", ms=50, held=3), row("grouped", ms=100, held=12), row("eager", ms=1000, held=30),
        row("ours", "layer", ms=80, held=1, peak=5), row("grouped", "layer", ms=200, held=2, peak=10),
        row("ours", "offload", ms=90, held=1, peak=4),
    ).ratios()  # fmt: skip
    kept, layered = found["s, 1 layers, float32, T=8, keep"], found["s, 1 layers, float32, T=8, layer"]
    assert (kept["best_peer"], kept["best_peer_ratio"], kept["times_faster"]["eager"]) == ("grouped", 2.0, 20.0)
    assert (kept["held"]["grouped"], layered["best_peer_ratio"], layered["leanest_peak"]) == (0.25, 2.5, {"grouped": 0.4})
    # of ours that are no slower than 100 ms, the one that keeps a layer's input on the host has the lowest peak
    assert kept["as_fast_and_leanest"] == {"policy": "offload", "times_faster": 100 / 90, "held": 1 / 12, "peak": 0.2}


def test_whole_models_are_extrapolated_from_two_depths():
    models = tuple((Model("m", layers, 1, 8, published="m", depth=10), "float32", "") for layers in (2, 4))
    found = result(row("ours", shape="m", layers=2, ms=30.0), row("ours", shape="m", layers=4, ms=50.0), models=models)
    (whole,) = found.extrapolated()  # 10 ms a layer, 10 before them
    assert (whole["layers"], whole["extrapolated_ms"], whole["extrapolated_tokens_per_s"]) == (
        10,
        110.0,
        pytest.approx(8 / 0.11),
    )


def test_who_is_missing_is_told_with_the_reason(monkeypatch):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    there, missing = present("cpu")
    assert there == ["ours"]
    assert missing["grouped"] == "peft is not installed"
    assert missing["axolotl"] == "its kernels need a GPU"
    assert present("cuda")[0] == ["ours", "axolotl", "unsloth"]
    said = report.sentences(Result(plan("cpu", quick=True), missing))
    assert "grouped_mm + PEFT is left out: peft is not installed" in said
    assert any("pip install peft" in line for line in said)


def test_everybody_meets_at_each_policy():
    first, second = groups(["ours", "grouped", "eager"], "cpu", lean=True)
    assert [str(e) for e in first] == ["ours", "ours, experts", "ours, layer", "grouped", "eager"]
    assert [str(e) for e in second] == ["ours, layer", "ours, offload", "grouped, layer", "eager, layer"]
    assert groups(["ours", "grouped", "eager"], "cuda", lean=False) == [[Entrant("ours"), Entrant("grouped")]]


def test_plans_name_what_they_race():
    assert {d for _, _, d, _ in plan("cuda").layers} == {"bfloat16"}
    assert {m.layers for m, _, _ in plan("cuda").models} == {2, 4}
    assert len(shown("cpu").layers) == 2
    assert plan("cpu", dry=True).rounds == 1


PRETEND = """#!/bin/sh
case $3 in *axolotl*) exit 1 ;; esac
echo '{"ready": true}'
while read asked; do case $asked in
step) echo '{"ms": [5.0]}' ;;
kept) echo '{"held_mb": 1.0, "peak_mb": 2.0, "floor_ms": 4.0, "max_error": 1e-7}' ;;
esac; done
"""


def test_processes_are_asked_in_turns_and_a_peer_that_fails_leaves_the_race(tmp_path, monkeypatch):
    pretend = tmp_path / "python"
    pretend.write_text(PRETEND)
    pretend.chmod(0o755)
    monkeypatch.setattr(race.sys, "executable", str(pretend))
    told = []
    ours, other = race.model_rows(TINY, "float32", "cpu", [Entrant("ours"), Entrant("axolotl")], 2, told.append)
    assert (ours["ms"], ours["held_mb"], ours["share_of_ceiling"], ours["note"]) == (5.0, 1.0, 0.8, "")
    assert (other["ms"], other["note"]) == (None, "failed")
    assert ours["max_error"] == 1e-7
    assert len(told) == 4  # the truth, and a turn that warms up


ALONE = """#!/bin/sh
case $3 in *'"what": "models"'*) ;; *) exit 1 ;; esac
echo '{"race": 0, "policy": "keep", "ms": [4.0, 5.0, 9.0], "held_mb": 1.0, "peak_mb": 2.0, "floor_ms": 2.5, "max_error": 0.01}'
echo '{"race": 0, "policy": "layer", "note": "OutOfMemoryError: 9 GB"}'
"""


def test_on_a_gpu_a_contender_has_one_process_and_what_it_did_not_tell_is_a_row_too(tmp_path, monkeypatch):
    pretend = tmp_path / "python"
    pretend.write_text(ALONE)
    pretend.chmod(0o755)
    monkeypatch.setattr(race.sys, "executable", str(pretend))
    ways, raced = [Entrant("ours"), Entrant("ours", "layer")], [(TINY, "bfloat16", "")] * 2
    rows = race.models_alone(raced, [tmp_path / "t"] * 2, ways, "cuda", 1.0)
    assert [(r["ms"], r["max_error"], r["share_of_ceiling"]) for r in rows[:2]] == [(5.0, 0.01, 0.5), (None, None, None)]
    assert [r["note"] for r in rows] == ["", "OutOfMemoryError: 9 GB", race.ENDED, race.ENDED]


def test_on_a_gpu_the_most_valuable_runs_first():
    full = plan("cuda")
    assert [t for _, t, _, _ in full.layers[:4]] == [16384, 16384, 4096, 4096]
    found = moe.queue(full, ["ours", "grouped", "axolotl"])
    assert [[str(e) for e in entrants] for entrants, _ in found] == [
        ["ours"], ["grouped"], ["axolotl"],
        ["ours, experts", "ours, layer", "ours, offload"], ["grouped, layer"], ["axolotl, layer"], ["ours"],
    ]  # fmt: skip
    assert [{stored for _, _, stored in raced} for _, raced in found] == [{""}] * 6 + [{"nf4"}]
    assert {(m.name, m.layers, m.tokens) for m, _, _ in found[0][1]} == {
        (name, layers, tokens) for name in (QWEN, GEMMA) for layers in (2, 4) for tokens in (4096, 16384)
    }


def test_models_on_a_gpu_share_the_least_time_and_peers_of_few_bits_have_their_reasons(monkeypatch):
    def alone(races, truths, entrants, device, seconds):
        assert all(truth.exists() for truth in truths)
        mine = entrants[0].name == "ours"
        return [
            row(entrants[0].name, ms=10.0 if mine else 20.0, max_error=0.01, stored=stored, dtype="bfloat16", floor_ms=5.0 if mine else None,
                share_of_ceiling=0.5 if mine else None)
            for _, _, stored in races
        ]  # fmt: skip

    monkeypatch.setattr(race, "models_alone", alone)
    monkeypatch.setattr(race, "write_truth", lambda raced, device, file: file.touch())
    monkeypatch.setattr(moe, "present", lambda device: (["ours", "grouped"], {}))
    models = ((TINY, "bfloat16", ""), (TINY, "bfloat16", "nf4"))
    *_, last = compare(Plan("cuda", (), models, 1, False, gate=False), lambda line: None)
    assert [(r["contender"], r["stored"], r["share_of_ceiling"]) for r in last.rows] == [
        ("ours", "", 0.5), ("grouped", "", 0.25), ("ours", "nf4", 0.5), ("grouped", "nf4", None),
    ]  # fmt: skip
    assert "PEFT adapts none" in last.rows[-1]["note"]
    assert last.right


def test_a_result_is_right_where_ours_is_exact_in_float32_and_no_worse_than_peers_in_16_bits():
    def right(*rows):
        return result(*rows).right

    assert right(row("ours", max_error=1e-5))
    assert not right(row("ours", max_error=1e-3))
    assert not right(row("ours", max_error=None))
    assert not right(row("ours", ms=None, max_error=1e-5))
    theirs = row("grouped", dtype="bfloat16", max_error=0.04)
    assert right(row("ours", dtype="bfloat16", max_error=0.08), theirs)
    assert not right(row("ours", dtype="bfloat16", max_error=0.09), theirs)
    assert not right(row("ours", dtype="bfloat16", max_error=0.06))


def test_a_real_process_races_a_layer():
    (row,) = race.layer_rows(Layer("tiny", 64, 32, 8, 2), 16, "float32", "cpu", [Entrant("ours")], 1)
    assert row["max_error"] <= 1e-5
    assert row["level"] == "layer"


def test_a_process_that_ends_early_is_an_error_where_it_is_ours(monkeypatch):
    monkeypatch.setattr(race.sys, "executable", "/bin/false")
    with pytest.raises(RopewalkError, match="ended early"):
        race.errors(TINY, ["ours"], "cpu")
    (row,) = race.layer_rows(Layer("s", 1, 1, 1, 1), 8, "float32", "cpu", [Entrant("ours")], 1)
    assert (row["ms"], row["note"]) == (None, race.ENDED)
    assert not result(row).right


@pytest.fixture
def invented(monkeypatch):
    """Races that nobody runs."""
    monkeypatch.setattr(race, "errors", lambda shape, names, device: ({"ours": 2e-7, "grouped": 1e-7}, {}))
    rows = [row("ours", level="layer", ms=50.0, max_error=1e-7), row("grouped", level="layer", max_error=1e-7)]
    monkeypatch.setattr(race, "layer_rows", lambda *given: rows)
    monkeypatch.setattr(
        race, "model_rows", lambda *given: [row("ours", ms=40.0), row("grouped", ms=100.0), row("eager", ms=900.0, note="once")]
    )
    return rows


def test_bench_moe_prints_a_table_writes_a_plot_and_says_what_it_comes_to(invented, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["bench", "moe", "--device", "cpu", "--plot", str(tmp_path / "p.svg")]) == 0
    said = capsys.readouterr().out
    assert "Ropewalk" in said
    assert "2.50 times as fast as grouped_mm + PEFT" in said
    assert "█" in said
    plot = (tmp_path / "p.svg").read_text()
    assert plot.startswith("<svg")
    assert plot.count("grouped_mm + PEFT") >= 2


def test_bench_moe_as_json_holds_every_row(invented, tmp_path, capsys):
    assert main(["bench", "moe", "--device", "cpu", "--quick", "--json", "--plot", str(tmp_path / "p.svg")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"ms", "held_mb", "peak_mb", "share_of_ceiling", "max_error"} <= set(found["rows"][0])
    assert list(found["best_peer_ratio"].values()) == [2.0]


def test_a_result_that_is_wrong_ends_the_race_and_the_command(invented, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(race, "errors", lambda shape, names, device: ({"ours": 1e-3}, {}))
    assert main(["bench", "moe", "--device", "cpu", "--plot", str(tmp_path / "p.svg")]) == 1
    assert "differs from the plain layer" in capsys.readouterr().err


def test_what_cannot_be_is_refused_before_anything_runs(tmp_path, capsys):
    assert main(["bench", "moe", "--device", "cpu", "--plot", str(tmp_path / "none" / "p.svg")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    if "torch" in sys.modules and not sys.modules["torch"].cuda.is_available():
        assert main(["bench", "moe", "--device", "cuda"]) == 2
        assert "finds no GPU" in capsys.readouterr().err


def test_a_bar_is_as_long_as_its_share():
    assert [report.bar(share) for share in (0, 1, 0.5)] == ["", "█" * 28, "█" * 14]
    assert len(report.bar(0.51)) == 15


def test_the_comparison_goes_on_race_by_race(invented):
    found = list(compare(Plan("cpu", ((Layer("s", 1, 1, 1, 1), 8, "float32", ""),), ((TINY, "float32", ""),), 1, False), print))
    assert [len(r.errors) for r in found] == [2, 2, 2]
    assert moe.races_of(found[0].plan) == 3
    report.show(found[-1], Console(file=sys.stderr))
