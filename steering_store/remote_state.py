"""What happened in a remote store, and what its artifacts are like after that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, PositiveInt

from steering_store.audit import Stated
from steering_store.errors import ArtifactNotFound, CorruptArtifact
from steering_store.manifest import Digest
from steering_store.reference import Reference

Action = Literal["publish", "delete", "yank", "unyank", "set_alias", "delete_alias"]


class Event(BaseModel):
    """One thing that happened. `nonce` tells a writer whether the event that it finds is its own.

    publish has `version` and `digest`; delete, yank and unyank have `version`; set_alias has `alias` and `version`;
    delete_alias has `alias`. `by`, `note` and `reason` say who did it, and why.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Action
    name: str
    version: PositiveInt | None = None
    digest: Digest | None = None
    alias: str | None = None
    by: str | None = None
    note: str | None = None
    reason: str | None = None
    at: AwareDatetime
    nonce: str

    @property
    def stated(self) -> Stated:
        return {"by": self.by, "note": self.note, "reason": self.reason}


@dataclass(frozen=True)
class RemoteVersion:
    """One published version, as the events tell of it."""

    name: str
    version: int
    digest: str
    yanked: bool = False


@dataclass
class RemoteArtifact:
    """All versions of a name, and its aliases. `last_version` only grows."""

    last_version: int = 0
    versions: dict[int, RemoteVersion] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)

    def number(self, reference: Reference) -> int | None:
        """The version that a reference means, by the rules of a local store."""
        if reference.digest is not None:
            return next((each.version for each in self.versions.values() if each.digest == reference.digest), None)
        if reference.alias is not None:
            return self.aliases.get(reference.alias)
        if reference.version is not None:
            return reference.version
        return max((each.version for each in self.versions.values() if not each.yanked), default=None)


@dataclass
class RemoteState:
    """The store after the first `events` events."""

    events: int = 0
    artifacts: dict[str, RemoteArtifact] = field(default_factory=dict)

    def resolve(self, reference: Reference) -> RemoteVersion:
        """Find a version. Raises ArtifactNotFound."""
        artifact = self.artifacts.get(reference.name, RemoteArtifact())
        version = artifact.versions.get(artifact.number(reference) or 0)
        if version is None:
            raise ArtifactNotFound(f"the remote store has no artifact {str(reference)!r}", "ref")
        return version

    def apply(self, events: Iterable[Event]) -> None:
        """Let the events happen that come next. Raises CorruptArtifact for one that can't have happened."""
        for event in events:
            try:
                self._apply(event, self.artifacts.setdefault(event.name, RemoteArtifact()))
            except (KeyError, ValueError) as exc:
                raise CorruptArtifact(
                    f"event {self.events + 1}, {event.action} {event.name}, can't have happened ({exc!r}); "
                    "restore the remote store"
                ) from exc
            self.events += 1

    def _apply(self, event: Event, artifact: RemoteArtifact) -> None:
        number, alias = event.version or 0, event.alias or ""
        match event.action:
            case "publish":
                if number != artifact.last_version + 1 or event.digest is None:
                    raise ValueError(f"version {number} after {artifact.last_version}")
                artifact.versions[number] = RemoteVersion(event.name, number, event.digest)
                artifact.last_version = number
            case "delete":
                del artifact.versions[number]
            case "yank" | "unyank":
                artifact.versions[number] = replace(artifact.versions[number], yanked=event.action == "yank")
            case "set_alias":
                artifact.aliases[alias] = artifact.versions[number].version
            case "delete_alias":
                del artifact.aliases[alias]
