"""Where the points of small layers are found, and for which layers they are refused, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

from server.engine.edits import POINTS, Point
from server.engine.points import UnsupportedModel, decoder_layers, places
from server.engine.sites import _points

HIDDEN = 8


class Scores(nn.Module, AttentionLayerBase):
    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: Any) -> None:
        return None


def projection(width: int, ranks: int = 1) -> RowParallelLinear:
    """vLLM's own class, without the ranks that its constructor asks for."""
    made: RowParallelLinear = RowParallelLinear.__new__(RowParallelLinear)
    nn.Module.__init__(made)
    made.input_size, made.input_size_per_partition = width, width // ranks
    return made


def experts() -> nn.Module:
    made = object.__new__(MoERunner)
    nn.Module.__init__(made)
    return made


class Part(nn.Module):
    """A sub-layer of these modules."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self.add_module(str(index), module)


class Layer(Part):
    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> None: ...


class Renamed(Part):
    def forward(self, positions: torch.Tensor, stream: torch.Tensor) -> None: ...


def attention(width: int = 12) -> Part:
    return Part(Scores(), projection(width))


def feed_forward(width: int = 24, ranks: int = 1) -> Part:
    return Part(nn.Linear(1, 1), projection(width, ranks))


def plain(neurons: int = 24) -> Layer:
    return Layer(nn.LayerNorm(HIDDEN), attention(), nn.LayerNorm(HIDDEN), feed_forward(neurons))


def test_the_points_of_a_plain_layer() -> None:
    layer = Layer(nn.LayerNorm(HIDDEN), attention(), feed_forward(24, ranks=2))
    found, refused = places(layer, HIDDEN)
    assert refused == {}
    assert tuple(found) == POINTS
    widths = {"head_out": 12, "mlp_act": 24}
    assert {point: place.width for point, place in found.items()} == {
        point: widths.get(point, HIDDEN) for point in POINTS
    }
    assert {point for point, place in found.items() if place.receives} == {"head_out", "mlp_act", "resid_pre"}
    assert found["mlp_act"].shards == 2 and found["resid_pre"].module is found["resid_post"].module is layer


@pytest.mark.parametrize(
    ("layer", "refused"),
    [
        (Layer(attention(), Part(experts())), {"mlp_act": "a mixture of experts"}),
        (Layer(attention(), Part(projection(24), experts())), {"mlp_act": "a mixture of experts"}),
        (Layer(attention(), Part(projection(24), projection(24))), {"mlp_act": "2 output projections"}),
        (Layer(attention(), feed_forward(), feed_forward()), dict.fromkeys(("mlp_out", "mlp_act"), "2 feed-forward")),
        (Layer(attention(), attention(), feed_forward()), dict.fromkeys(("attn_out", "head_out"), "2 attention")),
        (Layer(Scores(), feed_forward()), {"head_out": "0 output projections"}),
        (Renamed(attention(), feed_forward()), {"resid_pre": "Renamed takes no hidden_states"}),
    ],
    ids=["experts", "experts beside a projection", "two projections", "two feed-forwards", "two attentions",
         "no projection", "other names"],
)  # fmt: skip
def test_what_is_not_where_it_should_be_is_refused_and_the_rest_is_there(
    layer: nn.Module, refused: dict[Point, str]
) -> None:
    found, reasons = places(layer, HIDDEN)
    assert reasons.keys() == refused.keys()
    assert all(words in reasons[point] for point, words in refused.items()), reasons
    assert set(found) == set(POINTS) - set(refused)


class Model(nn.Module):
    def __init__(self, **lists: list[nn.Module]) -> None:
        super().__init__()
        for name, modules in lists.items():
            self.add_module(name, nn.ModuleList(modules))


def test_the_layers_are_the_one_list_of_so_many_that_attend() -> None:
    model = Model(layers=[plain(), PPMissingLayer(), plain()], norms=[nn.LayerNorm(1) for _ in range(3)])
    assert list(decoder_layers(model, 3)) == [0, 2], "this stage's alone"


def test_a_second_list_of_the_same_layers_is_no_other() -> None:
    layers = [plain() for _ in range(3)]
    assert list(decoder_layers(Model(layers=layers, compiled=layers), 3).values()) == layers


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Model(layers=[plain(), plain()]), 0),
        (Model(layers=[plain(), Layer(feed_forward()), plain()]), 0),
        (Model(encoder=[plain() for _ in range(3)], decoder=[plain() for _ in range(3)]), 2),
        (Model(layers=[PPMissingLayer() for _ in range(3)]), 0),
    ],
    ids=["another number", "one without attention", "two lists", "none here"],
)
def test_a_model_without_one_list_of_layers_is_refused(model: nn.Module, found: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"Model: found {found} lists of 3 decoder layers, need exactly one"):
        decoder_layers(model, 3)


def test_a_point_whose_width_differs_between_layers_is_refused_by_name() -> None:
    layers: dict[int, nn.Module] = {0: plain(), 1: plain(neurons=48)}
    points = _points(layers, POINTS, HIDDEN, insist=False)
    assert points["mlp_act"].opcodes == () and "differs between layers: [(24, 1), (48, 1)]" in str(
        points["mlp_act"].reason
    )
    assert points["mlp_out"].opcodes
    with pytest.raises(UnsupportedModel, match="mlp_act: its width differs"):
        _points(layers, ("mlp_act",), HIDDEN, insist=True)
    with pytest.raises(UnsupportedModel, match="mlp_act: Part has a mixture of experts"):
        _points({0: Layer(attention(), Part(experts()))}, ("mlp_act",), HIDDEN, insist=True)
    assert "POLYHELM_POINTS" in str(_points(layers, ("mlp_out",), HIDDEN, insist=True)["mlp_act"].reason)


def test_a_split_point_keeps_the_opcodes_that_need_no_whole_activation() -> None:
    info = _points({0: Layer(attention(), feed_forward(24, ranks=2))}, POINTS, HIDDEN, insist=False)["mlp_act"]
    assert (info.width, info.shards, set(info.opcodes)) == (24, 2, {"add", "scale", "set"})
    assert "split over 2 ranks" in str(info.reason)
