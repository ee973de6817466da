"""How a repeated measurement is published: its median, with the quartiles."""

from __future__ import annotations

import statistics


def spread(values: list[float]) -> dict[str, float]:
    first, median, third = statistics.quantiles(values, n=4) if len(values) > 1 else (values * 3)
    return {"median": median, "quartile_1": first, "quartile_3": third, "runs": len(values)}
