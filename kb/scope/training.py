"""Fits the light head, or a threshold, on pairs of questions. Minutes on a CPU; needs torch for the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.scope.base import Decider, Text
from kb.scope.cascade import CascadeDecider, Weights, doubted
from kb.scope.cross_encoder import CrossEncoderDecider
from kb.scope.features import features
from kb.scope.head import HeadDecider
from kb.scope.network import LIMIT, Network
from kb.scope.pairs import Encoded, out_of_scope, situations
from kb.scope.space import Space
from kb.scope.threshold import Judged, ThresholdDecider, calibrate
from kb.scope.words import Rarity

PROJECTED = 256
TEMPERATURE = 0.1
UNITS = 24
STEPS = 1500
BATCH = 512
PENALTY = 1e-2
PER_GROUP = 12
"""Situations that are made of each group."""
PER_OTHER = 2
"""Situations that are made of each question out of scope."""
SMALL = 0.3
"""Share of these in small collections, where even the nearest fact may be far away."""
MIN_CENTRED = 20
"""Questions in a language from which on it has a centre of its own."""
HELD_OUT = 0.15
"""Share of the groups that the threshold of the decision is set on."""
READ = 20
"""Situations that a cross-encoder learns from of each group, half of them with the fact."""
FIRST = 0.5
"""Share of these in which the language that the groups begin with is on one side: most facts are in one language."""
MARGIN = 1e-6
"""Log-odds by which the decision lies above a near miss."""
Report = Callable[[str], None]


class Quality(NamedTuple):
    """On held-out questions: those about a fact that were taken to be, with the right one; those that were, with their
    own fact left out; and those out of scope that were, None where there are none.
    """

    recall: float
    false_fires: float
    out_of_scope: float | None


def fit_threshold(encoded: Encoded, encoder: EncoderIdentity, *, false_fires: float, seed: int = 0) -> ThresholdDecider:
    """A threshold for each pair of languages with this share of near misses above it."""
    judged = []
    for each in situations(encoded, per_group=12, seed=seed):
        for candidate, match in zip(each.candidates, each.matches, strict=True):
            cosine = float(candidate.vector @ each.question.vector)
            judged.append(Judged(each.question.language, candidate.language, cosine, bool(match)))
            if not match:
                # Only the nearest near miss can be taken for the fact.
                break
    return calibrate(judged, encoder, false_fires=false_fires)


def fit_head(
    encoded: Encoded, encoder: EncoderIdentity, *, false_fires: float, report: Report, seed: int = 0
) -> HeadDecider:
    """A space, then the network, then the point at which held-out near misses fire in this share of cases.

    What a space has learned by heart would teach the network to trust it, so that each half of the groups is read in
    the space that the other half made; the one that is kept is made of both.
    """
    learned, kept = split(encoded, seed)
    rarity = Rarity.of(text for group in encoded.groups for text, _ in group.questions)
    numbers = np.array_split(np.arange(len(learned.groups)), 2)
    halves = [learned.part(each, learned.out_of_scope) for each in numbers]
    report("learning a space that tells facts apart")
    spaces = [fit_space(each, seed) for each in halves]
    space = fit_space(learned, seed)
    report("reading pairs and their near misses")
    rows, labels = [], []
    for half, other in zip(halves, reversed(spaces), strict=True):
        asked = situations(half, per_group=PER_GROUP, seed=seed, small=SMALL)
        for each in (*asked, *out_of_scope(half, per_question=PER_OTHER, seed=seed, small=SMALL)):
            rows.append(features(each.question, each.candidates, rarity, other))
            labels.append(each.matches)
    report(f"learning the decision from {sum(len(each) for each in rows)} pairs")
    network = fit_network(np.concatenate(rows), np.concatenate(labels), seed)
    near = situations(kept, per_group=2 * PER_GROUP, seed=seed + 1)
    best = [
        float(network(features(each.question, each.candidates, rarity, space)).max())
        for each in near
        if not each.matches.any()
    ]
    bias = -float(np.quantile(best, 1 - false_fires))
    return HeadDecider(encoder, rarity, space, network, bias)


def split(encoded: Encoded, seed: int) -> tuple[Encoded, Encoded]:
    """Groups to learn from, and groups to set the decision on: their near misses, which are nearer than what is out of
    scope."""
    order = np.random.default_rng(seed).permutation(len(encoded.groups))
    held = max(int(HELD_OUT * len(order)), 10)
    return encoded.part(order[:-held], encoded.out_of_scope), encoded.part(order[-held:])


def fit_reader(encoded: Encoded, model: str, *, report: Report, seed: int = 0) -> CrossEncoderDecider:
    """A cross-encoder, from a folder, a hub id or `e5-small`. Hours on a CPU for a large one."""
    reader = CrossEncoderDecider(model)
    # A question whose fact isn't there would only add to the many misses, and where each group has one question in a
    # language, that language's own pairs would all be misses.
    asked = [
        each for each in situations(encoded, per_group=READ, seed=seed, small=SMALL, first=FIRST) if each.matches.any()
    ]
    asked += out_of_scope(encoded, per_question=PER_OTHER, seed=seed, small=SMALL)
    report(f"fine-tuning a cross-encoder on {len(asked)} questions")
    reader.fit(asked, seed=seed, report=report)
    return reader


def fit_cascade(
    kept: Encoded, head: HeadDecider, reader: CrossEncoderDecider, *, false_fires: float, seed: int = 0
) -> CascadeDecider:
    """How the two are weighed, from groups that neither has seen: those that `split` keeps."""
    best, rows, labels = [], [], []
    for each in situations(kept, per_group=2 * PER_GROUP, seed=seed + 1):
        odds = head.log_odds(each.question, each.candidates)
        picked = doubted(odds)
        pair = np.empty((0, 2))
        if len(picked):
            read = reader.log_odds(each.question, [each.candidates[n] for n in picked])
            pair = np.stack([odds[picked], read], axis=1)
            rows.append(pair)
            labels.append(each.matches[picked])
        if not each.matches.any():
            best.append((float(odds.max()), pair))
    read_at_all = np.concatenate(labels) if labels else np.array([], bool)
    # They count alike where there is nothing to weigh them by.
    both = len(set(read_at_all.tolist())) == 2
    weights = fit_weights(np.concatenate(rows), read_at_all) if both else np.ones(2)
    # Where the head is sure, the weights change nothing.
    misses = np.sort([(pair @ weights).max() if len(pair) else np.copysign(np.inf, odds) for odds, pair in best])
    doubtful = misses[np.isfinite(misses)]
    limit = misses[len(misses) - 1 - int(false_fires * len(misses))]
    limit = np.clip(limit, doubtful[0], doubtful[-1]) + MARGIN if len(doubtful) else 0.0
    return CascadeDecider(head, reader, Weights(float(weights[0]), float(weights[1]), -float(limit)))


def fit_weights(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 [columns]: logistic regression on [rows, columns] with an offset, which is left out, by Newton's method.

    A slight penalty keeps it finite where the labels can be told apart.
    """
    x = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    weights, penalty = np.zeros(x.shape[1]), np.diag([0.1] * rows.shape[1] + [1e-6])
    for _ in range(50):
        judged = 1 / (1 + np.exp(-(x @ weights)))
        slope = x.T @ (judged - labels) + penalty @ weights
        bend = (x * (judged * (1 - judged))[:, None]).T @ x + penalty
        weights = weights - np.linalg.solve(bend, slope)
    return weights[:-1]


