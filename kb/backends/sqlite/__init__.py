"""Facts in a folder: SQLite is the truth, FAISS an index in memory that can always be made again from it."""

from __future__ import annotations

from kb.backends.sqlite.catalog import SqliteCatalog

__all__ = ["SqliteCatalog"]
