"""Every setting of the service. Each has an environment variable: POLYHELM_ and the name in capitals."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

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
    bank_slots: int = Field(128, ge=2)
    """Steering vectors kept on the device at a time."""
    prefix_cache: Literal["auto", "cache_salt"] = "auto"
    """How steered requests are kept apart in the prefix cache: by tagged blocks where that works, or always by salt."""
    model_match: Literal["weights", "shape"] = "weights"
    """What an artifact must share with the served model: its very weights, or architecture, width and depth only."""
    max_strength: float = Field(1e4, gt=0)
    max_body_bytes: int = Field(16 * MiB, ge=1024)
    """Largest JSON body."""
    max_artifact_bytes: int = Field(1024 * MiB, ge=1024)
    """Largest artifact that can be published."""
    max_fit_pairs: int = Field(10_000, ge=2)
