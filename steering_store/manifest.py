"""The manifest of an artifact: what it holds, for which model, from where. Its digest is the artifact's identity.

The manifest doesn't hold the artifact's name. Its canonical form leaves out fields that are null, so that a field added
to this schema later, null by default, keeps the digests of manifests written before it. `provenance.created_at` is part
of the identity: fit the same vector twice and it is two artifacts; publish one manifest twice and it is one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticSerializationError, to_json

from steering_store.errors import InvalidManifest, TooLarge
from steering_store.manifest_migrations import migrated
from steering_store.manifest_rules import check_manifest
from steering_store.reference import DIGEST_PATTERN
from steering_store.tuning import Tuning

SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 20

Kind = Literal["steering_vector", "neuron_set", "linear_map", "sae", "preset"]
Point = Literal["resid_post", "mlp_out", "attn_out", "head_out", "mlp_act", "resid_pre"]
Role = Literal[
    "weights", "matrix", "left", "right", "bias", "encoder", "encoder_bias", "threshold", "decoder", "decoder_bias"
]
Activation = Literal["identity", "relu", "jumprelu"]
DType = Literal["F16", "BF16", "F32", "F64", "I32", "I64"]
Text = Annotated[str, StringConstraints(min_length=1)]
Digest = Annotated[str, StringConstraints(pattern=f"^{DIGEST_PATTERN}$")]
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
LANGUAGE_PATTERN = r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$"
Language = Annotated[str, StringConstraints(pattern=LANGUAGE_PATTERN)]
PositiveNorm = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSpec(_Part):
    """The model that an artifact was fitted on, and must be served on.

    `widths` gives the width of an activation at the points where it isn't `hidden_size`; needed where a site is there.
    `revision` is the commit of the repository `name` on a model hub.
    """

    architecture: Text
    hidden_size: PositiveInt
    num_layers: PositiveInt
    widths: dict[Literal["head_out", "mlp_act"], PositiveInt] | None = None
    weights_digest: Digest | None = None
    tokenizer_digest: Digest | None = None
    name: str | None = None
    revision: Text | None = None


class Site(_Part):
    """A place in the model, and a tensor to use there. `dtype` is spelled as safetensors does.

    `role` tells the tensors of one place apart. It is absent for the vector of a steering_vector and the indices of a
    neuron_set.
    """

    point: Point
    layer: NonNegativeInt
    role: Role | None = None
    file: Text
    tensor: Text
    shape: list[NonNegativeInt]
    dtype: DType


class FileEntry(_Part):
    """One file of the artifact: bytes and SHA-256 (hex)."""

    path: Text
    size: NonNegativeInt
    sha256: Hex64


class DataSource(_Part):
    """The data that an artifact was fitted from."""

    name: Text
    sha256: Hex64 | None = None
    rows: NonNegativeInt | None = None
    license: str | None = None


class Provenance(_Part):
    """How, from what and by whom an artifact was made. `parents` are digests of artifacts."""

    method: Text
    config: dict[str, JsonValue] = {}
    data: DataSource | None = None
    code_version: str | None = None
    seed: int | None = None
    created_at: AwareDatetime | None = None
    created_by: str | None = None
    parents: list[Digest] = []

    @field_validator("config")
    @classmethod
    def _is_json(cls, config: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(config, allow_nan=False)
        return config


class FeatureDefault(_Part):
    """What a request that lists no features does to one feature of an SAE, as a request spells it."""

    index: NonNegativeInt
    op: Literal["add", "scale", "clamp", "ablate"]
    value: FiniteFloat | None = None
    min: FiniteFloat | None = None
    max: FiniteFloat | None = None


class PresetItem(_Part):
    """One intervention of a preset. `options` are the other fields that an intervention of a request takes.

    One with a `source_language` is only for requests in that language. In a published preset `artifact` is
    `name@sha256:HEX64`, and so is `options.condition.artifact`.
    """

    artifact: Text
    source_language: Language | None = None
    strength: FiniteFloat | None = None
    options: dict[str, JsonValue] = {}

    @field_validator("options")
    @classmethod
    def _are_json(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if repeated := {"artifact", "strength"} & options.keys():
            raise ValueError(f"{sorted(repeated)} belong beside options, not into them")
        json.dumps(options, allow_nan=False)
        return options

    def as_intervention(self) -> dict[str, JsonValue]:
        """The item as a request spells it: artifact, strength where there is one, and the options."""
        strength: dict[str, JsonValue] = {} if self.strength is None else {"strength": self.strength}
        return {"artifact": self.artifact, **strength, **self.options}


class Manifest(_Part):
    """What an artifact is. Build one with `parse_manifest`, which also checks the fields against each other.

    All sites are at one point. For an activation x [width] there, tensors and their roles at each layer are, by kind:

    | kind | tensors |
    |---|---|
    | steering_vector | the vector [width] |
    | neuron_set | indices into x [n], int32 or int64, each once; optionally `weights` [n], 1 where left out |
    | linear_map | `matrix` [width, width], y = matrix x; or `left` [width, r], `right` [r, width], y = left right x; \
