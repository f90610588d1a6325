"""`show`: the pictures that it draws are those that a training step gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.__main__ import main
from finetune.config.fields import RunConfig
from finetune.runs.resolve import resolve
from finetune.system.errors import FinetuneError
from finetune.training.module import FineTuning
from finetune.training.show import training_pictures
from tests.test_agent import as_flags


@pytest.mark.parametrize("changed", [{"data_aug": "y"}, {"data_aug": "strong"}, {"mixup": 0.4}])
def test_the_pictures_are_the_inputs_of_the_first_training_step(
    changed: dict[str, Any], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.training import train

    config = RunConfig.from_fields(fields | changed | {"strategy": "scratch", "epochs": 1})
    seen: list[torch.Tensor] = []
    forward = FineTuning.forward

    def recorded(self: Any, batch: Any, mix: Any = None) -> torch.Tensor:
        original = self.chain.forward
        self.chain.forward = lambda x, *parts: (seen.append(x), original(x, *parts))[1]
        try:
            return forward(self, batch, mix)
        finally:
            self.chain.forward = original

    monkeypatch.setattr(FineTuning, "forward", recorded)
    train.train_and_finetune(**config.to_fields())
    shown, line = training_pictures(config, 5)
    backbone = resolve(config)[0].backbone
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (backbone.mean, backbone.std))
    first = np.clip(np.round((seen[0].numpy() * std + mean) * 255), 0, 255)
    pictures = np.stack([one.picture for one in shown]).transpose(0, 3, 1, 2)
    assert np.abs(first - pictures).max() <= 1
    assert "batches of 5 x 3 x 64 x 64, values" in line
    assert all("%" in one.label for one in shown) == ("mixup" in changed)


def test_show_writes_a_grid_with_the_classes(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.png"
    assert not main(["show", f"--file={path}", "--num_pictures=6", *as_flags(fields)])
    with Image.open(path) as image:
        assert image.size == (4 * 70 + 6, 2 * 84)
    assert "6 training pictures of epoch 0" in capsys.readouterr().out
    with pytest.raises(FinetuneError, match="can't be written"):
        main(["show", f"--file={tmp_path / 'none' / 'grid.png'}", *as_flags(fields)])
