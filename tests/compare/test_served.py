"""The same with a real engine: a base and an adapter over it, asked through the path that serves."""

from __future__ import annotations

import json

import pytest
import torch

from ropewalk.compare.candidates import add_candidate
from ropewalk.compare.fingerprint import get_fingerprint
from ropewalk.compare.gather import evidence
from ropewalk.compare.measures import measurements
from ropewalk.compare.prices import set_price
from ropewalk.compare.records import Plan, create, get_comparison
from ropewalk.compare.runner import ComparisonRunner
from ropewalk.compare.runs import outputs, runs_of
from ropewalk.compare.state import State
from ropewalk.compare.suites import add_suite
from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.engine.models import Models
from ropewalk.files.settings import Settings
from ropewalk.models.base import make_base
from ropewalk.models.load import load_base
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.registry import Registry


@pytest.fixture
def settings(tmp_path):
    return Settings(data=tmp_path / "data")


def adapter_over(base, folder):
    """An adapter whose factors are not zero."""
    adapter = attach(load_base(base), LoraSpec(r=4, alpha=16.0), 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapter.save(folder)
    return folder


def test_a_base_and_its_adapter_are_asked_measured_and_compared(opened, tmp_path):
    make_base(tmp_path / "base", "qwen3_moe", size="tiny", seed=3)
    registry = Registry(tmp_path / "registry")
    registry.publish_base("old", tmp_path / "base")
    registry.publish_adapter("new", adapter_over(tmp_path / "base", tmp_path / "adapter"), "old", {})
    rows = [{"prompt": f"What is {n} and {n}?", "checks": [{"kind": "contains", "value": "e"}]} for n in range(12)]
    rows += [{"prompt": "Say it as JSON.", "checks": [{"kind": "length", "most": 500, "unit": "words"}]}]
    source = "\n".join(map(json.dumps, rows)).encode()

    async def body(store, caller):
        models = Models(store, registry, Serving(engine=EngineOptions(threads=1)))
        try:
            old, new = [await add_candidate(store, models, caller, name) for name in ("old", "new")]
            await set_price(store, caller, "", "hour", 1.5, "2026-11-22", "what the machine is rented for")
            suite = await add_suite(store, caller, source, hold=0)
            plan = Plan(sampling={"temperature": 0.0, "max_tokens": 8})
            made = await create(store, caller, baseline_id=old.id, candidate_ids=[new.id], suite_id=suite.id, plan=plan)
            (found,) = await ComparisonRunner(store, models).run(caller, made.id)
            assert found.verdict.state in (State.TIE, State.NOT_ENOUGH, State.SKIP, State.SHIP)
            assert found.verdict.n_prompts == 13
            made = await get_comparison(store, caller, made.id)
            assert (made.state, made.error) == ("done", None)

            runs = await runs_of(store, caller, made)
            texts = {id: [one.text for one in await outputs(store, caller, run.id)] for id, run in runs.items()}
            assert texts[old.id] != texts[new.id], "the adapter answers for itself"
            measured = {id: {m.metric: m for m in await measurements(store, caller, run.id)} for id, run in runs.items()}
            for one in measured.values():
                assert one["peak memory"].value > 50
                assert 0 < one["p50 time to first token"].value <= one["p50 latency"].value <= one["p95 latency"].value
                assert one["tokens out"].value <= 13 * 8
                assert one["tokens in"].value > 13
            cost = measured[new.id].get("cost per passing answer")
            assert cost is None or (cost.unit == "USD" and 0 < cost.value < 0.01 and cost.detail["as_of"] == "2026-11-22")
            machine = await get_fingerprint(store, measured[new.id]["peak memory"].fingerprint_id)
            assert machine.device
            assert machine.versions["torch"] == torch.__version__
            (gathered,) = await evidence(store, caller, made)
            assert all(one.comparable for one in gathered.measurements)
            assert not gathered.troubles

            again = await create(store, caller, baseline_id=old.id, candidate_ids=[old.id], suite_id=suite.id, plan=plan)
            (same,) = await ComparisonRunner(store, models).run(caller, again.id)
            assert same.verdict.state is State.TIE
        finally:
            await models.close()

    opened(body)
