"""Zips shaped as public sets of photographs: `download --url` makes a data_dir that runs use."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.__main__ import main
from finetune.datasets import download as module
from finetune.inference.evaluate import evaluate
from finetune.runs.result import RunResult
from finetune.system.errors import DataError
from tests.conftest import carry_out
from tests.support.file_server import serve
from tests.support.picture_trees import jpeg, zipped


def photographs(classes: tuple[str, ...], **counts: int) -> dict[str, bytes]:
    """JPEGs by SPLIT/CLASS/FILE, so many a class in each split."""
    numbered = [
        f"{split}/{name}/{number}.jpg"
        for split, count in counts.items()
        for name in classes
        for number in range(count)
    ]
    return {name: jpeg(seed) for seed, name in enumerate(numbered)}


def placeholder() -> bytes:
    """A GIF as Flickr sends it in place of a photograph that was removed."""
    out = io.BytesIO()
    Image.new("P", (30, 30), 7).save(out, "GIF")
    return out.getvalue()


HYMENOPTERA = photographs(("ants", "bees"), train=4, val=2) | {
    "train/ants/imageNotFound.gif": placeholder()
}
CLOTHING = photographs(("dress", "t-shirt"), train=4, validation=2, test=2) | {
    "README.md": b"# Clothing dataset",
    "LICENSE": b"CC0",
    ".gitignore": b"*.zip",
}


@pytest.fixture
def get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Download a zip by the command line; the data_dir."""

    def download(files: dict[str, bytes], root: str) -> Path:
        data_dir = tmp_path / "data" / "mine"
        monkeypatch.setattr(module, "fetch_weights", lambda url: None)
        with serve(zipped(files, root)) as server:
            assert not main(["download", "--url", server.url, "--data_dir", str(data_dir)])
            before = len(server.requests)
            assert not main(["download", "--url", server.url, "--data_dir", str(data_dir)])
            assert len(server.requests) == before, "it was downloaded twice"
        return data_dir

    return download


def run_on(data_dir: Path, fields: dict[str, Any]) -> RunResult:
    given = fields | {"data_dir": data_dir, "val_fraction": "auto", "epochs": 1, "image_size": 32}
    return RunResult.load(carry_out(**given, strategy="freeze").path)


def test_the_tutorial_s_ants_and_bees(
    get: Any, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = get(HYMENOPTERA, "hymenoptera_data/")
    printed = capsys.readouterr().out
    assert "2 classes; pictures: train/ 9, val/ 4" in printed
    assert f"next: python -m finetune best {data_dir} --minutes 15" in printed
    result = run_on(data_dir, fields)
    assert (result.num_train, result.num_val) == (7, 2)  # a fifth of train/, the GIF in it
    assert evaluate(result.run_dir) == 0
    printed = capsys.readouterr().out
    assert f"on 4 pictures of {data_dir / 'val'}" in printed
    assert not main(["check", "--data_dir", str(data_dir)])
    assert "files: .jpg JPEG 12, .gif GIF 1" in capsys.readouterr().out


def test_a_broken_file_in_it_is_named_by_check_and_run(
    get: Any, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"train/ants/imageNotFound.gif": b"<html>404 Not Found</html>"}
    data_dir = get(HYMENOPTERA | broken, "hymenoptera_data/")
    assert main(["check", "--data_dir", str(data_dir)]) == 1
    assert "train/ants/imageNotFound.gif" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"imageNotFound\.gif.*skip_unreadable"):
        run_on(data_dir, fields)
    result = run_on(data_dir, fields | {"skip_unreadable": True})
    assert result.num_train + result.num_val == 8
    assert result.unreadable == ["train/ants/imageNotFound.gif"]


def test_the_clothing_set_s_github_archive(
    get: Any, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = get(CLOTHING, "clothing-dataset-small-master/")
    assert sorted(path.name for path in data_dir.iterdir()) == [
        *("manifest.json", "test", "train", "validation")
    ]
    assert "2 classes; pictures: test/ 4, train/ 8, validation/ 4" in capsys.readouterr().out
    result = run_on(data_dir, fields)
    assert (result.num_train, result.num_val) == (8, 4)  # its own validation pictures validate
    assert "validation/ is read as val/" in capsys.readouterr().out
    assert evaluate(result.run_dir) == 0
    assert f"on 4 pictures of {data_dir / 'test'}" in capsys.readouterr().out


def test_training_and_test_pictures_alone(get: Any, fields: dict[str, Any]) -> None:
    data_dir = get(photographs(("a", "b"), Training=5, Testing=2), "set/")
    result = run_on(data_dir, fields)
    assert (result.num_train, result.num_val) == (8, 2)
