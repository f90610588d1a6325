"""The strategy probe: the head is solved on the frozen network's features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch.nn.functional import cross_entropy

from finetune.config.fields import RunConfig
from finetune.config.given_values import advice
from finetune.model.network import load_best
from finetune.runs.result import RunResult
from finetune.runs.run_dir import read_metrics
from finetune.system.errors import ConfigError
from finetune.training.solve_head import PENALTIES, SCALES, Choice, solve
from finetune.training.train import train_and_finetune
from tests.conftest import Train


def features(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three overlapping classes, of different scales; labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, num, p=[0.6, 0.3, 0.1])
    rows = rng.normal(size=(num, 8)) + 1.5 * np.eye(8)[labels] + 3
    return torch.tensor(rows * np.arange(1, 9), dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("is_balanced", [False, True])
def test_the_solution_is_that_of_scikit_learn(is_balanced: bool, scale: str) -> None:
    x, y = features(200, 0)
    weights = len(y) / (3 * torch.bincount(y)) if is_balanced else None
    solution = solve(x, y, *features(50, 1), 3, weights, Choice(0.01, scale))
    assert solution.choice == (0.01, scale)
    regression = LogisticRegression(
        C=1 / (0.01 * len(y)),
        tol=1e-8,
        max_iter=2000,
        class_weight="balanced" if is_balanced else None,
    )
    each = StandardScaler()
    common = FunctionTransformer(
        lambda a: (a - x.numpy().mean(axis=0)) / np.sqrt(x.numpy().var(axis=0).mean())
    )
    expected = make_pipeline(each if scale == "each" else common, regression)
    expected.fit(x.numpy(), y.numpy())
    probabilities = (x @ solution.weight.T + solution.bias).softmax(dim=1)
    np.testing.assert_allclose(probabilities, expected.predict_proba(x.numpy()), atol=1e-3)


def test_the_choice_is_the_strongest_penalty_near_the_least_validation_loss() -> None:
    x, y = features(60, 0)
    val = features(400, 1)
    chosen = solve(x, y, *val, 3)
    each = {
        (penalty, scale): solve(x, y, *val, 3, choice=Choice(penalty, scale))
        for penalty in PENALTIES
        for scale in SCALES
    }
    least = min(each.values(), key=lambda solution: solution.val_loss)
    assert chosen.choice.scale == least.choice.scale
    limit = least.val_loss + float(least.val_losses.std(correction=0)) / len(val[1]) ** 0.5
    near = [p for p in PENALTIES if each[p, chosen.choice.scale].val_loss <= limit]
    assert chosen.choice.penalty == near[0] > least.choice.penalty > PENALTIES[-1]
    logits = val[0] @ chosen.weight.T + chosen.bias
    assert float(cross_entropy(logits, val[1])) == pytest.approx(chosen.val_loss, abs=1e-5)


def test_a_probe_is_a_run_like_any_other(train: Train) -> None:
    run = train(strategy="probe")
    result, (row,) = RunResult.load(run.path), read_metrics(run.metrics_path)
    assert result.epochs_run == 1
    assert result.solved_head is not None
    assert result.solved_head["penalty"] in PENALTIES
    assert result.solved_head["scale"] in SCALES
    assert result.best_val_acc == row["val_acc"] > 0.3
    assert not result.stopped_early
    nulls = [name for name, value in result.config.items() if value is None]
    assert {"epochs", "batch_size", "learning_rate", "momentum", "lr_schedule"} <= set(nulls)
    logits, labels, _ = run.read_predictions()
    assert (logits.argmax(axis=1) == labels).mean() == result.best_val_acc
    assert load_best(run.path).result.solved_head == result.solved_head
    again = train(strategy="probe", seed=7, cache="off")
    assert RunResult.load(again.path).best_val_loss == pytest.approx(row["val_loss"], abs=1e-4)
    flipped = train(strategy="probe", data_aug="n")
    assert RunResult.load(flipped.path).best_val_loss != row["val_loss"]


def test_lp_ft_starts_from_the_probes_head_and_keeps_its_penalty_when_resumed(
    train: Train,
) -> None:
    probe = train(strategy="probe")
    run = train(strategy="lp-ft", epochs=1, keep_last=True, learning_rate=1e-12)
    states = [load_best(r.path).state_dict() for r in (probe, run)]
    heads = [{k: v for k, v in state.items() if k.startswith("fc.")} for state in states]
    assert all(torch.allclose(heads[0][key], heads[1][key]) for key in heads[0])
    resumed = train_and_finetune(resume=run.path, epochs=2).result
    choices = [RunResult.load(r.path).solved_head for r in (probe, run)]
    assert resumed.epochs_run == 2
    assert choices == [resumed.solved_head] * 2


def test_fields_without_a_meaning_are_said_and_strong_augmentation_is_refused() -> None:
    given = {"strategy": "probe", "learning_rate": 0.1, "epochs": 5}
    lines = advice(given, RunConfig.from_fields(given))
    assert lines == ["epochs, learning_rate: no effect with strategy probe; ignored"]
    with pytest.raises(ConfigError, match="data_aug: got strong; probe solves the head"):
        RunConfig.from_fields({"strategy": "probe", "data_aug": "strong"})