def quality(decider: Decider, encoded: Encoded, seed: int = 2) -> Quality:
    """What the decider makes of these groups."""
    right, wrong = [], []
    for each in situations(encoded, per_group=12, seed=seed):
        judged = decider.probabilities(each.question, each.candidates)
        fires = judged.max() >= 0.5
        if each.matches.any():
            right.append(fires and each.matches[int(judged.argmax())])
        else:
            wrong.append(fires)
    others = [
        bool(decider.probabilities(each.question, each.candidates).max() >= 0.5)
        for each in out_of_scope(encoded, per_question=PER_OTHER, seed=seed)
    ]
    return Quality(float(np.mean(right)), float(np.mean(wrong)), float(np.mean(others)) if others else None)


def fit_space(encoded: Encoded, seed: int) -> Space:
    rows: dict[str, list[np.ndarray]] = {}
    for group, vectors in zip(encoded.groups, encoded.vectors, strict=True):
        for (_, language), vector in zip(group.questions, vectors, strict=True):
            rows.setdefault(language, []).append(vector)
    languages = tuple(sorted(language for language, found in rows.items() if len(found) >= MIN_CENTRED))
    means = [
        np.mean(np.concatenate(list(encoded.vectors)), axis=0),
        *(np.mean(rows[each], axis=0) for each in languages),
    ]
    space = Space(languages, np.asarray(np.stack(means), np.float32), np.eye(1, dtype=np.float32))
    centred = [
        space.centred(
            [Text(text, language, vector) for (text, language), vector in zip(group.questions, own, strict=True)]
        )
        for group, own in zip(encoded.groups, encoded.vectors, strict=True)
    ]
    return space._replace(projection=fit_projection(centred, seed))


