"""What others call a site: TransformerLens' hooks, `blocks.14.hook_resid_post`, and modules, `layers.14.mlp`."""

from __future__ import annotations

import re

from steering_store.errors import UnsupportedFile
from steering_store.manifest import Point

_BLOCK = re.compile(r"blocks\.(\d{1,4})\.(.+)")
_MODULE = re.compile(r"(?:model\.|transformer\.|gpt_neox\.|language_model\.)*(?:layers|h)\.(\d{1,4})(?:\.(.+))?")
_HOOKS: dict[str, Point] = {
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "head_out",
    "mlp.hook_post": "mlp_act",
    "hook_resid_pre": "resid_pre",
}
_MODULES: dict[str | None, Point] = {
    None: "resid_post",
    "output": "resid_post",
    "mlp": "mlp_out",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attn.o_proj.input": "head_out",
}
_NORMED = ("Gemma2", "Gemma3", "Olmo2", "Olmo3")
"""Architectures with a norm behind each sub-layer. Our mlp_out and attn_out are before it, TransformerLens' behind."""


def site_of_hook(hook: str, architecture: str, file: str) -> tuple[Point, int]:
    """The point and layer that a hook or module name means. Raises UnsupportedFile where polyhelm has no such site."""
    if (match := _BLOCK.fullmatch(hook)) is not None:
        layer, name = int(match[1]), match[2]
        if name == "hook_resid_pre" and layer > 0:
            return "resid_post", layer - 1
        point = _HOOKS.get(name)
        if point in ("mlp_out", "attn_out") and architecture.startswith(_NORMED):
            raise UnsupportedFile(
                f"{file}: {hook} of {architecture} is behind a norm, where polyhelm has no site; use one at resid_post",
                file,
            )
    elif (match := _MODULE.fullmatch(hook)) is not None:
        layer, point = int(match[1]), _MODULES.get(match[2])
    else:
        layer, point = 0, None
    if point is None:
        raise UnsupportedFile(f"{file}: {hook!r} isn't a site of polyhelm; it has {', '.join(_HOOKS)}", file)
    return point, layer


def hook_of_site(point: Point, layer: int) -> str:
    """TransformerLens' name of a site."""
    (name,) = (hook for hook, other in _HOOKS.items() if other == point)
    return f"blocks.{layer}.{name}"
