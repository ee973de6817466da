"""What can go wrong in the knowledge base.

KbError
├── InvalidFact, InvalidFilter, InvalidCollection, InvalidVector, FactTooLarge   the caller's input
├── CollectionNotFound, FactNotFound                                             nothing has that name or id
├── EncoderMismatch, CollectionDiffers, FactConflict, DuplicateId, KeyReused     what is there is against it
└── KbBusy, KbFull, KbUnavailable                                                the trouble of disk or network
"""

from __future__ import annotations


class KbError(Exception):
    """Something that the knowledge base refuses or can't do; `param` is the field to correct, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidFact(KbError):
    """A fact with a field that is missing, unknown or malformed."""


class InvalidFilter(KbError):
    """A filter, cursor or number of results that can't be used."""


class InvalidCollection(KbError):
    """A name or setting of a collection that the rules refuse."""


class InvalidVector(KbError):
    """An embedding of another dimension, with numbers that aren't finite, or of length zero."""


class FactTooLarge(KbError):
    """A fact with more bytes than are accepted."""


class CollectionNotFound(KbError):
    """No collection has that name."""


class FactNotFound(KbError):
    """No fact of the collection has that id."""


class EncoderMismatch(KbError):
    """The collection's vectors are another encoder's."""


class CollectionDiffers(KbError):
    """There is a collection of that name, with other settings."""


class FactConflict(KbError):
    """Another fact says something about the same subject and relation, and the collection refuses a second."""


class DuplicateId(KbError):
    """Two facts of one import have the same id."""


class KeyReused(KbError):
    """An Idempotency-Key that came with another body before."""


class KbBusy(KbError):
    """Another process held the database for too long."""


class KbFull(KbError):
    """The disk has no room left."""


class KbUnavailable(KbError):
    """The place that a URL names can't be reached, or refuses."""
