"""Every setting of the service. Each has an environment variable: POLYHELM_ and the name in capitals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.engine.edits import Point

MiB = 1 << 20


class Settings(BaseSettings):
    """Read from the environment; command-line flags win."""

    model_config = SettingsConfigDict(env_prefix="POLYHELM_", extra="ignore")

    model: str = "smollm2"
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    data_dir: Path = Path("polyhelm-data")
    demo: bool = False
    """Make sure that the demo artifacts exist before serving."""
    bank_bytes: int = Field(256 * MiB, ge=4096)
    """What artifacts may take of the device; the least recently used make room for others."""
    bank_host_bytes: int = Field(512 * MiB, ge=0)
    """Copies kept in host memory, so that an artifact that had to make room comes back without being read again."""
    bank_wait_seconds: float = Field(10, ge=0)
    """How long a request waits for room on the device before it is refused with 503."""
    points: Annotated[list[Point] | None, NoDecode] = None
    """Where the model can be edited, separated by commas. By default everywhere that the model allows, but in compiled
    code and CUDA graphs, where each point costs a launch per layer, at `resid_post` only.
    """
    map_points: Annotated[list[Point] | None, NoDecode] = None
    """On a GPU, points at which matrices are applied to many tokens together, by kernels that cost further launches. By
    default none in compiled code and CUDA graphs, where a matrix is then applied token by token.
    """
    prefix_cache: Literal["auto", "cache_salt"] = "auto"
    """How steered requests are kept apart in the prefix cache: by tagged blocks where that works, or always by salt."""
    model_match: Literal["weights", "shape"] = "weights"
    """What an artifact must share with the served model: its very weights, or architecture, width and depth only."""
    max_strength: float = Field(1e4, gt=0)
    max_relative_dose: float | None = Field(None, ge=0)
    """Largest dose that a request may ask for; a request may lower it for itself."""
    max_body_bytes: int = Field(16 * MiB, ge=1024)
    """Largest JSON body."""
    store: str | None = None
    """Where the artifacts are: any fsspec URL, such as s3://bucket/prefix. By default `<data-dir>/artifacts`."""
    allowed_remotes: Annotated[list[str] | None, NoDecode] = None
    """Where stores, repositories, models of the hub, the knowledge base and its encoder may be, separated by commas,
    such as s3://bucket/prefix,hf://org,https://encoder.example.com. Without it anywhere; nowhere where it is empty.
    """
    store_cache_bytes: int = Field(10 * 1024 * MiB, ge=0)
    """What files of a store at a URL may take of this disk."""
    store_refresh_seconds: float = Field(10, gt=0)
    """How often a store at a URL is asked what other machines have changed."""
    max_artifact_bytes: int = Field(1024 * MiB, ge=1024)
    """Largest artifact that can be published."""
    max_artifact_files: int = Field(16, ge=1)
    """Most files of an artifact that can be published."""
    admin_api_key: str | None = Field(None, min_length=1, repr=False)
    """A key with every scope, beside those of `polyhelm key`."""
    open_metrics: bool = True
    """Whether `/metrics` answers without a key; else any key will do."""
    max_requests: int = Field(1024, ge=1)
    """Requests that one API process answers at a time; beyond them it answers 503."""
    max_bytes_in_flight: int = Field(512 * MiB, ge=1024)
    """What the bodies of those requests may take together."""
    max_header_bytes: int = Field(64 * 1024, ge=1024)
    """Longest request line and headers, together."""
    header_seconds: float = Field(30, gt=0)
    """How long a client may take to send them."""
    client_seconds: float = Field(60, gt=0)
    """How long a client may take to send a body, beside what it takes at 1 KiB/s, or to read a part of an answer."""
    keep_alive_seconds: float = Field(15, ge=0)
    """After how much silence an event stream gets a comment, so that no proxy gives it up; 0 sends none."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """How the line of each request is written: as JSON, but for a person at a terminal."""
    capture_memory_bytes: int = Field(64 * MiB, ge=0)
    """Captured activations that the engine holds per request; what is beyond goes to `<data-dir>/captures`."""
    max_capture_bytes: int = Field(4096 * MiB, ge=1)
    """Largest answer to a request for activations."""
    max_fit_pairs: int = Field(10_000, ge=2)
    expert_models: Annotated[list[str], NoDecode] = []
    """Models, separated by commas, that a fit may load beside the served one: embedded ones, folders or hub ids."""

    kb_url: str | None = None
    """Where the knowledge base is: a folder, postgresql://, qdrant+http:// or qdrant+https://. By default
    `<data-dir>/kb`.
    """
    kb_encoder: str = "e5-small"
    """What turns texts into vectors: `e5-small`, `st:FOLDER_OR_HUB_ID`, `tei:URL` or `openai:URL#MODEL`."""
    kb_scope: Path | None = None
    """A folder that `polyhelm kb train-scope` made: what decides whether a question is about a fact. By default what
    comes with polyhelm, for `e5-small` only.
    """
    kb_index: Literal["auto", "flat", "hnsw", "ivf"] = "auto"
    """How collections in a folder are searched; `auto` is exact up to `kb_exact_below` facts, and HNSW beyond."""
    kb_exact_below: int = Field(300_000, ge=0)
    max_fact_bytes: int = Field(128 * 1024, ge=1024)
    """Largest fact that is accepted, as JSON."""

    @field_validator("points", "map_points", "expert_models", "allowed_remotes", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("allowed_remotes", "expert_models")
    @classmethod
    def _without_blanks(cls, value: list[str] | None) -> list[str] | None:
        return value and [each.strip() for each in value if each.strip()]
