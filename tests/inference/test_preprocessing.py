"""A run's pictures are read in the same way when its model is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.__main__ import main
from finetune.inference.predict import load_predictor, predict_logits
from finetune.runs.run_dir import RunDir
from finetune.system.errors import DataError
from tests.conftest import Train


def twelve_bits(folder: Path) -> Path:
    """Dark and bright pictures that use 12 of their 16 bits."""
    rng = np.random.default_rng(1)
    for split, number in (("train", 8), ("val", 4)):
        for name, low in (("bright", 2000), ("dark", 0)):
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                values = rng.integers(low, low + 2096, (40, 40)).astype(np.uint16)
                Image.fromarray(values).save(folder / split / name / f"{i}.png")
    return folder


def logits_of(run: RunDir, paths: list[Path]) -> np.ndarray[Any, Any]:
    return np.stack(predict_logits(load_predictor(run.path), paths))  # type: ignore[arg-type]


def test_the_range_of_deep_pictures_is_recorded_and_used_by_predict(
    train: Train, tmp_path: Path
) -> None:
    run = train(data_dir=twelve_bits(tmp_path / "deep"), strategy="freeze", epochs=1)
    bounds = run.read_config().pixel_bounds
    assert bounds is not None
    np.testing.assert_allclose(bounds, (0, 4095), atol=20)
    recorded, _, paths = run.read_predictions()
    np.testing.assert_allclose(logits_of(run, [Path(p) for p in paths]), recorded, atol=1e-5)
    run.config_path.unlink()  # best.ckpt needs no other file
    np.testing.assert_allclose(logits_of(run, [Path(p) for p in paths]), recorded, atol=1e-5)


def test_a_run_with_another_background_predicts_with_it(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "clear"
    for split in ("train", "val"):
        for name, colour in (("a", (255, 0, 0, 90)), ("b", (0, 0, 255, 90))):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGBA", (40, 40), colour).save(folder / split / name / f"{i}.png")
    run = train(data_dir=folder, strategy="freeze", epochs=1, background="#102030")
    recorded, _, paths = run.read_predictions()
    np.testing.assert_allclose(logits_of(run, [Path(p) for p in paths]), recorded, atol=1e-5)
    white = torch.load(run.best_path, weights_only=True) | {"background": "white"}
    torch.save(white, run.best_path)
    assert np.abs(logits_of(run, [Path(p) for p in paths]) - recorded).max() > 1e-3


def test_the_test_pictures_of_one_folder_are_those_that_the_run_kept(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            picture = Image.new("L", (24, 24), level + i)
            picture.save(tmp_path / "pictures" / name / f"{i}.png")
    run = train(data_dir=tmp_path / "pictures", val_fraction="auto", strategy="freeze", epochs=1)
    assert main(["evaluate", str(run.path)]) == 0
    assert " on 4 pictures of " in capsys.readouterr().out
    Image.new("L", (24, 24), 99).save(tmp_path / "pictures/dark/another.png")
    with pytest.raises(DataError, match=r"changed since the run.*pass a labelled folder"):
        main(["evaluate", str(run.path)])