def fit_projection(groups: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """float32 [dimension, PROJECTED] that brings a group's vectors [questions, dimension] together and others apart:
    InfoNCE over batches (van den Oord et al. 2018, equation 4) of two questions of each group.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    random = np.random.default_rng(seed)
    dimension = groups[0].shape[1]
    matrix = torch.empty(dimension, min(PROJECTED, dimension))
    torch.nn.init.orthogonal_(matrix, generator=generator)
    matrix.requires_grad_()
    optimiser = torch.optim.AdamW([matrix], lr=2e-3, weight_decay=1e-2)
    for _ in range(250):
        numbers = random.permutation(len(groups))[:512]
        sizes = np.array([len(groups[n]) for n in numbers])
        first = random.integers(sizes)
        second = (first + random.integers(1, sizes)) % sizes
        one, other = (
            torch.from_numpy(np.stack([groups[n][pick] for n, pick in zip(numbers, picks, strict=True)]))
            for picks in (first, second)
        )
        projected = [torch.nn.functional.normalize(each @ matrix, dim=1) for each in (one, other)]
        logits = projected[0] @ projected[1].T / TEMPERATURE
        truth = torch.arange(len(logits))
        cross_entropy = torch.nn.functional.cross_entropy
        loss = cross_entropy(logits, truth) + cross_entropy(logits.T, truth)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return np.asarray(matrix.detach().numpy())


def fit_network(rows: np.ndarray, labels: np.ndarray, seed: int) -> Network:
    """By cross-entropy on features [pairs, features] and bool [pairs]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    mean, scale = (np.asarray(each, np.float32) for each in (rows.mean(axis=0), rows.std(axis=0) + 1e-3))
    x = torch.from_numpy(np.clip((rows - mean) / scale, -LIMIT, LIMIT).astype(np.float32))
    y = torch.from_numpy(labels.astype(np.float32))
    hidden = torch.randn(x.shape[1], UNITS, generator=generator) / x.shape[1] ** 0.5
    linear, offsets, out, bias = torch.zeros(x.shape[1]), torch.zeros(UNITS), torch.zeros(UNITS), torch.zeros(1)
    learned = [linear, hidden, offsets, out, bias]
    for each in learned:
        each.requires_grad_()
    optimiser = torch.optim.AdamW(learned, lr=5e-3, weight_decay=PENALTY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=STEPS + 1)
    for _ in range(STEPS):
        numbers = torch.randint(len(x), (BATCH,), generator=generator)
        part = x[numbers]
        logits = part @ linear + torch.tanh(part @ hidden + offsets) @ out + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[numbers])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return Network(mean, scale, *(np.asarray(each.detach().numpy()) for each in learned[:-1]))
