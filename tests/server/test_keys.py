from __future__ import annotations

import hmac
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server import keys as module
from server.keys import FILE, SCOPES, InvalidKey, Key, KeyStore, Limits


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path)


def test_a_token_finds_its_key_and_no_other_does(keys: KeyStore) -> None:
    limits = Limits(10, 1000, 2)
    key, token = keys.create("mine", {"generate", "read"}, tenant="acme", limits=limits)
    other, second = keys.create("other", {"admin"})
    assert keys.find(token) == key and keys.find(second) == other
    assert (key.scopes, key.tenant, key.limits, key.problem()) == ({"generate", "read"}, "acme", limits, None)
    swapped = f"phk_{key.id}_{second.rpartition('_')[2]}" if "_" not in second[17:] else f"phk_{key.id}_{second[17:]}"
    for wrong in (
        token[:-1],
        token + "x",
        token.upper(),
        swapped,
        "",
        "phk_",
        f"phk_{'0' * 12}_{token[17:]}",
        "é",
        "\udc80",
    ):
        assert keys.find(wrong) is None


def test_keys_outlive_a_restart_and_a_change_is_seen_at_once_by_others(tmp_path: Path, keys: KeyStore) -> None:
    other = KeyStore(tmp_path)
    assert not other.configured
    key, token = keys.create("mine", {"read"})
    assert other.find(token) == key == KeyStore(tmp_path).find(token)
    code = (
        "import sys, pathlib; from server.keys import KeyStore; KeyStore(pathlib.Path(sys.argv[1])).revoke(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), key.id], check=True)
    for store in (keys, other):
        found = store.find(token)
        assert found is not None and found.problem() == "was revoked"


def test_several_keys_are_good_at_once_so_that_one_can_take_the_place_of_another(keys: KeyStore) -> None:
    old, old_token = keys.create("service", {"generate"})
    new, new_token = keys.create("service", {"generate"})
    keys.revoke(old.id)
    first = keys.revoke(old.id).revoked_at
    assert keys.find(new_token) == new
    assert keys.find(old_token).problem() == "was revoked"  # type: ignore[union-attr]
    assert keys.revoke(old.id).revoked_at == first, "the time of the first revocation stays"


def test_key_expires(keys: KeyStore) -> None:
    key, token = keys.create("short", {"read"}, expires_at=time.time() + 100)
    found = keys.find(token)
    assert found is not None and found.problem() is None
    assert found.problem(now=key.expires_at) == "has expired"


def test_revoking_the_last_key_does_not_open_the_server(keys: KeyStore) -> None:
    assert not keys.configured
    key, _ = keys.create("only", {"read"})
    keys.revoke(key.id)
    assert keys.configured


def test_nothing_on_disk_lets_anybody_in(tmp_path: Path, keys: KeyStore) -> None:
    _, token = keys.create("mine", {"read"})
    secret = token[17:]
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in content
    (salt, hashed), *_ = sqlite3.connect(tmp_path / FILE).execute("SELECT salt, hash FROM keys").fetchall()
    assert len(salt) == 16 and len(hashed) == 32
    assert (tmp_path / FILE).stat().st_mode & 0o007 == 0
    for guess in (hashed.hex(), salt.hex(), f"phk_{'0' * 12}_{hashed.hex()[:43]}"):
        assert keys.find(guess) is None


def test_two_keys_are_salted_apart(tmp_path: Path, keys: KeyStore) -> None:
    keys.create("one", {"read"})
    keys.create("two", {"read"})
    rows = sqlite3.connect(tmp_path / FILE).execute("SELECT DISTINCT salt FROM keys").fetchall()
    assert len(rows) == 2


def test_every_token_is_compared_once_with_each_candidate_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KeyStore(tmp_path, admin_api_key="static")
    keys.accept(["a", "b"], with_admin=False)
    key, token = keys.create("mine", {"read"})
    compared: list[tuple[bytes, bytes]] = []

    def watched(first: bytes, second: bytes) -> bool:
        compared.append((first, second))
        return compare(first, second)

    compare = hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", watched)
    # Good, wrong secret, unknown id, no token of ours, static, and unknown static: the same work.
    for sent in (token, token[:-1] + "!", f"phk_{'0' * 12}_{token[17:]}", "x", "static", "a", ""):
        compared.clear()
        keys.find(sent)
        assert len(compared) == 4
        assert all(len(each) == 32 for pair in compared for each in pair)


def test_static_keys_work_beside_the_others(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path, admin_api_key="boss")
    keys.accept(["user", "üser"], with_admin=False)
    assert keys.configured
    assert keys.find("boss").scopes == SCOPES  # type: ignore[union-attr]
    for token in ("user", "üser"):
        assert keys.find(token).scopes == SCOPES - {"admin"}  # type: ignore[union-attr]
    assert keys.list() == []


@pytest.mark.parametrize("tenant", ["", "A", "a--b", "-a", "a-", "a_b", "a.b", "x" * 32, "a\n", "ä"])
def test_tenant_whose_names_could_be_mistaken_is_refused(keys: KeyStore, tenant: str) -> None:
    with pytest.raises(InvalidKey, match="not allowed"):
        keys.create("x", {"read"}, tenant=tenant)
    assert keys.list() == []


def test_scopes_are_checked(keys: KeyStore) -> None:
    with pytest.raises(InvalidKey, match="'root'"):
        keys.create("x", {"root"})  # type: ignore[arg-type]
    with pytest.raises(InvalidKey, match="at least one"):
        keys.create("x", set())
    with pytest.raises(InvalidKey, match="no key 'nobody'"):
        keys.revoke("nobody")


def test_a_damaged_file_lets_nobody_in(tmp_path: Path, keys: KeyStore) -> None:
    _, token = keys.create("mine", {"read"})
    other = KeyStore(tmp_path)
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("DROP TABLE keys")
    with pytest.raises(sqlite3.Error):
        other.find(token)


def test_a_key_tells_no_secret() -> None:
    assert "hash" not in repr(Key("1", "n", SCOPES)) and "salt" not in repr(Key("1", "n", SCOPES))
