"""The cache of activations: it changes the time of a run, not its numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finetune
from finetune.config.fields import RunConfig
from finetune.features import prefix_cache
from finetune.features.device_memory import DeviceMemory
from finetune.features.loader import EpochLoader
from finetune.features.prefix_cache import PrefixCache
from finetune.model.chain import Chain
from finetune.model.network import build_from
from finetune.runs.resolve import resolve
from finetune.runs.result import RunResult
from finetune.runs.run_dir import read_metrics
from finetune.system.errors import ConfigError, FinetuneError
from tests.conftest import Train
from tests.support.tiny_network import tiny

COMPARED = ("train_loss", "train_acc", "val_loss", "val_acc")


def unprepared(config: RunConfig) -> tuple[EpochLoader, Chain]:
    config, splits, cache = resolve(config)
    chain, _ = build_from(config, 5, print)
    chain.network.eval()
    return EpochLoader(config, splits, cache), chain


def prepared(config: RunConfig) -> EpochLoader:
    loader, chain = unprepared(config)
    loader.prepare(chain, 0)
    return loader


STRATEGIES = [
    ("freeze", "n"),
    ("freeze", "y"),
    ("partial", "y"),
    ("gradual", "y"),
    ("scratch", "n"),
]


@pytest.mark.parametrize(("strategy", "data_aug"), STRATEGIES)
def test_cold_and_warm_caches_give_equal_bits_and_no_cache_the_same_within_1e_6(
    strategy: str, data_aug: str, train: Train
) -> None:
    check_caches(strategy, data_aug, train)


@pytest.mark.slow
@pytest.mark.real_network
@pytest.mark.parametrize(("strategy", "data_aug"), STRATEGIES[1:4])
def test_caches_of_resnet18_give_equal_bits_and_no_cache_the_same_within_1e_6(
    strategy: str, data_aug: str, train: Train
) -> None:
    check_caches(strategy, data_aug, train)


def check_caches(strategy: str, data_aug: str, train: Train) -> None:
    runs = [
        read_metrics(train(strategy=strategy, data_aug=data_aug, cache=cache).metrics_path)
        for cache in ("off", "auto", "auto")
    ]
    uncached, cold, warm = ([[row[k] for k in COMPARED] for row in rows] for rows in runs)
    assert cold == warm
    np.testing.assert_allclose(uncached, cold, atol=1e-6, rtol=0)


def test_float16_takes_half_the_disk_space_and_gives_nearly_the_same_losses(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, sizes = [], []
    for cache_format in ("float32", "float16"):
        place = tmp_path / cache_format
        run_dir = train(strategy="freeze", cache_format=cache_format, cache_dir=place)
        rows.append([row["val_loss"] for row in read_metrics(run_dir.metrics_path)])
        stored = [np.load(path) for path in place.glob("activations-*/data.npy")]
        sizes.append(sum(array.nbytes for array in stored))
    assert sizes[0] == 2 * sizes[1]
    assert rows[0] != rows[1]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-2)
    assert capsys.readouterr().out.count("not exact") == 1


@pytest.mark.parametrize("strategy", ["freeze", "partial"])
def test_with_mixed_precision_activations_are_stored_as_they_are_computed(
    strategy: str, train: Train, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"strategy": strategy, "precision": "bf16-mixed", "epochs": 8}
    runs = [train(cache=cache, **given) for cache in ("off", "auto", "auto")]
    rows = [[[row[k] for k in COMPARED] for row in read_metrics(r.metrics_path)] for r in runs]
    assert rows[1] == rows[2]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-2)
    stored = [np.load(path) for path in (tmp_path / "cache").glob("activations-*/data.npy")]
    assert stored or strategy == "partial"  # which depends on the machine's speed
    assert {array.itemsize for array in stored} <= {2}


def test_activations_too_large_for_float16_are_refused(
    train: Train, weights: Path, tmp_path: Path
) -> None:
    state = torch.load(weights, weights_only=True)
    (last, *_) = (key for key in reversed(state) if key.endswith("bn2.weight"))
    state[last] = state[last] * 1e7
    torch.save(state, tmp_path / "large.pth")
    with pytest.raises(ConfigError, match="pass float32"):
        train(strategy="freeze", cache_format="float16", weights=tmp_path / "large.pth")


@pytest.mark.real_network
def test_freeze_trains_on_512_features_per_picture(fields: dict[str, Any]) -> None:
    config = RunConfig.from_fields(fields | {"strategy": "freeze"})
    batch = prepared(config).train_epoch(0)[0]
    assert batch.part == "fc"
    assert batch.inputs.shape == (5, 512)


def test_gradual_moves_to_the_next_boundary_as_it_unfreezes(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrefixCache, "_time_one_picture", lambda *_: (10.0, 0.1))
    config = RunConfig.from_fields(fields | {"strategy": "gradual", "epochs": 40})
    loader = prepared(config)
    parts = [loader.train_epoch(epoch)[0].part for epoch in (0, 3, 39)]
    assert parts == ["fc", "layer2", "layer2"]


def test_mixup_mixes_pictures_and_therefore_reads_no_activations(fields: dict[str, Any]) -> None:
    loader = prepared(RunConfig.from_fields(fields | {"strategy": "freeze", "mixup": 0.2}))
    assert loader.train_epoch(0)[0].part == "stem"


def test_strong_augmentation_reads_pictures_instead_of_activations(fields: dict[str, Any]) -> None:
    loader = prepared(RunConfig.from_fields(fields | {"data_aug": "strong"}))
    batch = loader.train_epoch(0)[0]
    assert (batch.part, batch.inputs.dtype) == ("stem", torch.uint8)
    assert not torch.equal(batch.inputs, loader.train_epoch(1)[0].inputs)
    assert torch.equal(batch.inputs, loader.train_epoch(0)[0].inputs)


def test_a_second_run_computes_no_activations(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(strategy="freeze")
    before = {path: path.stat().st_ino for path in (tmp_path / "cache").glob("*-*")}
    assert len(before) == 2 + 3  # pictures of two folders; training plain and flipped, validation
    train(strategy="freeze", batch_size=4, learning_rate=0.1, seed=1)
    assert {path: path.stat().st_ino for path in (tmp_path / "cache").glob("*-*")} == before


@pytest.mark.parametrize("change", ["weights", "picture", "image_size"])
def test_a_change_of_what_activations_depend_on_makes_a_new_entry(
    change: str, fields: dict[str, Any], tmp_path: Path, digits: Path
) -> None:
    import shutil

    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    config = RunConfig.from_fields(fields | {"strategy": "freeze", "data_dir": folder})
    before = prepared(config).train_epoch(0)[0].inputs
    if change == "weights":
        state = tiny(5, seed=3).state_dict()
        torch.save(state, tmp_path / "other.pth")
        config = config.model_copy(update={"weights": str(tmp_path / "other.pth")})
    elif change == "image_size":
        config = config.model_copy(update={"image_size": 48})
    else:
        for path in (folder / "train").glob("*/*.png"):
            times = path.stat()
            other = next(p for p in sorted(path.parent.iterdir()) if p != path)
            content = other.read_bytes()
            path.write_bytes(
                content.ljust(times.st_size, b"\0")[: max(times.st_size, len(content))]
            )
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = prepared(config).train_epoch(0)[0].inputs
    assert not torch.equal(before, after)


def test_both_timings_of_a_boundary_are_recorded(train: Train) -> None:
    result = RunResult.load(train(strategy="partial").path)
    assert set(result.prefix_timings) == {"layer3/recompute_ms", "layer3/read_ms"}
    assert all(value > 0 for value in result.prefix_timings.values())


def test_activations_that_the_memory_cannot_hold_are_timed_from_the_disk(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: dropped.append(given))
    train(strategy="partial", epochs=1)
    assert not dropped
    monkeypatch.setattr(prefix_cache, "free_memory", lambda: 0)
    train(strategy="partial", epochs=1, image_size=48)
    assert [given[1:] for given in dropped] == [(0, 0, os.POSIX_FADV_DONTNEED)]


@pytest.mark.parametrize("is_on_device", [True, False])
def test_activations_on_the_device_are_read_once(
    is_on_device: bool, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then they are stored although reading takes longer than computing."""
    monkeypatch.setattr(PrefixCache, "_time_one_picture", lambda self, is_cold: (1.0, 2.0))
    loader, chain = unprepared(
        RunConfig.from_fields(fields | {"strategy": "partial", "epochs": 30})
    )
    if is_on_device:
        loader.memory = DeviceMemory(torch.device("cpu"), 1e9, print)
    loader.prepare(chain, 0)
    assert list(loader.train.stored) == (["layer3"] if is_on_device else [])


