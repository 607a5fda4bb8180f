"""What a candidate costs beside what is served, where the two were measured on the same machine."""

from __future__ import annotations

from ropewalk.compare.evidence import Evidence, Limits, Measurement, Metric
from ropewalk.compare.verdict import Reason


def too_dear(evidence: Evidence, limits: Limits) -> list[Reason]:
    """Measurements beyond a limit that was set; where a limit is set but the two cannot be compared, that too is told by `untold`."""
    over = []
    for measurement in evidence.measurements:
        limit, ratio = limit_of(measurement.metric, limits), measurement.ratio
        if limit is not None and ratio is not None and ratio > limit:
            over.append(
                Reason(f"{measurement.metric} is {ratio:.2f} times what is served; the limit is {limit:g}", (measurement.id,))
            )
    return over


def limit_of(metric: Metric, limits: Limits) -> float | None:
    return {Metric.COST: limits.cost_ratio, Metric.LATENCY: limits.latency_ratio, Metric.MEMORY: limits.memory_ratio}[metric]


def cheaper(evidence: Evidence, limits: Limits) -> list[Reason]:
    """Where the candidate saves enough in cost or latency to be worth a change, and neither rises as much."""
    told = [m for m in evidence.measurements if m.metric in (Metric.COST, Metric.LATENCY) and m.ratio is not None]
    if any(m.ratio is not None and m.ratio >= 1 + limits.cheaper for m in told):
        return []
    return [
        Reason(f"{m.metric} is {100 * (1 - m.ratio):.0f} % lower: {figure(m)}", (m.id,))
        for m in told
        if m.ratio is not None and m.ratio <= 1 - limits.cheaper and apart(m)
    ]


def apart(measurement: Measurement) -> bool:
    """Whether the readings differ by more than their own intervals, where they have any."""
    high, low = measurement.new.high, measurement.old.low
    return high is None or low is None or high < low


def prices(evidence: Evidence) -> list[Reason]:
    """Every measurement in a sentence; figures of different machines stand side by side without a ratio."""
    return [
        Reason(f"{m.metric}: {figure(m)}" + (f", {m.ratio:.2f} times" if m.ratio is not None else ", not comparable"), (m.id,))
        for m in evidence.measurements
    ]


def figure(measurement: Measurement) -> str:
    return f"{measurement.old.value:.4g} to {measurement.new.value:.4g} {measurement.unit}"
