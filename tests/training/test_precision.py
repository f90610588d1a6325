"""Mixed precision: an overflow of a gradient scaler changes nothing but the scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.plugins import MixedPrecision

from finetune.config.fields import RunConfig
from finetune.features.loader import EpochLoader
from finetune.model.network import build_from
from finetune.runs.resolve import resolve
from finetune.training.module import FineTuning
from finetune.training.train import silence_lightning


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
    silence_lightning()
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


@pytest.mark.parametrize("data_aug", ["y", "strong"])
def test_a_whole_step_leaves_no_tensor_on_the_cpu(data_aug: str, fields: dict[str, Any]) -> None:
    """On the meta device, which refuses to compute with a tensor of the CPU."""
    strong: dict[str, Any] = {"mixup": 0.4, "class_weights": "balanced", "label_smoothing": 0.1}
    given = {"data_aug": data_aug, "strategy": "partial", "lr_schedule": "cosine"}
    config, splits, cache = resolve(RunConfig.from_fields(fields | given | strong))
    chain, _ = build_from(config, 5, print)
    module = FineTuning(chain, config, EpochLoader(config, splits, cache)).to("meta")
    module.open_parts(0)
    optimizer = module.configure_optimizers()["optimizer"]
    module._start_momentum(optimizer)
    batch = next(iter(module.train_dataloader()))
    assert batch.flips is not None or data_aug == "strong"
    loss = module.training_step(move_data_to_device(batch, "meta"), 0)
    loss.backward()
    optimizer.step()
    module.validation_step(move_data_to_device(next(iter(module.val_dataloader())), "meta"), 0)
    states = [value for state in optimizer.state.values() for value in state.values()]
    totals = [value for pairs in module._totals.values() for pair in pairs for value in pair]
    tensors = [*states, *totals, *module.parameters(), *module.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
