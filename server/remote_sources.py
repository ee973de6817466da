"""Which stores and repositories elsewhere this installation may use: POLYHELM_ALLOWED_REMOTES."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from steering_store.errors import StoreError


def check_allowed(url: str | None, allowed: Sequence[str] | None) -> None:
    """Raise StoreError where a URL lies in none of `allowed`, compared part by part. None allows everything.

    What could be read as another place than it looks, such as `..`, escapes or a user name, is refused.
    """
    if url is None or allowed is None:
        return
    if not any(_within(url, prefix) for prefix in allowed):
        raise StoreError(
            f"{url!r} is none of the places that POLYHELM_ALLOWED_REMOTES names: {', '.join(allowed) or 'none'}", "url"
        )


def _within(url: str, prefix: str) -> bool:
    parts, wanted = urlsplit(url), urlsplit(prefix)
    if unquote(url) != url or "\\" in url or ".." in url or "::" in url or "@" in parts.netloc:
        return False
    place = (parts.scheme.lower(), parts.netloc.lower())
    if not parts.scheme or place != (wanted.scheme.lower(), wanted.netloc.lower()):
        return False
    path, start = parts.path.strip("/").split("/"), wanted.path.strip("/").split("/")
    return start == [""] or path[: len(start)] == start
