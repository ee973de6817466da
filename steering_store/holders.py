"""What keeps a version from being deleted: an alias that points at it, a preset that pins it, a lease on its digest."""

from __future__ import annotations

import sqlite3
import time

from steering_store import presets
from steering_store.records import version_of


def holders(db: sqlite3.Connection, name: str, version: int, digest: str) -> list[str]:
    """Whoever holds a version, in words; `db` is a connection with the leases attached."""
    query = "SELECT alias FROM aliases WHERE name = ? AND version = ? ORDER BY alias"
    aliases = [f"alias {row['alias']}" for row in db.execute(query, (name, version))]
    pinned = f"{name}@{digest}"
    rows = db.execute("SELECT * FROM versions WHERE kind = 'preset' ORDER BY name, version")
    candidates = (version_of(row) for row in rows if pinned in row["manifest"])
    presets_ = [f"preset {preset.ref}" for preset in candidates if pinned in presets.references(preset.manifest)]
    query = "SELECT holder FROM leases.leases WHERE digest = ? AND expires_at > ? ORDER BY holder"
    leases = [f"lease of {row['holder']}" for row in db.execute(query, (digest, time.time()))]
    return aliases + presets_ + leases
