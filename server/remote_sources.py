"""Which places elsewhere this installation may use: POLYHELM_ALLOWED_REMOTES."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from server.models import EMBEDDED
from server.settings import Settings
from steering_store.errors import StoreError


def check_places(settings: Settings) -> None:
    """Raise StoreError where a place elsewhere that the settings name isn't allowed."""
    for url in places(settings):
        check_allowed(url, settings.allowed_remotes)


def places(settings: Settings) -> Iterator[str]:
    """The URL of each place that a server with these settings may ask; a model of the hub is `hf://owner/name`."""
    if settings.store is not None:
        yield settings.store
    if settings.kb_url is not None and "://" in settings.kb_url:
        parts = urlsplit(settings.kb_url)
        # Who it logs in as isn't where it goes.
        yield parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
    kind, _, rest = settings.kb_encoder.partition(":")
    if kind in ("tei", "openai"):
        yield rest.partition("#")[0]
    models = [settings.model, *settings.expert_models, *([rest] if kind == "st" else [])]
    for model in models:
        if model not in EMBEDDED and not Path(model).is_dir():
            yield f"hf://{model}"


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
