"""Inputs that live on the device give the batches of the host, to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from finetune.config.fields import RunConfig
from finetune.data.batches import Batch, EpochBatches, PrefetchedBatches
from finetune.features import loader as loader_module
from finetune.features.device_memory import DeviceMemory
from finetune.features.loader import EpochLoader
from finetune.features.prefix_cache import PrefixCache
from finetune.model.chain import Chain
from finetune.model.network import build_from
from finetune.runs.resolve import resolve
from finetune.system.array_store import Cache
from finetune.training.module import FineTuning
from finetune.training.train import make_trainer
from tests.features.test_prefix_cache import prepared, unprepared

CPU = torch.device("cpu")


def epochs(loader: EpochLoader) -> list[Batch]:
    return [
        batch
        for epoch in (0, 1)
        for batches in (loader.train_epoch(epoch), loader.val_epoch(epoch))
        for batch in batches
    ]


def assert_equal(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected)
    for batch, other in zip(ours, expected, strict=True):
        assert batch.part == other.part
        for name in ("inputs", "flips", "labels"):
            value, wanted = getattr(batch, name), getattr(other, name)
            assert (value is None) == (wanted is None), name
            assert value is None or (value.dtype == wanted.dtype and torch.equal(value, wanted))
        assert str(batch.augmentation) == str(other.augmentation)


@pytest.mark.parametrize(
    ("strategy", "data_aug", "resident"),
    [
        ("freeze", "y", "fc"),
        ("freeze", "n", "fc"),
        ("gradual", "y", "layer4"),
        ("scratch", "y", "stem"),
        ("partial", "strong", "stem"),
    ],
)
def test_batches_gathered_on_the_device_equal_those_of_the_host(
    strategy: str, data_aug: str, resident: str, fields: dict[str, Any]
) -> None:
    given = {"strategy": strategy, "data_aug": data_aug, "epochs": 40, "unfreeze_every": 1}
    loader = prepared(RunConfig.from_fields(fields | given))
    host = epochs(loader)
    loader.memory = DeviceMemory(CPU, math.inf, print)
    assert_equal(epochs(loader), host)
    held = loader.train.resident
    assert list(held) == [host[-1].part]
    if strategy != "gradual":  # what it has stored there depends on the machine's speed
        assert list(held) == [resident]


def test_what_does_not_fit_is_read_from_the_host_and_said_once(
    fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    loader = prepared(RunConfig.from_fields(fields | {"strategy": "scratch"}))
    host = epochs(loader)
    train_bytes = len(loader.train.pictures) * 64 * 64 * 3
    loader.memory = DeviceMemory(CPU, train_bytes + 1.0, print)
    assert_equal(epochs(loader), host)
    assert (len(loader.train.resident), len(loader.val.resident)) == (1, 0)
    assert capsys.readouterr().out.count("for val/ need") == 1


def test_a_full_device_is_no_error(
    fields: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    loader = prepared(RunConfig.from_fields(fields | {"strategy": "freeze"}))
    host = epochs(loader)
    loader.memory = DeviceMemory(CPU, math.inf, print)
    monkeypatch.setattr(torch, "empty", full)
    assert_equal(epochs(loader), host)
    assert capsys.readouterr().out.count("they are copied in each epoch") == 2


def test_memory_that_runs_out_in_a_step_is_taken_from_the_inputs(
    fields: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.from_fields(fields | {"strategy": "scratch"})
    loader, chain = unprepared(config)
    module, host = FineTuning(chain, config, loader).eval(), epochs(loader)
    expected = module(host[0])
    loader.memory = DeviceMemory(CPU, math.inf, print)
    assert_equal(epochs(loader)[:1], host[:1])
    original = chain.logits

    def limited(*given: Any) -> torch.Tensor:
        if loader.train.resident:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*given)

    monkeypatch.setattr(chain, "logits", limited)
    assert torch.equal(module(host[0]), expected)
    assert capsys.readouterr().out.count("GPU memory: it is used up") == 1
    assert_equal(epochs(loader), host)
    assert not loader.train.resident and not loader.val.resident


@pytest.mark.parametrize(("fraction", "is_resident"), [(0.5, True), (0.001, False), (0.0, False)])
def test_on_cuda_the_fraction_decides_between_resident_and_prefetched_inputs(
    fraction: float, is_resident: bool, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "free_bytes", lambda: 1e7)
    given = {"strategy": "scratch", "gpu_cache_fraction": fraction}
    config, splits, _ = resolve(RunConfig.from_fields(fields | given))
    chain, _ = build_from(config, 5, print)
    config = config.model_copy(update={"accelerator": "cuda"})
    cache = Cache(config.cache_dir, 1e9)
    loader = EpochLoader(config, splits, cache)
    loader.prepare(chain, 0)
    assert loader.memory.limit_bytes == fraction * 1e7
    assert isinstance(loader.train_epoch(0), EpochBatches if is_resident else PrefetchedBatches)
    assert isinstance(loader.val_epoch(0), EpochBatches if is_resident else PrefetchedBatches)


@pytest.mark.parametrize("kind", ["resident", "prefetched"])
def test_a_training_has_the_weights_of_one_with_batches_of_the_host(
    kind: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrefixCache, "_saves_time", lambda *given: True)
    given = {"strategy": "gradual", "epochs": 3, "precision": "32-true"}
    config = RunConfig.from_fields(fields | given)
    expected = trained_weights(*unprepared(config), config, tmp_path)
    loader, chain = unprepared(config)
    if kind == "resident":
        loader.memory = DeviceMemory(CPU, math.inf, print)
    else:
        monkeypatch.setattr(loader, "_on_gpu", lambda b, split: PrefetchedBatches(b, False))
    weights = trained_weights(loader, chain, config, tmp_path)
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert bool(loader.train.resident) == (kind == "resident")


def trained_weights(
    loader: EpochLoader, chain: Chain, config: RunConfig, place: Path
) -> dict[str, torch.Tensor]:
    trainer = make_trainer(config, place, pl.Callback(), max_epochs=config.epochs)
    trainer.fit(FineTuning(chain, config, loader))
    return dict(chain.network.state_dict())


def test_without_a_cache_pictures_are_decoded_each_time(fields: dict[str, Any]) -> None:
    loader = prepared(RunConfig.from_fields(fields | {"cache": "off"}))
    loader.memory = DeviceMemory(CPU, math.inf, print)
    assert len(epochs(loader)) and not loader.train.resident


def test_prefetched_batches_are_the_same_in_the_same_order(fields: dict[str, Any]) -> None:
    batches = prepared(RunConfig.from_fields(fields)).train_epoch(0)
    assert isinstance(batches, EpochBatches)
    prefetched = PrefetchedBatches(batches, is_pinned=False)
    assert len(prefetched) == len(batches) > 1
    assert_equal(list(prefetched), list(batches))


def test_an_error_in_the_prefetching_thread_is_raised(fields: dict[str, Any]) -> None:
    batches = prepared(RunConfig.from_fields(fields)).train_epoch(0)
    assert isinstance(batches, EpochBatches)

    def fetch(indices: Any) -> Any:
        if batches.order[-1] in np.asarray(indices):
            raise OSError("the last batch")
        return batches.fetch(indices)

    broken = EpochBatches(batches.pictures, batches.order, 5, batches.part, fetch)
    with pytest.raises(OSError, match="the last batch"):
        list(PrefetchedBatches(broken, is_pinned=False))
