"""Names of sites: `resid_post.14`, and TransformerLens' `blocks.14.hook_resid_post`. Pure: no vLLM, no torch."""

from __future__ import annotations

import re

from server.engine.edits import POINTS, Point, layers_at

TRANSFORMER_LENS: dict[str, Point] = {
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "head_out",
    "mlp.hook_post": "mlp_act",
    "hook_resid_pre": "resid_pre",
}
"""TransformerLens' names of our points. Where a family normalizes a sub-layer's output before it joins the residual
stream (Gemma 2 and 3, OLMo 2), TransformerLens' `hook_mlp_out` and `hook_attn_out` are the tensors behind that norm;
`mlp_out` and `attn_out` are what the modules themselves return, before it.
"""

_OURS = re.compile(r"(?P<point>[a-z_]+)\.(?P<layer>[0-9]{1,6})")
_LENS = re.compile(r"blocks\.(?P<layer>[0-9]{1,6})\.(?P<hook>[a-z_.]+)")


class SiteNameError(ValueError):
    """Text that names no site at which this version can act; the message says what to write."""


def site_name(point: Point, layer: int) -> str:
    return f"{point}.{layer}"


def parse_site(name: str) -> tuple[Point, int]:
    """The point and the layer that a name means. Raises SiteNameError."""
    if match := _LENS.fullmatch(name):
        hook, layer = match["hook"], int(match["layer"])
        if hook not in TRANSFORMER_LENS:
            raise SiteNameError(f"{name!r}: no such site; the hooks are {', '.join(TRANSFORMER_LENS)}")
        return _site(name, TRANSFORMER_LENS[hook], layer)
    if match := _OURS.fullmatch(name):
        for point in POINTS:
            if point == match["point"]:
                return _site(name, point, int(match["layer"]))
    raise SiteNameError(
        f"{name!r} is no site: write a point and a layer, such as resid_post.14 or blocks.14.hook_resid_post; the "
        f"points are {', '.join(POINTS)}"
    )


def _site(name: str, point: Point, layer: int) -> tuple[Point, int]:
    if layer not in layers_at(point, layer + 1):
        raise SiteNameError(f"{name!r}: write resid_post.{layer - 1}, the same tensor")
    return point, layer
