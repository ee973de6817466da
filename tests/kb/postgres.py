"""PostgreSQL with pgvector, from a wheel."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def running() -> Iterator[str]:
    """The URL of a server."""
    pgserver = pytest.importorskip("pgserver", reason="pgserver has PostgreSQL in its wheel")
    # PostgreSQL doesn't run as root, and pytest's own folders are for their owner only.
    with tempfile.TemporaryDirectory(prefix="polyhelm-postgres-") as folder:
        Path(folder).chmod(0o755)
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()
