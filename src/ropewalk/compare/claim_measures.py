"""Claims of cards held against what a comparison measured: a card's "3x faster" is tested by the run of the candidate it is linked to.

Only what was measured here is tested: memory, speed and cost beside the baseline, of claims that name no condition of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from ropewalk.compare.candidates import StoredClaim, card_claims, measure_claim, visible
from ropewalk.compare.claims import Claim
from ropewalk.compare.evidence import Measured, Measurement, Metric
from ropewalk.compare.gather import Gathered, figures
from ropewalk.compare.tables import candidates
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

METRICS = {"memory": Metric.MEMORY, "speed": Metric.LATENCY, "cost": Metric.COST}
SENSES = {"memory": ("less",), "speed": ("faster",), "cost": ("cheaper", "less")}


async def measure_claims(store: Store, caller: Caller, found: Gathered) -> list[StoredClaim]:
    """Tests the claims of every card that is linked to a candidate of this comparison, as far as they can be."""
    if found.baseline is None:
        return []
    tested = []
    for side in found.sides.values():
        measured = figures(found.baseline, side)
        linked = select(candidates.c.id).where(visible(caller), candidates.c.linked_to == side.candidate.id)
        async with store.database.reading() as connection:
            cards = list((await connection.execute(linked)).scalars())
        for card in cards:
            for stored in await card_claims(store, caller, card):
                if (interval := reading(stored.claim, measured)) is not None:
                    measurement, low, high = interval
                    tested.append(await measure_claim(store, caller, stored.id, measurement.id, low, high))
    return tested


def reading(claim: Claim, measured: Sequence[Measurement]) -> tuple[Measurement, float, float] | None:
    """What was measured of a claim, in its unit, with the interval's ends; None where nothing here tests it."""
    if claim.conditions or claim.unit not in ("x", "%") or claim.sense not in SENSES.get(claim.metric, ()):
        return None
    one = next((m for m in measured if m.metric is METRICS[claim.metric] and m.comparable), None)
    if one is None:
        return None
    (old_low, old_high), (new_low, new_high) = _ends(one.old), _ends(one.new)
    if not (old_low > 0 and new_low > 0):
        return None
    low, high = old_low / new_high, old_high / new_low  # how many times less it takes
    if claim.unit == "x":
        return one, low, high
    if claim.sense == "faster":  # 50 % faster: in the time of two, three
        return one, 100 * (low - 1), 100 * (high - 1)
    return one, 100 * (1 - 1 / low), 100 * (1 - 1 / high)


def _ends(measured: Measured) -> tuple[float, float]:
    low = measured.value if measured.low is None else measured.low
    return low, measured.value if measured.high is None else measured.high
