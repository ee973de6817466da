"""How an artifact is named: `name[@ref]`, where ref is an INTEGER, an ALIAS or `sha256:HEX64`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from steering_store.errors import InvalidName, InvalidReference, UnsupportedFile

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
ALIAS_PATTERN = r"[a-z][a-z0-9._-]{0,31}"
DIGEST_PATTERN = r"sha256:[0-9a-f]{64}"
FILE_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,126}"

LATEST = "latest"
"""What the HTTP API calls the highest version; so no alias may have that name."""

_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_STORED = (".safetensors", ".jsonl")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Reference:
    """One artifact, by version, by digest, by alias, or (none given) its highest version that wasn't yanked."""

    name: str
    version: int | None = None
    digest: str | None = None
    alias: str | None = None

    def __str__(self) -> str:
        ref = self.digest or self.alias or self.version
        return self.name if ref is None else f"{self.name}@{ref}"


def check_name(name: str) -> str:
    """Return the artifact's name, or raise InvalidName."""
    if not re.fullmatch(NAME_PATTERN, name) or ".." in name:
        raise InvalidName(
            f"name {name!r} is not allowed: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit and without '..'",
            param="name",
        )
    return name


def check_alias(alias: str) -> str:
    """Return the alias, or raise InvalidName."""
    if not re.fullmatch(ALIAS_PATTERN, alias) or ".." in alias or alias == LATEST:
        raise InvalidName(
            f"alias {alias!r} is not allowed: use 1 to 32 of a-z, 0-9, '.', '_' and '-', beginning with a letter and "
            f"without '..'; {LATEST!r} is taken, for the highest version",
            param="alias",
        )
    return alias


def parse_reference(text: str) -> Reference:
    """Read `name`, `name@3`, `name@production` or `name@sha256:HEX64`. Raises InvalidName or InvalidReference."""
    name, at, ref = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if _VERSION.fullmatch(ref):
        return Reference(name, version=int(ref))
    if re.fullmatch(DIGEST_PATTERN, ref):
        return Reference(name, digest=ref)
    try:
        return Reference(name, alias=check_alias(ref))
    except InvalidName:
        raise InvalidReference(
            f"reference {text!r}: after '@' write a version, as in {name}@3, an alias, as in {name}@production, or "
            "sha256: and 64 lower-case hex digits; leave '@' out for the highest version",
            param="ref",
        ) from None


def check_file_path(path: str) -> str:
    """Return the path of a file inside an artifact: one plain name, of tensors (`.safetensors`) or labels (`.jsonl`).

    Raises InvalidName for a path that could leave the artifact, UnsupportedFile for another format.
    """
    if not re.fullmatch(FILE_PATTERN, path) or ".." in path:
        raise InvalidName(
            f"file {path!r} is not allowed: use a plain name of letters, digits, '.', '_' and '-', without folders",
            param="files",
        )
    if path.endswith(_STORED):
        return path
    if path.lower().endswith(_PICKLES):
        raise pickle_refused(path)
    raise UnsupportedFile(f"file {path!r}: only .safetensors and .jsonl files are stored; convert it", param="files")


def pickle_refused(path: str) -> UnsupportedFile:
    """The refusal of a pickle, which could run code when loaded."""
    return UnsupportedFile(
        f"file {path!r} is a pickle, which could run code when opened and is never loaded; convert it offline with "
        "`polyhelm artifact convert FILE FOLDER`, then publish or import the .safetensors file",
        param="files",
    )
