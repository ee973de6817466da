"""An artifact that isn't published yet, where the steerer looks for artifacts: tuned with what will serve it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from server.api.doses import Doses
from server.api.errors import ApiError
from server.api.leases import Leases
from server.api.prepared import Prepared
from server.api.served import ServedModel
from server.api.steering import Steerer
from server.tuning.task import Tune
from steering_store import ArtifactVersion, Reference, Store
from steering_store.manifest import digest_of, parse_manifest
from steering_store.tensors import Tensor


class Candidate:
    """An artifact in memory: its manifest, and its tensors by name."""

    def __init__(self, name: str, manifest: Mapping[str, object], tensors: Mapping[str, Tensor], store: Store) -> None:
        parsed = parse_manifest(manifest)
        content = hashlib.sha256()
        for tensor_name in sorted(tensors):
            content.update(tensor_name.encode() + np.ascontiguousarray(tensors[tensor_name]).tobytes())
        created_at = parsed.provenance.created_at
        assert created_at is not None
        self._version = ArtifactVersion(name, 0, digest_of(content.digest()), parsed, created_at)
        self._tensors, self._store = tensors, store

    def known(self, ref: str | Reference) -> ArtifactVersion:
        """The candidate by its name, anything else from the store."""
        return self._version if str(ref) == self._version.name else self._store.resolve(ref)

    def load_tensors(
        self, version: ArtifactVersion, wanted: Mapping[str, Sequence[int] | None] | None = None
    ) -> dict[str, Tensor]:
        """As `Store.load_tensors`."""
        if version is not self._version:
            return self._store.load_tensors(version, wanted)
        if wanted is None:
            return dict(self._tensors)
        return {
            name: self._tensors[name] if rows is None else self._tensors[name][list(rows)]
            for name, rows in wanted.items()
        }

    def prepare(
        self,
        tune: Tune,
        strength: float,
        layers: Sequence[int],
        model: ServedModel,
        max_edits: int,
        max_strength: float,
    ) -> Prepared:
        """The program of one point. ApiError naming the field of `tune`."""
        store = cast(Store, self)
        steerer = Steerer(store, model, max_edits, max_strength, Doses(), Leases(store))
        intervention: dict[str, Any] = {"artifact": self._version.name, "strength": strength, "layers": list(layers)}
        field = {"layers": "tune.layers", "strength": "tune.strengths"}
        try:
            return steerer.prepare({"interventions": [intervention | tune.intervention], "mode": tune.mode})
        except ApiError as error:
            name = (error.param or "").removeprefix("steering.interventions.0.")
            where = field.get(name.partition(".")[0], f"tune.intervention.{name}")
            raise ApiError(error.status, f"{where}: {error.message}", where) from error
