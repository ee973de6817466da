"""What can go wrong in the store.

StoreError
├── InvalidName, InvalidReference, InvalidManifest, InvalidTensor   the caller's input
├── UnsupportedFile, TooLarge                                       a file that is refused
├── ArtifactNotFound                                                nothing has that name or reference
└── CorruptArtifact, StoreBusy, StoreFull                           the disk's trouble
"""

from __future__ import annotations


class StoreError(Exception):
    """Something that the store refuses or can't do; `param` is the field to correct, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidName(StoreError):
    """A name of an artifact or of a file that the store's rules refuse."""


class InvalidReference(StoreError):
    """Text that isn't `name`, `name@INTEGER` or `name@sha256:HEX64`."""


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


class CorruptArtifact(StoreError):
    """What lies on the disk isn't what was published; `param` is the file."""


class StoreBusy(StoreError):
    """Another process held the database for too long."""


class StoreFull(StoreError):
    """The disk has no room left."""
