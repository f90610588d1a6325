"""Mixed precision: an overflow of a gradient scaler changes nothing but the scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision

from finetune.config.fields import RunConfig
from finetune.features.loader import EpochLoader
from finetune.model.network import build_from
from finetune.runs.resolve import resolve
from finetune.training.module import FineTuning
from finetune.training.train import _silence_lightning


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not set holds huge numbers, as it may on a GPU."""
    original = torch.empty_like

    def empty_like(*arguments: Any, **options: Any) -> torch.Tensor:
        made = original(*arguments, **options)
        return made.fill_(1e20) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty_like", empty_like)


def trained(fields: dict[str, Any], scale: float | None, place: Path) -> dict[str, Any]:
    """The network's weights after a training with a gradient scaler, or without one."""
    config, splits, cache = resolve(RunConfig.from_fields(fields))
    chain, _ = build_from(config, 5, print)
    _silence_lightning()
    module = FineTuning(chain, config, EpochLoader(config, splits, cache))
    plugins: list[Any] = []
    if scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer = pl.Trainer(
        max_epochs=config.epochs, accelerator="cpu", logger=False, plugins=plugins,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        num_sanity_val_steps=0, reload_dataloaders_every_n_epochs=1, default_root_dir=place,
    )  # fmt: skip
    trainer.fit(module)
    return {key: value.clone() for key, value in chain.network.state_dict().items()}


@pytest.mark.parametrize("strategy", ["partial", "gradual"])
def test_an_overflow_at_the_first_steps_leaves_no_garbage_in_momentum(
    strategy: str, fields: dict[str, Any], tmp_path: Path, poisoned_memory: None
) -> None:
    settings = fields | {"strategy": strategy, "data_aug": "n"}
    weights = trained(settings, 2.0**20, tmp_path)  # about every second step overflows
    plain = trained(settings, None, tmp_path)
    for key, value in weights.items():
        assert torch.isfinite(value).all(), key
        assert value.abs().max() <= 2 * plain[key].abs().max() + 1, key
