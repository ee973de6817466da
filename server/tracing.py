"""OpenTelemetry spans, where its packages are installed and vLLM's `--otlp-traces-endpoint` says where they go.

vLLM sets up the exporter; without it every span here is OpenTelemetry's own that records nothing. No span has a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:  # an extra of its own
    trace = None  # type: ignore[assignment]


@contextmanager
def span(name: str, **attributes: str | int) -> Iterator[Any]:
    """A span around a block, below the current one. Yields it, or None without OpenTelemetry."""
    if trace is None:
        yield None
        return
    with trace.get_tracer("polyhelm").start_as_current_span(name, attributes=attributes) as current:
        yield current


@contextmanager
def server_span(name: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """The span of a request, below the one that its `traceparent` names."""
    if trace is None:
        yield None
        return
    context = propagate.extract(headers)
    tracer = trace.get_tracer("polyhelm")
    with tracer.start_as_current_span(name, context=context, kind=trace.SpanKind.SERVER) as current:
        yield current


def begin(name: str, **attributes: str | int) -> Any:
    """A span below the current one, to be ended with `end`, also in another task. None without OpenTelemetry."""
    return None if trace is None else trace.get_tracer("polyhelm").start_span(name, attributes=attributes)


def end(started: Any, **attributes: str | int) -> None:
    if started is not None:
        started.set_attributes(attributes)
        started.end()


def headers() -> dict[str, str]:
    """`traceparent` and `tracestate` of the current span; empty where nothing records."""
    carrier: dict[str, str] = {}
    if trace is not None and trace.get_current_span().is_recording():
        propagate.inject(carrier)
    return carrier


def trace_id(headers: Mapping[str, str]) -> str | None:
    """That of a W3C `traceparent`, 32 hex digits."""
    parts = headers.get("traceparent", "").split("-")
    known = len(parts) >= 4 and len(parts[1]) == 32 and set(parts[1]) <= set("0123456789abcdef")
    return parts[1] if known and set(parts[1]) != {"0"} else None
