"""How much each key may take: requests and tokens a minute, in token buckets, and requests at a time.

Per API process and in memory. Tokens are known only afterwards: a request is let in while there are any, and what it
took more is paid back by those that follow.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from server.api.errors import ApiError
from server.keys import Key

Clock = Callable[[], float]
MINUTE = 60.0


@dataclass
class Bucket:
    """Holds what may be taken now, up to a minute's worth, and fills steadily."""

    per_minute: int
    clock: Clock = time.monotonic
    level: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self._at = float(self.per_minute), self.clock()

    def refill(self) -> float:
        """What may be taken now; below zero where more was taken than there was."""
        now = self.clock()
        self.level = min(self.per_minute, self.level + (now - self._at) * self.per_minute / MINUTE)
        self._at = now
        return self.level

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.refill()) * MINUTE / self.per_minute)


@dataclass
class _Taken:
    requests: Bucket | None
    tokens: Bucket | None


class RateLimits:
    """The state of all keys' limits in this process. For its event loop."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._taken: dict[str, _Taken] = {}
        self._running: Counter[str] = Counter()

    def admit(self, key: Key) -> dict[str, str]:
        """Count a request in, which `end` has to count out, and return its headers. Raises ApiError 429."""
        limits, taken = key.limits, self._of(key)
        if limits.max_concurrent is not None and self._running[key.id] >= limits.max_concurrent:
            raise self._refused(taken, f"{limits.max_concurrent} requests at a time", "concurrent", 1)
        if taken.requests is not None and (wait := taken.requests.seconds_until(1)):
            raise self._refused(taken, f"{taken.requests.per_minute} requests a minute", "requests", wait)
        if taken.tokens is not None and (wait := taken.tokens.seconds_until(1)):
            raise self._refused(taken, f"{taken.tokens.per_minute} tokens a minute", "tokens", wait)
        if taken.requests is not None:
            taken.requests.level -= 1
        self._running[key.id] += 1
        return _headers(taken)

    def end(self, key: Key, tokens: int) -> None:
        """Count a request out, and what it took."""
        self._running[key.id] -= 1
        if not self._running[key.id]:
            del self._running[key.id]
        bucket = self._of(key).tokens
        if bucket is not None:
            bucket.refill()
            bucket.level -= tokens

    def _of(self, key: Key) -> _Taken:
        if key.id not in self._taken:
            rates = (key.limits.requests_per_minute, key.limits.tokens_per_minute)
            self._taken[key.id] = _Taken(*(None if rate is None else Bucket(rate, self._clock) for rate in rates))
        return self._taken[key.id]

    def _refused(self, taken: _Taken, limit: str, what: str, wait: float) -> ApiError:
        seconds = max(1, math.ceil(wait))
        headers = _headers(taken) | {"Retry-After": str(seconds)}
        message = f"this key may have {limit}; retry in {seconds} s"
        return ApiError(429, message, headers=headers, reason=f"rate_limit_{what}")


def _headers(taken: _Taken) -> dict[str, str]:
    headers = {}
    for name, bucket in (("requests", taken.requests), ("tokens", taken.tokens)):
        if bucket is not None:
            left = max(0, math.floor(bucket.refill()))
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{name}"] = str(left)
            headers[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.per_minute):.3f}s"
    return headers