optionally `bias` [width], which is added to y |
    | sae | `encoder`, `decoder` [features, width], `encoder_bias` [features]; `threshold` [features] for jumprelu |
    | preset | none: it has `interventions`, and no sites |

    `activation` is the SAE's: feature k of x is activation(x . encoder_k + encoder_bias_k). `labels` is the file that
    names its features and shows where they fire; `default_features` are what a request that lists none does to them;
    `all` adds what all of them decode to, strength times, however many they are.
    `tuning` says how the defaults were chosen. `strength_range` is (lowest, highest) sensible strength; `h_norm` is the
    mean L2 norm of the activation at each layer, in the model's own units; `files` is filled in at publication.
    """

    schema_version: Literal[1]
    kind: Kind
    description: str = ""
    model: ModelSpec
    sites: list[Site] = []
    activation: Activation | None = None
    labels: Text | None = None
    default_features: Annotated[list[FeatureDefault], Field(min_length=1, max_length=256)] | Literal["all"] | None = (
        None
    )
    interventions: Annotated[list[PresetItem], Field(min_length=1)] | None = None
    default_strength: FiniteFloat
    strength_range: tuple[FiniteFloat, FiniteFloat] | None = None
    default_layers: list[NonNegativeInt] | None = None
    h_norm: dict[NonNegativeInt, PositiveNorm] = {}
    languages: list[Language] = []
    files: list[FileEntry] = []
    provenance: Provenance
    tuning: Tuning | None = None
    metrics: dict[str, FiniteFloat] = {}
    license: str | None = None
    annotations: dict[str, str] = {}

    @property
    def point(self) -> Point:
        """The point that all sites are at. IndexError for a preset, which has none."""
        return self.sites[0].point

    @property
    def layers(self) -> list[int]:
        """The layers that have a site, each once, in order."""
        return sorted({site.layer for site in self.sites})

    @property
    def width(self) -> int:
        """Of the activation at the artifact's point."""
        return width_at(self.model, self.point)


def width_at(model: ModelSpec, point: Point) -> int:
    """The width of an activation at a point. KeyError where the manifest should say it and doesn't."""
    if point == "head_out" or point == "mlp_act":
        return (model.widths or {})[point]
    return model.hidden_size


def parse_manifest(source: Manifest | Mapping[str, object] | str | bytes) -> Manifest:
    """Read and check a manifest given as JSON, as a mapping or as a model. Raises InvalidManifest or TooLarge."""
    raw = _as_json(source)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise TooLarge(
            f"manifest: {len(raw)} bytes, and at most {MAX_MANIFEST_BYTES} are allowed; shorten its texts", "manifest"
        )
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as exc:
        raise _refusal(exc) from None
    check_manifest(manifest)
    return manifest


def read_manifest(text: str | bytes) -> Manifest:
    """Read a manifest that was published, by this release or by an earlier one. Raises InvalidManifest."""
    try:
        return Manifest.model_validate_json(migrated(text))
    except ValidationError as exc:
        raise _refusal(exc) from None
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise InvalidManifest(f"manifest: it is none of an earlier release ({exc!r}); restore it", "manifest") from None


def read_published(text: bytes) -> Manifest:
    """Read a manifest that another store published, by its text, and check it like a new one. Raises InvalidManifest.

    The text is the artifact's identity, so it must be as a store writes it: in canonical form.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise TooLarge(f"manifest: {len(text)} bytes, and at most {MAX_MANIFEST_BYTES} are allowed", "manifest")
    manifest = read_manifest(text)
    check_manifest(manifest)
    content = json.loads(text)
    # Of a schema before today's only the form can be compared, and not which fields it leaves out.
    if text != (canonical_json(manifest) if content["schema_version"] == SCHEMA_VERSION else _canonical(content)):
        raise InvalidManifest("manifest: it isn't in canonical form; publish it instead", "manifest")
    return manifest


def json_schema() -> dict[str, JsonValue]:
    """The JSON Schema (draft 2020-12) of a manifest, as it is published in `docs/manifest.schema.json`.

    What two fields owe to each other is not in it: publication checks that too.
    """
    schema = Manifest.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "polyhelm artifact manifest"}


def canonical_json(manifest: Manifest) -> bytes:
    """The bytes that the digest is taken of: UTF-8, sorted keys, no whitespace, no nulls for absent fields."""
    return _canonical(manifest.model_dump(mode="json", exclude_none=True))


def digest(manifest: Manifest) -> str:
    """`sha256:HEX64` of the canonical form."""
    return digest_of(canonical_json(manifest))


def digest_of(data: bytes) -> str:
    """`sha256:HEX64` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _as_json(source: Manifest | Mapping[str, object] | str | bytes) -> bytes:
    if isinstance(source, str | bytes):
        return source if isinstance(source, bytes) else source.encode(errors="surrogatepass")
    try:
        # NaN is let through here so that the refusal can name the field that holds it.
        return to_json(source if isinstance(source, Manifest) else dict(source), inf_nan_mode="constants")
    except (PydanticSerializationError, UnicodeEncodeError) as exc:
        raise InvalidManifest(f"manifest: {exc}; use only what JSON can hold", "manifest") from None


def _refusal(exc: ValidationError) -> InvalidManifest:
    errors = exc.errors(include_url=False, include_context=False)
    # A manifest of another schema fails in many fields; its version is the one to name.
    error = next((e for e in errors if e["loc"] == ("schema_version",) and e["type"] != "missing"), errors[0])
    param = ".".join(str(part) for part in error["loc"]) or "manifest"
    if param == "schema_version" and error["type"] != "missing":
        known = f"this polyhelm reads version {SCHEMA_VERSION}"
        return InvalidManifest(f"schema_version {error['input']!r} is unknown: {known}; upgrade polyhelm", param)
    return InvalidManifest(f"manifest field {param!r}: {error['msg']}; correct it and publish again", param)
