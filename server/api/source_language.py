"""Which language a request is in, for presets that have interventions by source language: named, or identified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kb.languages import identified, primary
from server.api.errors import ApiError

FIELD = "steering.source_language"
LEAST_PROBABILITY = 0.5
Prompts = Callable[[], list[str]]


class Chosen(NamedTuple):
    """The tag as the preset spells it, and who said so."""

    tag: str
    by: Literal["request", "identified"]


@dataclass
class SourceLanguage:
    """Of one request: what it names, or else what its prompts (None: there are none to look at) are in."""

    named: str | None = None
    prompts: Prompts | None = None
    chosen: Chosen | None = None

    def of(self, supported: Sequence[str], preset: str) -> str:
        """The one of the tags that the request is in. ApiError 422 where it is none of them, or can't be told."""
        tag = self.named if self.named is not None else self._identified()
        found = matching(tag, supported)
        if len(found) != 1:
            listed = ", ".join(sorted(supported))
            told = "is" if self.named is not None else "seems to be"
            why = "is for" if not found else "has several for it:"
            raise ApiError(
                422,
                f"{FIELD}: the prompt {told} in {tag!r}, and {preset} {why} {listed}; name another, or leave it out",
                FIELD,
            )
        self.chosen = Chosen(found[0], "identified" if self.named is None else "request")
        return found[0]

    def check_used(self) -> None:
        """ApiError 422 where the request names a language and nothing depends on it."""
        if self.named is not None and self.chosen is None:
            raise ApiError(422, f"{FIELD}: no intervention depends on the language; leave it out", FIELD)

    def _identified(self) -> str:
        if self.prompts is None:
            raise ApiError(422, f"{FIELD}: the preset acts by language, which isn't identified here; name it", FIELD)
        found = [identified(text) for text in self.prompts()]
        tags = sorted({each.language for each in found})
        if len(tags) != 1:
            raise ApiError(422, f"{FIELD}: the prompts are in {', '.join(tags)}; send them one by one", FIELD)
        if (least := min(each.probability for each in found)) < LEAST_PROBABILITY:
            raise ApiError(
                422, f"{FIELD}: the prompt may be in {tags[0]!r}, but that isn't sure ({least:.2f}); name it", FIELD
            )
        return tags[0]


def matching(tag: str, supported: Sequence[str]) -> list[str]:
    """The supported tags that are the tag, or else one of the two without region or script: zh and zh-CN."""
    exact = [each for each in supported if each.casefold() == tag.casefold()]
    return exact or [
        each for each in supported if primary(each) == primary(tag) and ("-" not in each or "-" not in tag)
    ]


def prompts_of(request: Any, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What the language is told by: the texts of a completion request, or the last user message of a chat."""
    messages = getattr(request, "messages", None)
    if messages is not None:
        contents = [message["content"] for message in messages if message["role"] == "user" and message.get("content")]
        return [_text(contents[-1]) if contents else ""]
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or isinstance(prompt[0], int):
        return [decode(prompt or [])]
    return [each if isinstance(each, str) else decode(each) for each in prompt]


def _text(content: Any) -> str:
    """Of a message: a text, or a list of parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
