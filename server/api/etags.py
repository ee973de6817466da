"""Entity tags: what a client has seen, compared with what there is (RFC 9110, section 13)."""

from __future__ import annotations

import re

from fastapi import Request

from server.api.errors import ApiError

_TAG = re.compile(r'\s*(?:W/)?"([^"]*)"\s*')
ANY = "*"


def quoted(etag: str) -> str:
    return f'"{etag}"'


def is_known(request: Request, etag: str) -> bool:
    """Whether `If-None-Match` says that the client has this already, so that 304 answers it."""
    header = request.headers.get("if-none-match")
    return header is not None and (header.strip() == ANY or etag in tags(header, "If-None-Match"))


def tags(header: str, name: str) -> list[str]:
    """The tags of a list, without their quotes. Raises ApiError 400."""
    matches = [_TAG.fullmatch(part) for part in header.split(",")]
    if not all(matches):
        raise ApiError(400, f'{name}: write tags in quotes, as in "3-17", or *', name)
    return [match[1] for match in matches if match]