def test_a_lack_of_memory_for_activations_does_not_name_the_batch_size(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(PrefixCache, "_activations", full)
    with pytest.raises(
        FinetuneError, match=r"128 pictures at once were computed up to fc.*--cache"
    ):
        train(strategy="freeze")


def test_a_run_continues_without_a_cache_if_disk_space_is_short(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    with_cache = train(strategy="freeze")
    without = train(strategy="freeze", cache_gb=0.0001, cache_dir=with_cache.path / "small")
    assert "continuing without" in capsys.readouterr().out
    for ours, theirs in zip(
        read_metrics(with_cache.metrics_path), read_metrics(without.metrics_path), strict=True
    ):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-6)


def test_a_resumed_run_prepares_only_the_activations_of_the_epochs_that_are_left(
    train: Train, tmp_path: Path
) -> None:
    run = train(strategy="gradual", epochs=3, keep_last=True)
    before = set((tmp_path / "cache").iterdir())
    finetune.train_and_finetune(resume=run.path, epochs=4)
    timed = {name.partition("/")[0] for name in RunResult.load(run.path).prefix_timings}
    assert timed <= {"layer2"}
    made = set((tmp_path / "cache").iterdir()) - before
    assert len(made) in (0, 3)  # of one boundary: training plain and flipped, validation
