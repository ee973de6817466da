"""What the served model is and can do, and the refusal of what doesn't fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.api.errors import ApiError
from server.models import ModelIdentity
from steering_store import ArtifactVersion


@dataclass(frozen=True)
class ServedModel:
    """`points` is what the engine says of each point: `width`, `opcodes`, and the `reason` where some are missing."""

    identity: ModelIdentity
    layers: int
    hidden_size: int
    points: Mapping[str, Mapping[str, Any]]
    model_match: Literal["weights", "shape"]

    def check_model(self, version: ArtifactVersion, param: str) -> None:
        """ApiError 409 for an artifact of another model."""
        made_for, served = version.manifest.model, self.identity
        facts = {
            "architecture": (made_for.architecture, served["architecture"]),
            "hidden size": (made_for.hidden_size, self.hidden_size),
            "number of layers": (made_for.num_layers, self.layers),
        }
        if self.model_match == "weights":
            facts["weights"] = (made_for.weights_digest, served["weights_digest"])
        for fact, (theirs, ours) in facts.items():
            if theirs is not None and ours is not None and theirs != ours:
                raise ApiError(
                    409,
                    f"{version.ref} was made for another model: its {fact} is {theirs}, the served model's is {ours}; "
                    "fit it on the served model, or serve its own",
                    param,
                )

    def check_point(self, version: ArtifactVersion, opcodes: Sequence[str], param: str) -> None:
        """ApiError 400 where the opcodes can't act at the artifact's point, 409 where its width is another."""
        point = version.manifest.point
        known = self.points.get(point, {"opcodes": (), "reason": "it isn't installed: name it in POLYHELM_POINTS"})
        if missing := [opcode for opcode in dict.fromkeys(opcodes) if opcode not in known["opcodes"]]:
            raise ApiError(
                400,
                f"{version.ref} acts at {point}, where this server can't do {', '.join(missing)}: {known['reason']}",
                param,
            )
        if known["width"] != version.manifest.width:
            raise ApiError(
                409,
                f"{version.ref} was made for another model: {point} is {version.manifest.width} wide there, and "
                f"{known['width']} here",
                param,
            )
