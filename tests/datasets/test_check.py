from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.__main__ import main
from finetune.config.fields import RunConfig
from finetune.data.splits import find_splits
from finetune.datasets.check import check, examine
from finetune.system.errors import DataError
from tests.support.picture_trees import jpeg, tree


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write(tmp_path / "data", tree())


def found_in(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = check(data_dir, as_json=True)
    return code, json.loads(capsys.readouterr().out)


def test_a_good_data_set_has_no_findings(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = found_in(data_dir, capsys)
    assert code == 0
    assert not found["breaks_a_run"]
    assert found["counts"] == {"train": {"Aves": 3, "Fungi": 3}, "val": {"Aves": 2, "Fungi": 2}}
    assert found["modes"] == {"RGB": 10}
    assert found["sizes"] == {"width": [24, 24, 24], "height": [18, 18, 18]}
    assert found["imbalance"] == {"train": 1.0, "val": 1.0}
    assert not (found["faults"] or found["unreadable"] or found["repeated"] or found["ignored"])


def plant(data_dir: Path) -> dict[str, bytes]:
    """Write unreadable files of every kind; return them by name."""
    whole = jpeg(1000, (64, 64))
    planted = {
        "train/Aves/cut.jpg": whole[: len(whole) // 2],
        "train/Aves/cut at its end.jpg": whole[:-2],
        "train/Fungi/empty.jpg": b"",
        "val/Aves/text.png": b"this is no picture",
        "val/Fungi/page.jpg": b"<html>404</html>",
    }
    write(data_dir, planted)
    return planted


def test_all_unreadable_and_repeated_pictures_are_found(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = plant(data_dir)
    first = tree()["train/Aves/000.jpg"]
    write(data_dir, {"val/Aves/leak.jpg": first, "train/Fungi/label.jpg": first})
    code, found = found_in(data_dir, capsys)
    assert code == 1
    assert found["unreadable"].keys() == planted.keys()
    for name, reason in found["unreadable"].items():
        assert str(data_dir / name) in reason
    assert found["faults"] == []
    assert found["repeated"] == [
        {
            "files": ["train/Aves/000.jpg", "train/Fungi/label.jpg", "val/Aves/leak.jpg"],
            "in_several_splits": True,
            "under_several_classes": True,
            "same_bytes": True,
        }
    ]


def test_the_same_pixels_in_another_format_are_the_same_picture(data_dir: Path) -> None:
    pixels = Image.open(io.BytesIO(tree()["train/Aves/000.jpg"])).convert("RGB")
    pixels.save(data_dir / "val/Aves/copy.png")
    (found,) = examine(data_dir).repeated
    assert found["files"] == ["train/Aves/000.jpg", "val/Aves/copy.png"]
    assert found["same_bytes"] is False


def test_black_pictures_of_different_sizes_are_not_the_same(data_dir: Path) -> None:
    Image.new("RGB", (30, 20)).save(data_dir / "train/Aves/black.png")
    Image.new("RGB", (20, 30)).save(data_dir / "val/Aves/black.png")
    assert examine(data_dir).repeated == []


def test_a_copy_within_one_class_of_one_split_is_not_reported(data_dir: Path) -> None:
    write(data_dir, {"train/Aves/again.jpg": tree()["train/Aves/000.jpg"]})
    assert examine(data_dir).repeated == []


def test_a_picture_in_two_splits_is_a_warning_and_stops_no_run(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data_dir, {"val/Aves/leak.jpg": tree()["train/Aves/000.jpg"]})
    assert check(data_dir) == 0
    assert "several splits: train/Aves/000.jpg = val/Aves/leak.jpg" in capsys.readouterr().out


def test_all_folders_that_stop_a_run_are_listed(data_dir: Path) -> None:
    (data_dir / "train/Empty").mkdir()
    write(data_dir, {"val/Only/1.jpg": jpeg(2000)})
    faults = examine(data_dir).faults
    assert len(faults) == 3
    assert "train/Empty is a class without pictures" in faults
    assert "class 'Empty' is in train/ but not in val/" in faults
    assert "class 'Only' is in val/ but not in train/" in faults


def test_too_few_pictures_to_validate_are_a_fault_in_check_and_in_a_run(tmp_path: Path) -> None:
    write(tmp_path, tree(train=2))
    (fault,) = examine(tmp_path).faults
    assert "fewer than 3 pictures in each class" in fault
    with pytest.raises(DataError, match="leaves none to validate"):
        find_splits(RunConfig(data_dir=tmp_path))
    write(tmp_path, {"train/Aves/more.jpg": jpeg(3000)})
    assert examine(tmp_path).faults == []
    assert len(find_splits(RunConfig(data_dir=tmp_path)).val) == 1


def test_a_class_without_readable_pictures_is_a_fault(data_dir: Path) -> None:
    write(data_dir, {f"val/Fungi/{number:03d}.jpg": b"" for number in range(2)})
    found = examine(data_dir)
    assert found.faults == ["val/Fungi has no readable picture"]
    assert len(found.unreadable) == 2


def test_a_readable_picture_in_a_subfolder_counts_for_its_class(data_dir: Path) -> None:
    write(data_dir, {"val/Fungi/000.jpg": b"", "val/Fungi/001.jpg": b""})
    write(data_dir, {"val/Fungi/more/1.jpg": jpeg(3000)})
    assert examine(data_dir).faults == []


def test_a_test_folder_is_checked_like_the_others(data_dir: Path) -> None:
    write(data_dir, {"test/Aves/leak.jpg": tree()["val/Aves/000.jpg"]})
    found = examine(data_dir)
    assert found.faults == ["class 'Fungi' is in train/, val/ but not in test/"]
    (repeated,) = found.repeated
    assert repeated["files"] == ["val/Aves/000.jpg", "test/Aves/leak.jpg"]


def test_imbalance_is_measured_and_a_warning_is_printed(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data_dir, {f"train/Aves/more{i}.jpg": jpeg(3000 + i) for i in range(9)})
    assert examine(data_dir).imbalance == {"train": 4.0, "val": 1.0}
    check(data_dir)
    assert "largest class has 4 times the pictures" in capsys.readouterr().out


def test_files_that_are_not_pictures_are_listed_unless_hidden(data_dir: Path) -> None:
    write(data_dir, {"train/Aves/.DS_Store": b"x", "train/Aves/clip.gif": b"x", "train/notes": b""})
    assert examine(data_dir).ignored == ["train/Aves/clip.gif"]


def test_modes_are_counted(data_dir: Path) -> None:
    grey = Image.fromarray(np.random.default_rng(1).integers(0, 255, (9, 9), dtype=np.uint8))
    for mode in ("L", "P", "RGBA"):
        grey.convert(mode).save(data_dir / f"train/Aves/{mode}.png")
    grey.convert("CMYK").save(data_dir / "train/Aves/CMYK.jpg")
    modes = examine(data_dir).modes
    assert modes == {"RGB": 10, "L": 1, "P": 1, "RGBA": 1, "CMYK": 1}


def test_a_broken_link_and_a_pipe_are_unreadable(data_dir: Path) -> None:
    (data_dir / "train/Aves/gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(data_dir / "train/Aves/pipe.jpg")
    assert examine(data_dir).unreadable.keys() == {"train/Aves/gone.jpg", "train/Aves/pipe.jpg"}


def test_any_file_name_is_printed_on_one_line(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [b"new\nline.jpg", b"quo\"te's.jpg", "snö☃.jpg".encode(), b"latin\xe9.jpg"]
    for name in names:
        (data_dir / "train/Aves" / os.fsdecode(name)).write_bytes(b"no picture")
    assert check(data_dir) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("can't be read" in line and line.startswith("error:") for line in lines) == 4
    _, found = found_in(data_dir, capsys)
    assert len(found["unreadable"]) == 4


def test_a_missing_folder_is_refused_with_the_download_command(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="python -m finetune download"):
        check(tmp_path / "missing")


def test_the_command_returns_1_for_unreadable_pictures_and_prints_only_json(
    data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plant(data_dir)
    assert main(["check", "--data_dir", str(data_dir.parent), "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["breaks_a_run"] is True
