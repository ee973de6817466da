"""Installs the op at the sites of a loaded model, and refuses the configurations in which it would not be exact."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from server.engine.banks import Bank
from server.engine.capture import CaptureSlice
from server.engine.edits import OPCODES, POINTS, Opcode, Point, layers_at, site_index
from server.engine.ops import register
from server.engine.ops.cpu_kernel import CpuKernel
from server.engine.ops.tables import ELEMENTWISE, WIDEST, Tables
from server.engine.points import Place, UnsupportedModel, decoder_layers, parameters, places
from server.engine.routing import Router

CONFIG_KEY = "polyhelm"
"""Our section of vLLM's `additional_config`; being there, it also salts vLLM's compile cache."""

STACKED = ("altup_num_inputs", "hc_mult", "hc_count")
"""Names, in a model's configuration, of the number of residual streams that it runs side by side."""


@dataclass(frozen=True, slots=True)
class PointInfo:
    """What can be done at one point of this model. `opcodes` is empty where `reason` says why."""

    width: int
    opcodes: tuple[Opcode, ...]
    shards: int = 1
    """Ranks over which the activation is split."""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Installation:
    """What the worker keeps beside the model."""

    bank: Bank
    router: Router
    layers: int
    hidden_size: int
    points: dict[Point, PointInfo]
    captures: str | None
    """Why activations can't be captured, or None if they can."""

    def shard(self, point: Point) -> tuple[int, int]:
        """(rank, ranks) of the tensor-parallel split at a point."""
        if self.points[point].shards == 1:
            return 0, 1
        from vllm.distributed import get_tensor_model_parallel_rank

        return get_tensor_model_parallel_rank(), self.points[point].shards


