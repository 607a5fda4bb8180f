"""What questions cost, added up on both databases; money by hand."""

import csv
import json

import pytest
from sqlalchemy import insert

from ropewalk.errors import BadInput
from ropewalk.files import token_ledger
from ropewalk.files.token_ledger import Spent, TokenLedger
from ropewalk.tenants import token_report
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.prices import Money, Price, is_day, saved, shown
from ropewalk.tenants.tables import storage_days
from ropewalk.tenants.token_report import Trained, report
from ropewalk.tenants.workspaces import create_workspace

NOW = 1_795_305_600_000_000  # 2026-11-22, UTC
PRICES = {"a": Price(10.0, 20.0, 1.0, 12.5), "b": Price(4.0, currency="EUR")}


def test_days_models_and_workspaces_add_up(tell, monkeypatch):
    monkeypatch.setattr(token_report, "now", lambda: NOW)

    async def story(database, vault):
        one, two = [(await create_workspace(database, vault, name)).id for name in ("one", "two")]
        ledger = TokenLedger(database)
        for day, workspace, user, model, spent in (
            ("2026-11-22", one, None, "a", Spent(100, 200, 700, 50)),
            ("2026-11-22", one, "ann", "b", Spent(10, 0, 90, 5)),
            ("2026-11-20", one, None, "a", Spent(1, 1, 1, 1)),
            ("2026-11-15", one, None, "a", Spent(9, 9, 9, 9)),  # before the first day that is asked for
            ("2026-11-21", two, None, "c", Spent(0, 0, 1000, 0)),
        ):
            monkeypatch.setattr(token_ledger, "today", lambda day=day: day)
            ledger.add(Caller("o", workspace, None, user), model, spent, {})
        await ledger.close()
        own = await report(database, one, 7, PRICES.get)
        assert (own.first, own.last, next(iter(own.days))) == ("2026-11-16", "2026-11-22", "2026-11-16")
        assert [own.days[day].requests for day in ("2026-11-19", "2026-11-20", "2026-11-22")] == [0, 1, 2]
        # a: 101 at 10, 201 at 12.5, 701 at 1 and 51 at 20 are 5,243.5 millionths; 701 more at 10 - 1 would have been 6,309.
        assert own.models["a"].cost.amounts == {"USD": pytest.approx(0.0052435)}
        assert own.models["a"].saved.amounts == {"USD": pytest.approx(0.006309)}
        assert own.total.cost.amounts == {"USD": pytest.approx(0.0052435), "EUR": pytest.approx(0.00004)}
        assert (own.models["b"].share, own.workspaces) == (0.9, {})
        assert list((await report(database, one, 7, PRICES.get, "ann")).models) == ["b"]
        whole = await report(database, None, 7, PRICES.get)
        assert {name: sums.requests for (_, name), sums in whole.workspaces.items()} == {"one": 3, "two": 1}
        assert whole.models["c"].cost.amounts == {}
        told = json.loads(json.dumps(whole.as_dict()))
        assert (told["total"]["requests"], told["total"]["cache_read_input_tokens"]) == (4, 1791)
        assert len(whole.as_csv().splitlines()) == 5
        lines = [line.split(",") for line in whole.as_csv().splitlines()]
        assert {len(line) for line in lines} == {15}
        with pytest.raises(BadInput, match="days: 0 is out of range"):
            await report(database, one, 0, PRICES.get)

    tell(story)


def test_trainings_and_stored_bytes_are_counted_beside_questions(tell, monkeypatch):
    monkeypatch.setattr(token_report, "now", lambda: NOW)
    prices = {"a": Price(training=3.0, device_hour=2.0), "b": Price(1.0)}

    async def story(database, vault):
        one, two = [(await create_workspace(database, vault, name)).id for name in ("one", "two")]
        jobs = (
            Trained("2026-11-21", "a", one, 2, 1_500_000, 1800.0),
            Trained("2026-11-21", "b", one, 1, 10, 5.0),
            Trained("2026-11-22", "a", two, 1, 1_000_000, 0.0),
        )
        asked = []

        async def training(database, first, workspace_id, user_id):
            asked.append((first, workspace_id, user_id))
            return [job for job in jobs if workspace_id in (None, job.workspace_id)]

        async with database.writing() as connection:
            await connection.execute(insert(storage_days).values(workspace_id=one, day="2026-11-21", used_bytes=12_345))
        own = await report(database, one, 7, prices.get, None, training, prices.get)
        assert asked == [("2026-11-16", one, None)]
        # A million and a half at 3 a million and half an hour at 2 are 5.5; of b no price for trainings is known.
        assert (own.total.jobs, own.total.trained, own.total.device_seconds) == (3, 1_500_010, 1805.0)
        assert own.days["2026-11-21"].training_cost.amounts == {"USD": pytest.approx(5.5)}
        assert own.models["b"].training_cost.amounts == {}
        table = list(csv.DictReader(own.as_csv().splitlines()))
        stored, of_a, of_b = sorted(table, key=lambda line: line["model"])
        assert (stored["day"], stored["stored_bytes"], stored["requests"]) == ("2026-11-21", "12345", "")
        assert (of_a["jobs"], of_a["trained_tokens"], of_a["device_seconds"]) == ("2", "1500000", "1800.000")
        assert (of_a["training_cost"], of_a["currency"], of_a["cost"], of_b["training_cost"]) == ("5.50000000", "USD", "", "")
        whole = await report(database, None, 7, prices.get, None, training, prices.get)
        assert {name: sums.jobs for (_, name), sums in whole.workspaces.items()} == {"one": 3, "two": 1}
        assert whole.as_dict()["total"]["training_cost"] == {"USD": 8.5}

    tell(story)


def test_amounts_are_shown_with_the_decimals_that_they_need():
    assert [shown(amount) for amount in (0, 0.0000131, 0.5, 0.01234, 1234.5)] == [
        "0.00",
        "0.000013",
        "0.5",
        "0.0123",
        "1,234.50",
    ]
    money = Money({"USD": 1.5, "EUR": 0.25})
    assert str(money) == "0.25 EUR + 1.50 USD"
    assert str(saved([("a", 1_000_000), ("b", 10), ("free", 10)], PRICES)) == "0.00004 EUR + 9.00 USD"


def test_what_is_a_day():
    assert [is_day(text) for text in ("2026-11-22", "2026-02-30", "20261122", "May")] == [True, False, False, False]
