"""Trains a sparse auto-encoder on captured activations, on a CPU in minutes or on a GPU.

Activations are centred on their mean and scaled by one number to a mean square of 1 per coordinate; the result is for
activations as they are. With x so scaled and x' its reconstruction, the loss of a batch is

    sum ||x - x'||^2 / sum ||x||^2 + aux_weight * sum ||e - e'||^2 / sum ||e||^2 + sparsity

where e = x - x' and e' is its reconstruction from the width/2 largest z of the features that haven't fired on the
last `dead_after` rows: they are drawn to what is still unexplained (Gao et al. 2024, "Scaling and evaluating sparse
autoencoders", A.2; weight 1/32).

A dead jumprelu feature is also drawn to its threshold, and this to it, by mean relu(threshold - z) (Anthropic 2025,
"Circuits updates", January): its z alone would have far to go.

- topk keeps the k largest z of a token, and has no sparsity term (Gao et al.; EleutherAI's sparsify).
- jumprelu learns a threshold per feature: sparsity = l0_weight (L0 / k - 1)^2, whose gradient with respect to the
  threshold is a straight-through estimate with a rectangle of the width `bandwidth` (Rajamanoharan et al. 2024,
  "Jumping ahead"). The thresholds start where k features fire.

Decoder rows have length 1 throughout, and the encoder starts as their copy. Adam; the learning rate is 2e-4 /
sqrt(features / 2^14) unless given (sparsify), warmed up over a twentieth of the steps and let down to 0 over the last
fifth. The same seed, rows and configuration give the same SAE, interrupted or not, on one machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from methods.sae import Array, Sae

Architecture = Literal["topk", "jumprelu"]
Progress = Callable[[int, int], None]
"""Takes (steps done, of how many)."""

DIGEST_ROWS = 4096
_PARAMETERS = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold")


@dataclass(frozen=True, slots=True)
class Config:
    """`k` is the L0: exact for topk, aimed at for jumprelu. `learning_rate` None is sparsify's rule."""

    features: int
    k: int
    architecture: Architecture = "topk"
    steps: int = 2000
    batch: int = 1024
    learning_rate: float | None = None
    seed: int = 0
    dead_after: int = 100_000
    aux_weight: float = 1 / 32
    l0_weight: float = 1.0
    bandwidth: float = 0.1
    device: str = "cpu"


class Point(NamedTuple):
    """The training batches' means since the point before."""

    step: int
    fvu: float
    l0: float
    dead: float


@dataclass(frozen=True)
class Training:
    """The SAE, and the curve that it was trained along."""

    sae: Sae
    curve: list[Point]


def train(
    rows: Array,
    config: Config,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    progress: Progress = lambda done, total: None,
) -> Training:
    """Train on rows [tokens, width], float32 or float16; a memory map will do.

    With a `checkpoint` file, it is written every so many steps and at the end, and a run goes on from where it is.
    ValueError for rows or a configuration that nothing can be trained from, or a checkpoint that belongs to others;
    FloatingPointError where the loss stops being finite. An exception of `progress` ends the training.
    """
    _check(rows, config)
    run = _Run(rows, config)
    if checkpoint is not None and checkpoint.exists():
        run.restore(checkpoint)
    progress(run.step, config.steps)
    while run.step < config.steps:
        run.advance()
        if checkpoint is not None and (run.step % checkpoint_every == 0 or run.step == config.steps):
            run.save(checkpoint)
        progress(run.step, config.steps)
    return Training(run.result(), run.curve)


def _check(rows: Array, config: Config) -> None:
    if rows.ndim != 2 or len(rows) < config.batch:
        raise ValueError(f"need rows [tokens, width], at least a batch of {config.batch}, got {rows.shape}")
    if not 0 < config.k <= config.features:
        raise ValueError(f"k {config.k} must be between 1 and the {config.features} features")
    if config.steps < 1 or config.batch < 1:
        raise ValueError(f"steps {config.steps} and batch {config.batch} must be positive")


