"""The head solved on the frozen network's features: multinomial logistic regression by L-BFGS.

The validation loss chooses the L2 penalty, and whether it applies to the weights of standardised
features or of features with one common scale.

Legend: N pictures, D features, K classes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finetune.data.batches import batch_bounds
from finetune.features.loader import EpochLoader
from finetune.features.split_inputs import SplitInputs, network_input
from finetune.model.chain import Chain
from finetune.system.errors import ConfigError

PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(1, -13, -1))
"""From strong to weak; each solution is the start of the next."""

SCALES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "each": lambda deviations: deviations.clamp(min=_LEAST_SHARE * float(deviations.mean())),
    "common": lambda deviations: deviations.square().mean().sqrt().expand_as(deviations),
}
"""The features' divisors, (D,), from their standard deviations, (D,)."""

_LEAST_SHARE = 1e-3
"""A feature that hardly varies in training must not be amplified."""

_NUM_WORSE = 2
"""A path ends once the validation loss has risen this often in a row."""


class Choice(NamedTuple):
    """What the validation loss chooses."""

    penalty: float
    scale: str
    """A key of `SCALES`."""


class Solution(NamedTuple):
    """A linear layer and how it was chosen."""

    weight: Tensor
    """(K, D)."""
    bias: Tensor
    """(K,)."""
    choice: Choice
    val_losses: Tensor
    """Of each validation picture."""

    @property
    def val_loss(self) -> float:
        return float(self.val_losses.mean())


def solve_head(
    chain: Chain,
    loader: EpochLoader,
    precision: Callable[[], AbstractContextManager[Any]],
    class_weights: Tensor | None = None,
    choice: Choice | None = None,
) -> tuple[Choice, str]:
    """Solve the head's last linear layer in place; returns what was chosen and a line about it.

    The network is on its device and in eval mode. Training pictures count once for each flip that
    their augmentation may give. With a `choice` nothing is chosen. Raises `ConfigError` if the head
    doesn't end in a linear layer.
    """
    started = time.perf_counter()
    linear = _last_linear(chain)
    features, labels = _features(chain, linear, loader.train, loader.num_at_once, precision)
    val = _features(chain, linear, loader.val, loader.num_at_once, precision)
    seconds = time.perf_counter() - started
    solution = solve(features, labels, *val, linear.out_features, class_weights, choice)
    with torch.no_grad():
        linear.weight.copy_(solution.weight)
        linear.bias.copy_(solution.bias)
    solving = time.perf_counter() - started - seconds
    found = f", val_loss {solution.val_loss:.3f}" if choice is None else ""
    penalty, scale = solution.choice
    return solution.choice, (
        f"head solved: L2 penalty {penalty:.2g}, scale {scale}{found} "
        f"({solving:.1f} s, features {seconds:.1f} s)"
    )


def solve(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    class_weights: Tensor | None = None,
    choice: Choice | None = None,
) -> Solution:
    """The linear layer of this choice, or of the one that the validation loss makes.

    Features are float32, (N, D), labels int64, (N,). Minimised is the mean cross-entropy plus half
    the penalty times the squared weights; the bias is not penalised. Of all solutions the scale of
    the one with the least validation loss is taken, and its strongest penalty whose loss is within
    one standard error of the least (Breiman et al. 1984, Classification and Regression Trees).
    """
    paths = [
        _path(features, labels, val_features, val_labels, num_classes, class_weights, scale, given)
        for scale, given in ([(choice.scale, (choice.penalty,))] if choice else _ALL)
    ]
    best = min((solution for path in paths for solution in path), key=lambda s: s.val_loss)
    limit = best.val_loss + float(best.val_losses.std(correction=0)) / len(best.val_losses) ** 0.5
    (path,) = (path for path in paths if path[0].choice.scale == best.choice.scale)
    return next(solution for solution in path if solution.val_loss <= limit)


_ALL = tuple((scale, PENALTIES) for scale in SCALES)


def _path(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    class_weights: Tensor | None,
    scale: str,
    penalties: tuple[float, ...],
) -> list[Solution]:
    """The solutions for these penalties, until the validation loss rises."""
    center = features.mean(dim=0)
    divisors = SCALES[scale](features.std(dim=0, correction=0)).clamp(min=1e-12)
    features, val_features = (features - center) / divisors, (val_features - center) / divisors
    weight = features.new_zeros(num_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
    balance = None if class_weights is None else class_weights.to(features)
    path, least, num_worse = list[Solution](), math.inf, 0
    for penalty in penalties:
        _minimise(features, labels, weight, bias, balance, penalty)
        with torch.no_grad():
            logits = val_features @ weight.T + bias
            losses = cross_entropy(logits, val_labels, reduction="none")
            unscaled = weight / divisors
            choice = Choice(penalty, scale)
            path.append(Solution(unscaled, bias - unscaled @ center, choice, losses))
        num_worse = 0 if path[-1].val_loss < least else num_worse + 1
        least = min(least, path[-1].val_loss)
        if num_worse == _NUM_WORSE:
            break
    return path


def _minimise(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    class_weights: Tensor | None,
    penalty: float,
) -> None:
    """Change weight and bias to those of the least penalised loss."""
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=200,
        history_size=10,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(features @ weight.T + bias, labels, weight=class_weights)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]


def _last_linear(chain: Chain) -> nn.Linear:
    head = chain.parts[-1]
    found = [m for module in chain.modules(head) for m in module.modules()]
    linear = [module for module in found if isinstance(module, nn.Linear)]
    if not linear or linear[-1].bias is None:
        raise ConfigError("strategy: the network's head doesn't end in a linear layer with a bias")
    return linear[-1]


@torch.no_grad()
def _features(
    chain: Chain,
    linear: nn.Linear,
    split: SplitInputs,
    num_at_once: int,
    precision: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, Tensor]:
    """The inputs of the linear layer, float32, (N, D), for each of the split's flips; labels."""
    head, inputs = chain.parts[-1], list[Tensor]()
    hook = linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0].float()))
    part = split.last_stored_part(head)
    try:
        for indices, flips in _batches(split, num_at_once):
            batch, still_to_flip = split.batch(part, indices, flips)
            device = linear.weight.device
            if still_to_flip is not None:
                still_to_flip = still_to_flip.to(device)
            with precision():
                x = network_input(batch.to(device), still_to_flip, chain.backbone)
                chain.forward(x, part, None)
    finally:
        hook.remove()
    labels = torch.from_numpy(np.tile(split.pictures.labels, len(split.variants)))
    return torch.cat(inputs), labels.to(linear.weight.device)


def _batches(split: SplitInputs, num_at_once: int) -> Iterator[tuple[Any, Any]]:
    """Indices of all pictures with the flips of each variant, in batches."""
    for is_flipped in split.variants:
        for start, end in batch_bounds(len(split.pictures), num_at_once):
            yield np.arange(start, end), np.full(end - start, is_flipped)
