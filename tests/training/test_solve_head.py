"""The strategy probe: the head is solved on the frozen network's features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import cross_entropy

from finetune.config.fields import RunConfig
from finetune.config.given_values import advice
from finetune.model.network import load_best
from finetune.runs.result import RunResult
from finetune.runs.run_dir import read_metrics
from finetune.system.errors import ConfigError
from finetune.training.solve_head import PENALTIES, solve
from finetune.training.train import train_and_finetune
from tests.conftest import Train


def features(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three overlapping classes, of different scales; labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, num, p=[0.6, 0.3, 0.1])
    rows = rng.normal(size=(num, 8)) + 1.5 * np.eye(8)[labels] + 3
    return torch.tensor(rows * np.arange(1, 9), dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("is_balanced", [False, True])
def test_the_solution_is_that_of_scikit_learn(is_balanced: bool) -> None:
    x, y = features(200, 0)
    weights = len(y) / (3 * torch.bincount(y)) if is_balanced else None
    solution = solve(x, y, *features(50, 1), 3, weights, penalties=(0.01,))
    regression = LogisticRegression(
        C=1 / (0.01 * len(y)), tol=1e-8, class_weight="balanced" if is_balanced else None
    )
    expected = make_pipeline(StandardScaler(), regression).fit(x.numpy(), y.numpy())
    probabilities = (x @ solution.weight.T + solution.bias).softmax(dim=1)
    np.testing.assert_allclose(probabilities, expected.predict_proba(x.numpy()), atol=1e-3)


def test_the_penalty_has_the_least_validation_loss() -> None:
    x, y = features(60, 0)
    val = features(400, 1)
    chosen = solve(x, y, *val, 3)
    each = [solve(x, y, *val, 3, penalties=(penalty,)).val_loss for penalty in PENALTIES]
    assert chosen.penalty == PENALTIES[int(np.argmin(each))]
    assert chosen.val_loss == pytest.approx(min(each), abs=1e-3)
    logits = val[0] @ chosen.weight.T + chosen.bias
    assert float(cross_entropy(logits, val[1])) == pytest.approx(chosen.val_loss, abs=1e-5)
    assert PENALTIES[0] > chosen.penalty > PENALTIES[-1]


def test_a_probe_is_a_run_like_any_other(train: Train) -> None:
    run = train(strategy="probe")
    result, (row,) = RunResult.load(run.path), read_metrics(run.metrics_path)
    assert result.epochs_run == 1
    assert result.head_penalty in PENALTIES
    assert result.best_val_acc == row["val_acc"] > 0.3
    assert not result.stopped_early
    nulls = [name for name, value in result.config.items() if value is None]
    assert {"epochs", "batch_size", "learning_rate", "momentum", "lr_schedule"} <= set(nulls)
    logits, labels, _ = run.read_predictions()
    assert (logits.argmax(axis=1) == labels).mean() == result.best_val_acc
    assert load_best(run.path).result.head_penalty == result.head_penalty
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
    penalties = [RunResult.load(r.path).head_penalty for r in (probe, run)]
    assert resumed.epochs_run == 2
    assert len({*penalties, resumed.head_penalty}) == 1


def test_fields_without_a_meaning_are_said_and_strong_augmentation_is_refused() -> None:
    given = {"strategy": "probe", "learning_rate": 0.1, "epochs": 5}
    lines = advice(given, RunConfig.from_fields(given))
    assert lines == ["epochs, learning_rate: no effect with strategy probe; ignored"]
    with pytest.raises(ConfigError, match="data_aug: got strong; probe solves the head"):
        RunConfig.from_fields({"strategy": "probe", "data_aug": "strong"})
