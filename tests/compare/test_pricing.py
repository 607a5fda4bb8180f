"""What answers cost is said on the command line, with its day."""

import json

import pytest

from ropewalk.cli import main


def price(capsys, folder, *arguments):
    """Exit code, rows printed, and what was said about a mistake."""
    try:
        code = main(["compare", "price", *arguments, "--data", str(folder), "--json"])
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_prices_are_kept_per_token_and_listed_with_their_day(tmp_path, capsys):
    given = ("big", "--input", "0.15", "--output", "0.6", "--from", "2026-11-01", "--source", "their list")
    assert price(capsys, tmp_path, *given)[0] == 0
    code, rows, _ = price(capsys, tmp_path, "--hour", "0.8", "--from", "2026-11-02")
    assert code == 0
    found = {(row["target"], row["unit"]): (row["usd"], row["valid_from"], row["source"]) for row in rows}
    assert found == {
        ("", "hour"): (0.8, "2026-11-02", ""),
        ("big", "input token"): (0.15e-6, "2026-11-01", "their list"),
        ("big", "output token"): (0.6e-6, "2026-11-01", "their list"),
    }
    assert price(capsys, tmp_path)[1] == rows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--input", "1"), "name it before the prices"),
        (("big",), "expected --input and --output"),
        (("big", "--input", "-1"), "expected 0 or more"),
        (("big", "--input", "1", "--from", "soon"), "expected one such as 2026-11-22"),
        (("big", "--hour", "1"), "an hour is of this machine"),
    ],
)
def test_a_price_that_cannot_be_is_refused(arguments, said, tmp_path, capsys):
    code, rows, err = price(capsys, tmp_path, *arguments)
    assert code == 2
    assert rows == []
    assert said in err
