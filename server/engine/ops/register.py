"""The op as torch sees it: `torch.ops.polyhelm.edit`, opaque to torch.compile and captured by CUDA graphs.

It edits `stream` in place; the activation is `stream + addend`, or `stream` alone. `site` [1] int32 holds the number of
the site as data, so that the compiled code is the same for all layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.utils.torch_utils import direct_register_custom_op

Executor = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]

_library = torch.library.Library("polyhelm", "FRAGMENT")  # type: ignore[no-untyped-call]
_executor: Executor | None = None


def use(executor: Executor) -> None:
    """Have the op of this process call `executor(site, stream, addend)`; a worker process holds one target model."""
    global _executor
    _executor = executor


def _edit(stream: torch.Tensor, addend: torch.Tensor | None, site: torch.Tensor) -> None:
    if _executor is None:
        raise RuntimeError("polyhelm's op ran before its sites were installed")
    _executor(site, stream, addend)


def _edit_fake(stream: torch.Tensor, addend: torch.Tensor | None, site: torch.Tensor) -> None:
    return None


if not hasattr(torch.ops.polyhelm, "edit"):
    direct_register_custom_op("edit", _edit, mutates_args=["stream"], fake_impl=_edit_fake, target_lib=_library)
