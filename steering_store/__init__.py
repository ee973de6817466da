"""The versioned artifact store: immutable, content-addressed bundles of tensors and a manifest."""

from __future__ import annotations

from steering_store.aliases import ABSENT, Alias
from steering_store.garbage import Garbage
from steering_store.leases import Lease
from steering_store.manifest import Manifest
from steering_store.records import ArtifactVersion, AuditEntry, Page, Problem, Publication
from steering_store.reference import Reference, parse_reference
from steering_store.store import Store

__all__ = [
    "ABSENT",
    "Alias",
    "ArtifactVersion",
    "AuditEntry",
    "Garbage",
    "Lease",
    "Manifest",
    "Page",
    "Problem",
    "Publication",
    "Reference",
    "Store",
    "parse_reference",
]
