"""A known sparse dictionary must be found again, within seconds on one core."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from methods import sae_training
from methods.sae import Array, Sae, calibrated, ordinary, quality
from methods.sae_training import Architecture, Config, train

WIDTH, ATOMS, ACTIVE = 16, 32, 3


def dictionary(seed: int = 0) -> Array:
    atoms = np.random.default_rng(seed).standard_normal((ATOMS, WIDTH))
    return (atoms / np.linalg.norm(atoms, axis=1, keepdims=True)).astype(np.float32)


def samples(count: int, seed: int = 1, scale: float = 7.0) -> Array:
    """Sums of 3 atoms with weights between 0.5 and 1.5, in units and round a mean of their own."""
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((count, ATOMS)), axis=1)[:, :ACTIVE]
    weights = np.zeros((count, ATOMS))
    np.put_along_axis(weights, chosen, rng.uniform(0.5, 1.5, chosen.shape), axis=1)
    return (scale * (weights @ dictionary() + 0.3)).astype(np.float32)


def config(architecture: Architecture = "topk", **changes: object) -> Config:
    fields: dict[str, object] = {
        "features": 48, "k": ACTIVE, "architecture": architecture, "steps": 1500, "batch": 512,
        "learning_rate": 3e-3, "dead_after": 10_000,
    }  # fmt: skip
    return Config(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rows() -> Array:
    return samples(20_000)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_known_dictionary_is_recovered_on_rows_it_has_not_seen(architecture: Architecture, rows: Array) -> None:
    trained = train(rows, config(architecture))
    held_out = quality(trained.sae, samples(4000, seed=2))
    assert held_out.fvu < 0.1
    assert held_out.l0 <= 1.3 * ACTIVE
    learned = trained.sae.decoder / np.linalg.norm(trained.sae.decoder, axis=1, keepdims=True)
    closest = (dictionary() @ learned.T).max(1)
    assert (closest > 0.9).mean() > 0.8
    assert trained.curve[-1].step == 1500 and trained.curve[-1].fvu < trained.curve[0].fvu / 2


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    architecture: Architecture, rows: Array, tmp_path: Path
) -> None:
    short = config(architecture, steps=60)
    whole = train(rows, short)
    path = tmp_path / "sae.safetensors"

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 25:
            raise Stop

    with pytest.raises(Stop):
        train(rows, short, checkpoint=path, checkpoint_every=20, progress=stop)
    seen: list[int] = []
    resumed = train(rows, short, checkpoint=path, progress=lambda done, total: seen.append(done))
    assert seen[0] == 20 and seen[-1] == 60
    np.testing.assert_array_equal(resumed.sae.decoder, whole.sae.decoder)
    np.testing.assert_array_equal(resumed.sae.encoder, whole.sae.encoder)
    assert resumed.curve == whole.curve
    done: list[int] = []
    train(rows, short, checkpoint=path, progress=lambda step, total: done.append(step))
    assert done == [60]


def test_the_seed_decides_and_nothing_else(rows: Array) -> None:
    short = config(steps=10)
    first, again, other = train(rows, short), train(rows, short), train(rows, config(steps=10, seed=1))
    np.testing.assert_array_equal(first.sae.decoder, again.sae.decoder)
    assert not np.array_equal(first.sae.decoder, other.sae.decoder)


def test_a_checkpoint_of_other_rows_or_another_configuration_is_refused(rows: Array, tmp_path: Path) -> None:
    path = tmp_path / "sae.safetensors"
    train(rows, config(steps=4), checkpoint=path)
    for other in (config(steps=5), config(steps=4, seed=1)):
        with pytest.raises(ValueError, match="other rows or another configuration"):
            train(rows, other, checkpoint=path)
    with pytest.raises(ValueError, match="other rows or another configuration"):
        train(samples(20_000, seed=9), config(steps=4), checkpoint=path)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_dead_features_come_back_by_the_auxiliary_loss_and_only_by_it(architecture: Architecture, rows: Array) -> None:
    """28 of 48 features start so low that they don't fire, and the others can't explain 32 atoms."""
    found = {}
    for weight in (0.0, 1 / 32):
        run = sae_training._Run(rows, config(architecture, steps=500, dead_after=2000, aux_weight=weight))
        with torch.no_grad():
            if architecture == "topk":
                run.parameters["encoder"][20:] *= 0.02
                run.parameters["encoder_bias"][:20] = 0.5
            else:
                run.parameters["encoder_bias"][20:] = -1.5
                run.parameters["threshold"][20:] = np.log(3)
        while run.step < run.config.steps:
            run.advance()
        found[weight] = quality(run.result(), rows)
    assert found[0.0].dead > 0.4 and found[1 / 32].dead < found[0.0].dead - 0.3
    assert found[1 / 32].fvu < (0.95 if architecture == "topk" else 1) * found[0.0].fvu


def test_the_numbers_of_the_curve_are_those_of_the_sae(rows: Array) -> None:
    trained = train(rows, config(steps=400))
    found = quality(trained.sae, rows)
    assert trained.curve[-1].fvu == pytest.approx(found.fvu, rel=0.1)
    assert trained.curve[-1].l0 == pytest.approx(found.l0, abs=0.1)


def test_a_jumprelu_comes_near_the_l0_that_is_asked_for(rows: Array) -> None:
    for k in (3, 6):
        assert quality(train(rows, config("jumprelu", k=k, steps=800)).sae, rows).l0 == pytest.approx(k, rel=0.3)


def test_impossible_configurations_and_rows_are_refused(rows: Array) -> None:
    for changes, message in (({"k": 49}, "between 1 and"), ({"steps": 0}, "positive"), ({"batch": 30_000}, "a batch")):
        with pytest.raises(ValueError, match=message):
            train(rows, config(**changes))
    with pytest.raises(ValueError, match="not all the same"):
        train(np.ones((2000, 4), np.float32), config())
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(rows, config(learning_rate=1e30, steps=50))


def small(activation: str, **rest: object) -> Sae:
    rng = np.random.default_rng(0)
    shapes = {"encoder": (7, 4), "encoder_bias": (7,), "decoder": (7, 4), "decoder_bias": (4,)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return Sae(activation, **tensors, **rest)  # type: ignore[arg-type]


def test_encode_and_decode_are_the_formulas() -> None:
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    top, jump = small("topk", k=2), small("jumprelu", threshold=np.full(7, 0.4, np.float32))
    for row, a_top, a_jump, a_relu in zip(x, top.encode(x), jump.encode(x), small("relu").encode(x), strict=True):
        z = np.array([e @ row + b for e, b in zip(top.encoder, top.encoder_bias, strict=True)])
        kept = sorted(range(7), key=lambda k: -z[k])[:2]
        np.testing.assert_allclose(a_top, [max(z[k], 0) if k in kept else 0 for k in range(7)], atol=1e-6)
        np.testing.assert_allclose(a_jump, [v if v > 0.4 else 0 for v in z], atol=1e-6)
        np.testing.assert_allclose(a_relu, np.maximum(z, 0), atol=1e-6)
    a = top.encode(x)
    np.testing.assert_allclose(
        top.decode(a)[0], sum(v * d for v, d in zip(a[0], top.decoder, strict=True)) + top.decoder_bias, atol=1e-5
    )


def test_quality_is_one_for_the_mean_and_zero_for_a_perfect_code() -> None:
    x = np.abs(np.random.default_rng(0).standard_normal((3000, 4))).astype(np.float32) + 0.1
    eye, zero = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    perfect = quality(Sae("relu", eye, zero, eye, zero), x)
    assert perfect.fvu < 1e-12 and perfect.l0 == 4 and perfect.dead == 0
    nothing = quality(Sae("relu", -eye, zero, eye, x.mean(0)), x)
    assert nothing.fvu == pytest.approx(1, abs=1e-5) and nothing.l0 == 0 and nothing.dead == 1


def test_sinks_are_told_from_ordinary_rows_by_their_length() -> None:
    x = np.random.default_rng(0).standard_normal((3000, 4)).astype(np.float32)
    x[[7, 2500]] *= 500
    assert np.flatnonzero(~ordinary(x)).tolist() == [7, 2500]
    assert ordinary(x, factor=1e6).all()


def test_a_topk_is_calibrated_to_as_many_features_on_average() -> None:
    x = np.random.default_rng(1).standard_normal((3000, 4)).astype(np.float32)
    sae = small("topk", k=2)
    jump = calibrated(sae, x)
    assert jump.threshold is not None and len(set(jump.threshold.tolist())) == 1
    expected = np.sort(sae.pre(x).ravel())[-2 * 3000]
    assert jump.threshold[0] == pytest.approx(max(expected, 0), abs=1e-6)
    assert quality(jump, x).l0 == pytest.approx(2, abs=0.01)
    assert calibrated(jump, x) is jump


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    for arguments in ({"activation": "jumprelu"}, {"activation": "relu", "k": 2}, {"activation": "topk", "k": 8}):
        with pytest.raises(ValueError):
            small(**arguments)  # type: ignore[arg-type]


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    rates = [sae_training._schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[50] == 1 and rates[-1] == pytest.approx(0.05)
