"""API keys: who may call, what for, for which tenant, and how much. In `<data-dir>/keys.sqlite`, hashed.

A token is `phk_ID_SECRET`, with 256 random bits in its secret. The file holds the SHA-256 of salt and token: a slow
hash would protect guessable passwords, and there is nothing to guess here. Running servers see a change at once.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Scope = Literal["generate", "read", "capture", "inline", "admin"]
"""`generate` text; `read` artifacts, fits and collections; `capture` activations; send tensors `inline` in a request;
`admin` changes artifacts, fits and collections.
"""
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))

FILE = "keys.sqlite"
_TOKEN = re.compile(r"phk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_TENANT = re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{0,30}(?<!-)")
_BUSY_SECONDS = 10.0
_TABLE = """
    CREATE TABLE IF NOT EXISTS keys (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        salt BLOB NOT NULL,
        hash BLOB NOT NULL,
        scopes TEXT NOT NULL,
        tenant TEXT,
        requests_per_minute INTEGER,
        tokens_per_minute INTEGER,
        max_concurrent INTEGER,
        created_at REAL NOT NULL,
        expires_at REAL,
        revoked_at REAL
    ) STRICT
"""


class InvalidKey(ValueError):
    """A key can't be made, found or read; the message says why and what to do."""


@dataclass(frozen=True)
class Limits:
    """What one key may take of one API process. None is no limit. Tokens are those of prompts and answers."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


@dataclass(frozen=True)
class Key:
    """A key without its secret. Times are in seconds since the epoch."""

    id: str
    name: str
    scopes: frozenset[Scope]
    tenant: str | None = None
    limits: Limits = Limits()
    created_at: float = 0.0
    expires_at: float | None = None
    revoked_at: float | None = None

    def problem(self, now: float | None = None) -> str | None:
        """Why the key is good for nothing, if so."""
        if self.revoked_at is not None:
            return "was revoked"
        expired = self.expires_at is not None and self.expires_at <= (time.time() if now is None else now)
        return "has expired" if expired else None


@dataclass(frozen=True)
class _Hashed:
    salt: bytes
    hash: bytes

    @classmethod
    def of(cls, token: str) -> _Hashed:
        salt = secrets.token_bytes(16)
        return cls(salt, _digest(salt, token))

    def matches(self, token: str) -> bool:
        """In constant time."""
        return hmac.compare_digest(self.hash, _digest(self.salt, token))


_NOBODY = _Hashed(b"", bytes(32))
"""Compared where no key has the token's id, so that an unknown id takes as long as a wrong secret."""


class KeyStore:
    """The keys of a data directory, and static ones of the settings."""

    def __init__(self, data_dir: Path, admin_api_key: str | None = None) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        path = data_dir / FILE
        # Not for the world to read, though it holds no secret.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o660))
        self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(_TABLE)
        admin = Key("admin-api-key", "POLYHELM_ADMIN_API_KEY", SCOPES)
        self._static = [] if admin_api_key is None else [(admin, _Hashed.of(admin_api_key))]
        self._seen: int | None = None
        self._keys: dict[str, tuple[Key, _Hashed]] = {}

    def accept(self, tokens: Sequence[str], *, with_admin: bool) -> None:
        """Accept these as well, with every scope but perhaps `admin`. For vLLM's `--api-key`."""
        scopes = SCOPES if with_admin else SCOPES - {"admin"}
        self._static += [
            (Key(f"api-key-{number}", "--api-key", scopes), _Hashed.of(token)) for number, token in enumerate(tokens, 1)
        ]

    def close(self) -> None:
        self._db.close()

    @property
    def configured(self) -> bool:
        """Whether there ever was a key: revoking the last one doesn't open the server."""
        self._refresh()
        return bool(self._static or self._keys)

    def find(self, token: str) -> Key | None:
        """The key of a token, also one that was revoked. sqlite3.Error where the file can't be read."""
        self._refresh()
        match = _TOKEN.fullmatch(token)
        key, stored = self._keys.get(match[1], (None, _NOBODY)) if match else (None, _NOBODY)
        found = key if stored.matches(token) else None
        for key, stored in self._static:
            if stored.matches(token):  # all of them, so that the time tells nothing
                found = key
        return found

    def list(self) -> list[Key]:
        """The keys of the data directory, oldest first."""
        self._refresh()
        return [key for key, _ in self._keys.values()]

    def create(
        self,
        name: str,
        scopes: Collection[Scope],
        *,
        tenant: str | None = None,
        limits: Limits = Limits(),
        expires_at: float | None = None,
    ) -> tuple[Key, str]:
        """A new key and its token, which is told only now. Raises InvalidKey."""
        if unknown := sorted(set(scopes) - SCOPES):
            raise InvalidKey(f"no scope {unknown[0]!r}: use {', '.join(sorted(SCOPES))}")
        if not scopes:
            raise InvalidKey("a key without a scope is good for nothing: name at least one")
        if tenant is not None:
            check_tenant(tenant)
        key_id = secrets.token_hex(6)
        token = f"phk_{key_id}_{secrets.token_urlsafe(32)}"
        key = Key(key_id, name, frozenset(scopes), tenant, limits, time.time(), expires_at)
        stored = _Hashed.of(token)
        identity = (key.id, name, stored.salt, stored.hash, " ".join(sorted(scopes)), tenant)
        rates = (limits.requests_per_minute, limits.tokens_per_minute, limits.max_concurrent)
        self._db.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            (*identity, *rates, key.created_at, expires_at),
        )
        self._seen = None
        return key, token

    def revoke(self, key_id: str) -> Key:
        """For good, from now on. Raises InvalidKey where there is no such key."""
        self._db.execute("UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (time.time(), key_id))
        self._seen = None
        for key in self.list():
            if key.id == key_id:
                return key
        raise InvalidKey(f"no key {key_id!r}: `polyhelm key list` has their ids")

    def _refresh(self) -> None:
        """Read the file where another process has changed it since: a few microseconds where it hasn't."""
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        if version == self._seen:
            return
        with closing(self._db.execute("SELECT * FROM keys ORDER BY created_at, id")) as rows:
            self._keys = {row[0]: _key(row) for row in rows}
        self._seen = version


def check_tenant(tenant: str) -> str:
    """Return the tenant's name, or raise InvalidKey."""
    if not _TENANT.fullmatch(tenant):
        raise InvalidKey(
            f"tenant {tenant!r} is not allowed: use 1 to 31 of a-z, 0-9 and single '-', beginning and ending with a "
            "letter or digit"
        )
    return tenant


def _key(row: Sequence[object]) -> tuple[Key, _Hashed]:
    key_id, name, salt, hashed, scopes, tenant, requests, tokens, concurrent, created, expires, revoked = row
    limits = Limits(requests, tokens, concurrent)  # type: ignore[arg-type]
    granted = frozenset(scopes.split())  # type: ignore[attr-defined]
    key = Key(key_id, name, granted, tenant, limits, created, expires, revoked)  # type: ignore[arg-type]
    return key, _Hashed(salt, hashed)  # type: ignore[arg-type]


def _digest(salt: bytes, token: str) -> bytes:
    return hashlib.sha256(salt + token.encode("utf-8", "surrogateescape")).digest()
