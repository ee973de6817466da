"""The versioned artifact store: immutable, content-addressed bundles of tensors and a manifest."""

from __future__ import annotations

from steering_store.manifest import Manifest
from steering_store.reference import Reference, parse_reference
from steering_store.store import ArtifactVersion, Publication, Store

__all__ = ["ArtifactVersion", "Manifest", "Publication", "Reference", "Store", "parse_reference"]
