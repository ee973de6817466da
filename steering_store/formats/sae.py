"""A sparse autoencoder in the store's form, and how others' fold into it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from steering_store.errors import InvalidManifest, InvalidTensor
from steering_store.manifest import Activation
from steering_store.tensors import Float32


@dataclass(frozen=True)
class Sae:
    """A sparse autoencoder in the store's form, for an activation x [width] as the model has it.

    Feature k is activation(x . encoder_k + encoder_bias_k); the reconstruction is features @ decoder + decoder_bias.
    `top_k` is set, and `activation` isn't, where only the k largest features count: see `calibrated`.
    """

    encoder: Float32
    """[features, width]."""
    encoder_bias: Float32
    """[features]."""
    decoder: Float32
    """[features, width]."""
    decoder_bias: Float32
    """[width]."""
    activation: Activation | None
    threshold: Float32 | None = None
    """[features], for jumprelu."""
    top_k: int | None = None

    def tensors(self) -> dict[str, Float32]:
        """By role."""
        tensors = {role: getattr(self, role) for role in ("encoder", "encoder_bias", "decoder", "decoder_bias")}
        return tensors if self.threshold is None else tensors | {"threshold": self.threshold}

    def check_shapes(self, file: str) -> None:
        """Raise InvalidTensor, naming the file, where the tensors don't fit together or a value isn't finite."""
        if self.encoder.ndim != 2 or 0 in self.encoder.shape:
            raise InvalidTensor(
                f"file {file!r}: the encoder's shape is {self.encoder.shape}, not features x width", file
            )
        features, width = self.encoder.shape
        vector = (features,)
        wanted = {"encoder": (features, width), "decoder": (features, width), "decoder_bias": (width,)}
        for role, tensor in self.tensors().items():
            if tensor.shape != wanted.get(role, vector):
                raise InvalidTensor(
                    f"file {file!r}: the {role}'s shape is {tensor.shape}, and must be {wanted.get(role, vector)} with "
                    f"this encoder",
                    file,
                )
            if not np.isfinite(tensor).all():
                raise InvalidTensor(f"file {file!r}: the {role} holds NaN or infinity; download it again", file)
        if self.top_k is not None and not 1 <= self.top_k <= features:
            raise InvalidTensor(f"file {file!r}: k is {self.top_k}, and there are {features} features", file)


def folded(sae: Sae, *, factor: float = 1.0, bias_is_subtracted: bool = False) -> Sae:
    """An SAE for activations x as the model has them, from one that was trained on factor * x.

    With `bias_is_subtracted` its encoder sees factor * x - decoder_bias. For z = factor * x:

        (z - decoder_bias) . encoder_k + encoder_bias_k
            = x . (factor * encoder_k) + (encoder_bias_k - encoder_k . decoder_bias)
        x^ = (features @ decoder + decoder_bias) / factor

    so that the values of the features, and the thresholds, stay as they were. Raises InvalidManifest for such a factor.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise InvalidManifest(f"norm_factor: {factor} must be above 0, and finite; correct it", "norm_factor")
    bias = sae.encoder_bias
    if bias_is_subtracted and sae.decoder_bias.any():
        bias = bias - sae.encoder @ sae.decoder_bias
    if factor == 1:
        return replace(sae, encoder_bias=bias)
    scale = np.float32(factor)
    return replace(
        sae,
        encoder=sae.encoder * scale,
        encoder_bias=bias,
        decoder=sae.decoder / scale,
        decoder_bias=sae.decoder_bias / scale,
    )
