"""What can go wrong in the store.

StoreError
├── InvalidName, InvalidReference, InvalidManifest, InvalidTensor   the caller's input
├── UnsupportedFile, TooLarge                                       a file that is refused
├── ArtifactNotFound                                                nothing has that name or reference
├── PreconditionFailed, InUse, Yanked                               the state of the store is against it
├── CorruptArtifact, StoreBusy, StoreFull, StoreReadOnly            the disk's trouble
└── RemoteUnavailable                                               the network's trouble
"""

from __future__ import annotations

READ_ONLY = "the store's folder is read-only for this process; let it be written, and send the request again"


class StoreError(Exception):
    """Something that the store refuses or can't do; `param` is the field to correct, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidName(StoreError):
    """A name of an artifact or of a file that the store's rules refuse."""


class InvalidReference(StoreError):
    """Text that isn't `name`, `name@INTEGER`, `name@ALIAS` or `name@sha256:HEX64`."""


class InvalidManifest(StoreError):
    """A manifest that doesn't describe an artifact; `param` is the dotted path of the field."""


class InvalidTensor(StoreError):
    """A safetensors file that is malformed, or holds something else than its manifest says."""


class UnsupportedFile(StoreError):
    """A file of a format that the store never opens, such as a pickle."""


class TooLarge(StoreError):
    """More files or bytes than the store was opened for."""


class ArtifactNotFound(StoreError):
    """No artifact, version or file answers to the reference."""


class PreconditionFailed(StoreError):
    """An alias isn't in the state that the caller expected; `current` is its etag now, None where there is no alias."""

    def __init__(self, message: str, param: str | None = None, *, current: str | None) -> None:
        super().__init__(message, param)
        self.current = current


class InUse(StoreError):
    """A version can't be deleted: `holders` are the aliases, presets and leases that need it."""

    def __init__(self, message: str, param: str | None = None, *, holders: list[str]) -> None:
        super().__init__(message, param)
        self.holders = holders


class Yanked(StoreError):
    """An alias can't be moved to a version that was yanked."""


class CorruptArtifact(StoreError):
    """What lies on the disk isn't what was published; `param` is the file."""


class StoreBusy(StoreError):
    """Another process held the database for too long."""


class StoreFull(StoreError):
    """The disk has no room left."""


class StoreReadOnly(StoreError):
    """The disk, or what it lets this process do, forbids to write. What is in the store can still be read."""


class RemoteUnavailable(StoreError):
    """The place that a URL names can't be reached, read or written."""
