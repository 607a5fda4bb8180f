"""The quickstart's pages stand alone: each is one file that needs no server, in the look of the server's pages."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from browser import chromium, violations, visit
from ropewalk.chat.messages import Cited, Usage
from ropewalk.compare.candidates import Candidate
from ropewalk.compare.diff import Change
from ropewalk.compare.outcomes import Outcome
from ropewalk.compare.records import StoredVerdict
from ropewalk.compare.state import State
from ropewalk.compare.suites import Prompt
from ropewalk.compare.verdict import Interval, Reason, Verdict
from ropewalk.files.catalog import File
from ropewalk.quickstart import facts
from ropewalk.quickstart.comparison import Compared
from ropewalk.quickstart.comparison_page import slices, write_comparison
from ropewalk.quickstart.page import Page, Sample, Score, write_page
from ropewalk.quickstart.question import Dialogue, Told
from ropewalk.quickstart.telling import progress
from ropewalk.standalone import SHEET
from ropewalk.train.plots import line_plot
from ropewalk.train.samples_page import samples_page

SOURCE = Path(__file__).parents[2] / "src" / "ropewalk"
ASKED = facts.questions(facts.split()[1][:2], 2)
IDS = [f"prompt_{number:024}" for number in range(len(ASKED))]
# The first was right and is wrong, the second was wrong and is right, and so on.
SAMPLES = [
    Sample(q.passage, q.question, q.answer, "no <b>", "right" if n % 2 == 0 else "wrong", q.answer, "wrong" if n % 2 == 0 else "right")
    for n, q in enumerate(ASKED)
]  # fmt: skip


def candidate(name: str, digit: int) -> Candidate:
    return Candidate(f"cand_{digit:024}", "w", None, "base", name, name, "d", "f", "t")


@pytest.fixture
def compared() -> Compared:
    verdict = Verdict(
        candidate="cand", baseline="base", state=State.SHIP, rule_version="1", interval=Interval(0.5, 0.25, 0.75),
        reasons=(Reason("better than reader: +50.0 points"), Reason(f"{IDS[0]} got worse", (IDS[0],))),
        p=0.01, p_adjusted=0.01, method="t on groups", n_prompts=4, n_groups=2, regressions=(IDS[0],), fixed=(IDS[1],),
    )  # fmt: skip
    changes = [Change.BROKE, Change.FIXED, Change.BROKE, Change.FIXED]
    became = [
        Outcome(Prompt(id, "suite", number, "g", False, ({"role": "user", "content": "q"},)), change, None, None, None)
        for number, (id, change) in enumerate(zip(IDS, changes), 1)
    ]
    stored = StoredVerdict("verd_1", "cmp_1", f"cand_{2:024}", 1, verdict, "i", 0)
    answers = [sample.before for sample in SAMPLES], [sample.after for sample in SAMPLES]
    return Compared(stored, candidate("reader", 1), candidate("reader-house", 2), sorted(became, key=order), *answers)


def order(one: Outcome) -> int:
    return list(Change).index(one.change)


def index(compared: Compared) -> Page:
    told = [Told(q, "Lima", (Cited("char_location", "Lima.", 0, None, "file_1", 0, 5),), Usage(3, 90, 0, 9), 0.1) for q in "ab"]
    file = File("file_1", "w", None, None, None, "train.jsonl", "application/jsonl", 1, "", (), 0, None, None, True)
    plot = line_plot("Loss", "step", "loss", [("loss", [1, 2], [2.0, 1.0])])
    scores = [Score("before", "the base", 0.5), Score("after", "base and adapter", 0.5)]
    return Page(scores, compared, SAMPLES, plot, "loss 2 to 1", 4, file, Dialogue("Lima.", tuple(told)), None, 100, True)


def test_the_comparison_is_a_page_with_verdict_interval_slices_and_every_question(compared, tmp_path):
    page = write_comparison(compared, ASKED, SAMPLES, tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "better than reader: +50.0 points" in page
    assert "prompt 1 got worse" in page  # by its number, as nobody knows its id
    assert "95% interval +25 to +75" in page
    numbers = re.findall(r"<summary>#(\d)", page)
    assert numbers == ["1", "3", "2", "4"]  # the broken first
    assert page.count("no &lt;b&gt;") == 4
    assert 'href="index.html"' in page


def test_slices_are_all_questions_and_those_of_each_kind():
    whole, *kinds = slices(ASKED, SAMPLES)
    assert (whole.name, whole.questions, whole.before, whole.after) == ("all", 4, 0.5, 0.5)
    assert sum(one.questions for one in kinds) == 4
    assert {one.name for one in kinds} == {next(k.house for k in facts.KINDS if k.field == q.kind) for q in ASKED}


def test_the_pages_can_be_read_by_everybody_and_ask_nobody_for_anything(compared, tmp_path):
    write_comparison(compared, ASKED, SAMPLES, tmp_path / "comparison.html")
    write_page(index(compared), tmp_path / "index.html")
    (tmp_path / "grpo").mkdir()
    sample = {"prompt": "q", "completion": "a", "reward": 1.0, "rewards": {"x": 1.0, "y": 0.0}, "advantage": 0.5}
    log = [{"event": "samples", "step": 1, "samples": [sample]}]
    (tmp_path / "grpo" / "samples.html").write_text(samples_page(log, "grpo"), encoding="utf-8")
    with chromium() as browser, visit(browser, "file://") as seen:
        for name in ("index.html", "comparison.html", "grpo/samples.html"):
            seen.page.goto(f"file://{tmp_path}/{name}")
            assert violations(seen.page) == [], name
            assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        seen.page.goto(f"file://{tmp_path}/index.html")
        seen.page.get_by_role("link", name="every question with both answers").click()
        assert seen.page.get_by_role("heading", name="SHIP").is_visible()


def test_no_page_has_a_palette_of_its_own():
    templates = [*SOURCE.rglob("*.j2"), *SOURCE.rglob("*.html"), *SOURCE.rglob("*.css")]
    assert [path for path in templates if "--ink:" in path.read_text(encoding="utf-8")] == [SHEET]


def test_without_a_terminal_each_thing_that_is_done_is_a_line_and_each_quarter_of_it():
    console = Console(file=io.StringIO(), width=80)
    with progress(console) as tell:
        for doing, share in [
            ("loading", 0),
            ("asking", 0),
            ("asking", 0.2),
            ("asking", 0.3),
            ("asking", 0.9),
            ("asking", 1),
            ("ended", 1),
        ]:
            tell(doing, share)
    assert console.file.getvalue().splitlines() == ["loading", "asking", "asking: 25 %", "asking: 75 %"]


def test_on_a_terminal_there_is_a_bar():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with progress(console) as tell:
        tell("asking", 0.5)
    assert "asking" in console.file.getvalue()
    assert "50%" in console.file.getvalue()
