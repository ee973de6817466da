from __future__ import annotations

import pytest

from server.api.errors import ApiError
from server.api.rate_limits import RateLimits
from server.keys import SCOPES, Key, Limits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key(**limits: int) -> Key:
    return Key("k", "k", SCOPES, limits=Limits(**limits))


def refused(limits: RateLimits, key: Key) -> ApiError:
    with pytest.raises(ApiError) as error:
        limits.admit(key)
    assert error.value.status == 429
    return error.value


def test_a_minutes_worth_may_come_at_once_and_then_at_the_rate(clock: Clock) -> None:
    limits, limited = RateLimits(clock), key(requests_per_minute=6)
    for left in range(5, -1, -1):
        assert limits.admit(limited)["x-ratelimit-remaining-requests"] == str(left)
    assert refused(limits, limited).headers["Retry-After"] == "10"
    clock.now += 9.9
    assert refused(limits, limited).headers["Retry-After"] == "1"
    clock.now += 0.2
    limits.admit(limited)
    assert refused(limits, limited).reason == "rate_limit_requests"
    clock.now += 3600
    assert limits.admit(limited)["x-ratelimit-remaining-requests"] == "5", "no more than a minute's worth gathers"


def test_refused_requests_take_nothing(clock: Clock) -> None:
    limits, limited = RateLimits(clock), key(requests_per_minute=1, max_concurrent=1)
    limits.admit(limited)
    for _ in range(100):
        refused(limits, limited)
    limits.end(limited, 0)
    clock.now += 60
    limits.admit(limited)
    assert refused(limits, limited).reason == "rate_limit_concurrent"


def test_tokens_taken_beyond_the_limit_are_paid_back(clock: Clock) -> None:
    limits, limited = RateLimits(clock), key(tokens_per_minute=60)
    assert limits.admit(limited)["x-ratelimit-remaining-tokens"] == "60"
    limits.end(limited, 59)
    limits.admit(limited)
    limits.end(limited, 101)
    error = refused(limits, limited)
    assert (error.headers["Retry-After"], error.headers["x-ratelimit-remaining-tokens"]) == ("101", "0")
    assert error.headers["x-ratelimit-reset-tokens"] == "160.000s"
    clock.now += 101
    limits.admit(limited)


def test_keys_are_counted_apart_and_a_clock_that_stands_still_does_no_harm(clock: Clock) -> None:
    limits = RateLimits(clock)
    first = key(requests_per_minute=1)
    second = Key("other", "other", SCOPES, limits=first.limits)
    limits.admit(first)
    limits.admit(second)
    refused(limits, first)
    refused(limits, second)


def test_key_without_limits_has_no_headers(clock: Clock) -> None:
    limits, free = RateLimits(clock), key()
    assert [limits.admit(free) for _ in range(1000)] == [{}] * 1000