def install(model: nn.Module, vllm_config: VllmConfig) -> Installation:
    """Put the op at every site of `model` that the settings name. Raises UnsupportedModel with the reason."""
    refuse_unsupported(vllm_config)
    config = vllm_config.additional_config[CONFIG_KEY]
    model_config = vllm_config.model_config
    hidden_size, count = model_config.get_hidden_size(), model_config.get_total_num_hidden_layers()
    device = torch.device(vllm_config.device_config.device)
    compiled = vllm_config.compilation_config.mode != 0
    graphs = vllm_config.compilation_config.cudagraph_mode.name != "NONE"
    wanted: Sequence[Point] = config.get("points") or (POINTS[:1] if compiled or graphs else POINTS)
    layers = decoder_layers(model, count)
    points = _points(layers, wanted, hidden_size, bool(config.get("points")))
    bank = Bank(config["bank_bytes"] // 4, device)
    is_triton = device.type != "cpu" or config.get("op") == "triton"
    widths = {point: info.width // info.shards for point, info in points.items() if info.opcodes}
    # The map kernels are launched at all sites of a graph, used or not: there they have to be asked for.
    mapped = config.get("map_points") or (() if is_triton and (compiled or graphs) else wanted)
    tables = Tables(
        bank,
        len(POINTS) * count,
        {site_index(point, n, count): width for point, width in widths.items() for n in layers_at(point, count)},
        max_rows=vllm_config.scheduler_config.max_num_seqs,
        max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        max_edits=config["max_edits"],
        map_sites=frozenset(
            site_index(point, n, count)
            for point in widths
            for n in layers_at(point, count)
            if n in layers and point in mapped
        ),
    )
    router = Router(tables, count)
    executor = TritonExecutor(router) if is_triton else CpuExecutor(router, model_config.dtype)
    register.use(executor.traced)
    for number, layer in layers.items():
        found, _ = places(layer, hidden_size)
        for point, info in points.items():
            if not info.opcodes or number not in layers_at(point, count):
                continue
            site = site_index(point, number, count)
            where = torch.tensor([site], dtype=torch.int32, device=device)
            if compiled or graphs:
                _wrap(found[point], _traced(where), None, site)
            else:
                _wrap(found[point], functools.partial(executor.eager, site, where), router.works, site)
    captures = None
    if graphs or (compiled and is_triton):
        captures = "activations can't be captured in compiled code on a GPU: leave out --no-enforce-eager"
    return Installation(bank, router, count, hidden_size, points, captures)


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedModel for the engine settings under which edits would not be exact, or requests hold pickles."""
    parallel, text = vllm_config.parallel_config, vllm_config.model_config.hf_text_config
    reasons = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "diffusion language models": vllm_config.model_config.is_diffusion,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "microbatching": parallel.use_ubatching,
        "sequence-parallel mixtures of experts": parallel.use_sequence_parallel_moe,
        "stacked residual streams": any((getattr(text, name, None) or 1) > 1 for name in STACKED),
    }
    if refused := [name for name, present in reasons.items() if present]:
        raise UnsupportedModel(f"polyhelm can't steer with {', '.join(refused)}")
    multimodal = vllm_config.model_config.multimodal_config
    if vllm_config.model_config.enable_prompt_embeds or (multimodal is not None and multimodal.enable_mm_embeds):
        raise UnsupportedModel("polyhelm reads no pickles, which vLLM takes embeddings in: leave out --enable-*-embeds")


def _points(
    layers: dict[int, nn.Module], wanted: Sequence[Point], hidden_size: int, insist: bool
) -> dict[Point, PointInfo]:
    """What each point can do, wherever it is alike. UnsupportedModel where a point was asked for and can't be had."""
    points: dict[Point, PointInfo] = {}
    found = [places(layer, hidden_size) for layer in layers.values()]
    for point in POINTS:
        missing = [refused[point] for place, refused in found if point not in place]
        sizes = {(place[point].width, place[point].shards) for place, _ in found if point in place}
        if point not in wanted:
            points[point] = PointInfo(0, (), reason="it isn't installed: name it in POLYHELM_POINTS")
        elif missing or len(sizes) != 1:
            reason = missing[0] if missing else f"its width differs between layers: {sorted(sizes)}"
            if insist:
                raise UnsupportedModel(f"{point}: {reason}")
            points[point] = PointInfo(0, (), reason=reason)
        else:
            ((width, shards),) = sizes
            reason = None
            if shards > 1:
                reason = f"opcodes that read a whole activation: it is split over {shards} ranks"
            elif width > WIDEST:
                reason = f"opcodes that read a whole activation: it is {width} wide, over {WIDEST}"
            opcodes = OPCODES if reason is None else tuple(each for each in OPCODES if each in ELEMENTWISE)
            points[point] = PointInfo(width, opcodes, shards, reason)
    return points


Op = Callable[[torch.Tensor, torch.Tensor | None], None]


class CpuExecutor:
    """Runs the step's work at a site on a CPU, by the kernel compiled for activations of `dtype`."""

    def __init__(self, router: Router, dtype: torch.dtype) -> None:
        self._router = router
        self._kernel = CpuKernel(router.tables)
        self._kernel.compile(dtype)

    def eager(self, site: int, where: torch.Tensor, stream: torch.Tensor, addend: torch.Tensor | None) -> None:
        self._kernel.launch(site, stream, addend)
        for capture in self._router.works[site] or ():
            capture.add(addend, stream)

    def traced(self, where: torch.Tensor, stream: torch.Tensor, addend: torch.Tensor | None) -> None:
        site = int(where)
        if self._router.works[site] is not None:
            self.eager(site, where, stream, addend)


@dataclass(frozen=True, slots=True)
class TritonExecutor:
    """Launches the kernels at a site. Captures, which the kernels don't do, follow in eager mode."""

    router: Router

    def eager(self, site: int, where: torch.Tensor, stream: torch.Tensor, addend: torch.Tensor | None) -> None:
        self.launch(where, stream, addend, site in self.router.tables.map_sites)
        for capture in self.router.works[site] or ():
            capture.add(addend, stream)

    def traced(self, where: torch.Tensor, stream: torch.Tensor, addend: torch.Tensor | None) -> None:
        # The site's number is on the device, and this runs only while a graph is captured: all sites are treated alike.
        self.launch(where, stream, addend, bool(self.router.tables.map_sites))

    def launch(self, where: torch.Tensor, stream: torch.Tensor, addend: torch.Tensor | None, maps: bool) -> None:
        from server.engine.ops import kernel

        kernel.launch(self.router.tables, where, stream, addend, maps=maps)


def _traced(where: torch.Tensor) -> Op:
    """For torch.compile and CUDA graphs: a call of the registered op."""

    def op(stream: torch.Tensor, addend: torch.Tensor | None) -> None:
        torch.ops.polyhelm.edit(stream, addend, where)

    return op


def _wrap(place: Place, op: Op, works: list[list[CaptureSlice] | None] | None, site: int) -> None:
    """Call `op` on the activation of every step, or, given `works`, of those steps that have work at the site: then one
    branch is all that an idle site costs.
    """
    forward, name = place.module.forward, place.receives
    index = parameters(place.module).index(name) if name is not None else 0

    def receiving(*args: Any, **kwargs: Any) -> Any:
        if works is None or works[site] is not None:
            op(_tokens(args[index] if index < len(args) else kwargs[name]), None)
        return forward(*args, **kwargs)

    def returning(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if works is None or works[site] is not None:
            addend, stream = split_stream(output)
            op(stream, addend)
        return output

    place.module.forward = receiving if name is not None else returning  # type: ignore[method-assign]


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """The activation as [tokens, width]; models that run on transformers' own code have a batch of one around it."""
    dimensions = x.dim()
    if dimensions == 2:
        return x
    if dimensions == 3 and x.shape[0] == 1:
        return x[0]
    raise UnsupportedModel(f"an activation is {dimensions}-dimensional; need [tokens, width]")


def split_stream(output: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The two addends of the activation in a module's output; the first is None where it is one tensor.

    vLLM's decoder layers return a pair whose sum is the residual stream, a pair with None, or one tensor. The second
    addend is the one to edit: kernels that fuse the next norm with an all-reduce need the first as it is.
    """
    if isinstance(output, torch.Tensor):
        return None, _tokens(output)
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], torch.Tensor):
        hidden, residual = output
        if residual is None:
            return None, _tokens(hidden)
        if isinstance(residual, torch.Tensor) and residual.shape == hidden.shape:
            return _tokens(hidden), _tokens(residual)
    raise UnsupportedModel(f"a module returned {type(output).__name__}; need a tensor or (hidden, residual)")