class _Run:
    """The state of a training: all of it is in a checkpoint."""

    def __init__(self, rows: Array, config: Config) -> None:
        self.rows, self.config, self.step = rows, config, 0
        self.curve: list[Point] = []
        self.epoch, self.order = -1, np.empty(0, np.int64)
        self.mean, self.scale = _moments(rows)
        width, device = rows.shape[1], config.device
        generator = torch.Generator().manual_seed(config.seed)
        decoder = functional.normalize(torch.randn(config.features, width, generator=generator)).to(device)
        self.parameters = {
            "encoder": decoder.clone(),
            "encoder_bias": torch.zeros(config.features, device=device),
            "decoder": decoder,
            "decoder_bias": torch.zeros(width, device=device),
        }
        if config.architecture == "jumprelu":
            # Where k of all features fire. Kept as a logarithm, so that it stays positive.
            z = self._batch(0) @ decoder.T
            cut = float(
                torch.quantile(z[: max(1, 2_000_000 // config.features)].flatten(), 1 - config.k / config.features)
            )
            self.parameters["threshold"] = torch.full((config.features,), math.log(max(cut, 1e-2)), device=device)
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.rate = config.learning_rate or 2e-4 / math.sqrt(config.features / 2**14)
        self.optimizer = torch.optim.Adam(list(self.parameters.values()), lr=self.rate, betas=(0.9, 0.999))
        self.idle = torch.zeros(config.features, dtype=torch.int64, device=device)
        self.sums = torch.zeros(3, dtype=torch.float64)

    def advance(self) -> None:
        """One step."""
        config, x = self.config, self._batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * _schedule(self.step, config.steps)
        z = x @ self.parameters["encoder"].T + self.parameters["encoder_bias"]
        reconstructed, fired, l0, sparsity = self._topk(z) if config.architecture == "topk" else self._jumprelu(z)
        error = x - reconstructed
        fvu = error.square().sum() / x.square().sum()
        loss = fvu + sparsity + config.aux_weight * self._revived(z, error.detach())
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss isn't finite at step {self.step}; use a smaller learning rate")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._keep_tangent()
        self.optimizer.step()
        with torch.no_grad():
            functional.normalize(self.parameters["decoder"], out=self.parameters["decoder"])
        self.idle = torch.where(fired, 0, self.idle + len(x))
        self.step += 1
        self._record(float(fvu.detach()), float(l0))

    def _batch(self, step: int) -> Tensor:
        """Scaled rows [batch, width]: each epoch has an order of its own, made from the seed."""
        per_epoch = len(self.rows) // self.config.batch
        epoch, place = divmod(step, per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.config.seed, epoch)).permutation(len(self.rows))
        chosen = np.sort(self.order[place * self.config.batch : (place + 1) * self.config.batch])
        x = (np.asarray(self.rows[chosen], np.float32) - self.mean) / self.scale
        return torch.from_numpy(x).to(self.config.device)

    def _topk(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, indices = z.topk(self.config.k, dim=1, sorted=False)
        values = values.relu()
        # A gather: the dense product would cost as much again as the encoder.
        decoded = functional.embedding_bag(indices, self.parameters["decoder"], per_sample_weights=values, mode="sum")
        fired = torch.zeros_like(self.idle, dtype=torch.bool)
        fired[indices[values > 0]] = True
        return decoded + self.parameters["decoder_bias"], fired, (values > 0).sum() / len(z), z.new_zeros(())

    def _jumprelu(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        threshold = self.parameters["threshold"].exp()
        active = cast(Tensor, _Step.apply(z, threshold, self.config.bandwidth))  # type: ignore[no-untyped-call]
        # The threshold's gradient through the activation itself is z times that of the step, at z = threshold.
        a = z * active
        l0 = active.sum() / len(z)
        sparsity = self.config.l0_weight * (l0 / self.config.k - 1).square()
        fired = (active > 0).any(0)
        return a @ self.parameters["decoder"] + self.parameters["decoder_bias"], fired, l0.detach(), sparsity

    def _revived(self, z: Tensor, error: Tensor) -> Tensor:
        """The auxiliary loss; 0 while no feature is dead."""
        dead = self.idle > self.config.dead_after
        count = int(dead.sum())
        if not count or not self.config.aux_weight:
            return z.new_zeros(())
        kept = min(count, max(error.shape[1] // 2, 1))
        values, indices = torch.where(dead, z, -torch.inf).topk(kept, dim=1, sorted=False)
        decoded = functional.embedding_bag(
            indices, self.parameters["decoder"], per_sample_weights=values.relu(), mode="sum"
        )
        unexplained = (error - decoded).square().sum() / error.square().sum().clamp_min(1e-12)
        if self.config.architecture == "topk":
            return unexplained
        short = (self.parameters["threshold"].exp() - z).relu()
        return unexplained + short[:, dead].mean()

    def _keep_tangent(self) -> None:
        """Take the part along each decoder row out of its gradient: it would only change the row's length."""
        decoder = self.parameters["decoder"]
        if decoder.grad is not None:
            decoder.grad -= (decoder.grad * decoder.detach()).sum(1, keepdim=True) * decoder.detach()

    def _record(self, fvu: float, l0: float) -> None:
        self.sums += torch.tensor([fvu, l0, 1.0], dtype=torch.float64)
        every = max(1, self.config.steps // 50)
        if self.step % every == 0 or self.step == self.config.steps:
            total_fvu, total_l0, batches = self.sums.tolist()
            dead = float((self.idle > self.config.dead_after).double().mean())
            self.curve.append(Point(self.step, total_fvu / batches, total_l0 / batches, dead))
            self.sums.zero_()

    def result(self) -> Sae:
        """For activations as they are: mean and scale are folded in."""
        p = {name: value.detach().double().cpu().numpy() for name, value in self.parameters.items()}
        encoder = p["encoder"] / self.scale
        bias = p["encoder_bias"] - encoder @ self.mean.astype(np.float64)
        tensors = {
            "encoder": encoder,
            "encoder_bias": bias,
            "decoder": p["decoder"] * self.scale,
            "decoder_bias": p["decoder_bias"] * self.scale + self.mean,
        }
        threshold = np.exp(p["threshold"]).astype(np.float32) if "threshold" in p else None
        return Sae(
            self.config.architecture,
            **{name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()},
            threshold=threshold,
            k=self.config.k if self.config.architecture == "topk" else None,
        )

    def identity(self) -> str:
        """What a checkpoint must have been made with."""
        some = np.ascontiguousarray(self.rows[:: max(1, len(self.rows) // DIGEST_ROWS)])
        data = hashlib.sha256(some.tobytes()).hexdigest()
        fields = {key: value for key, value in asdict(self.config).items() if key != "device"}
        return json.dumps({**fields, "rows": list(self.rows.shape), "sample": data}, sort_keys=True)

    def save(self, path: Path) -> None:
        """Whole or not at all: written beside, then put in place."""
        tensors = {f"parameter.{name}": value.detach() for name, value in self.parameters.items()}
        for (name, _), state in zip(self.parameters.items(), self.optimizer.state.values(), strict=True):
            tensors |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        tensors |= {"idle": self.idle, "sums": self.sums}
        metadata = {"identity": self.identity(), "step": str(self.step), "curve": json.dumps(self.curve)}
        temporary = path.with_name(path.name + ".part")
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, temporary, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def restore(self, path: Path) -> None:
        with safe_open(path, "pt", device=self.config.device) as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != self.identity():
                raise ValueError(f"{path.name} is the checkpoint of other rows or another configuration; delete it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        self.step = int(metadata["step"])
        self.curve = [Point(*each) for each in json.loads(metadata["curve"])]
        self.idle, self.sums = tensors["idle"], tensors["sums"].cpu()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }


class _Step(torch.autograd.Function):
    """1 where z > threshold. Backward: -1/bandwidth to the threshold within half a bandwidth of it, nothing to z."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        near = (z - threshold).abs() < bandwidth / 2
        ctx.save_for_backward(near)
        ctx.bandwidth = bandwidth  # type: ignore[attr-defined]
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[None, Tensor, None]:
        (near,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, -(grads[0] * near).sum(0) / ctx.bandwidth, None  # type: ignore[attr-defined]


def _moments(rows: Array) -> tuple[Array, float]:
    """Mean [width], and the root mean square of what is left. ValueError for rows that are all the same."""
    some = np.asarray(rows[:: max(1, len(rows) // 100_000)], np.float64)
    mean = some.mean(0)
    scale = float(np.sqrt(((some - mean) ** 2).mean()))
    if not math.isfinite(scale) or scale == 0:
        raise ValueError("the rows must be finite, and not all the same")
    return mean.astype(np.float32), scale


def _schedule(step: int, steps: int) -> float:
    warm, down = max(1, steps // 20), max(1, steps // 5)
    return min(1.0, (step + 1) / warm, (steps - step) / down)
