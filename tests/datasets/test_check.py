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


def test_a_copy_within_one_class_of_one_split_is_a_note(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data_dir, {"train/Aves/IMG (1).jpg": tree()["train/Aves/000.jpg"]})
    assert check(data_dir) == 0
    assert (
        "the same picture within a class, kept on one side of a split: "
        "train/Aves/000.jpg = train/Aves/IMG (1).jpg"
    ) in capsys.readouterr().out


def test_a_picture_in_two_splits_is_a_warning_and_stops_no_run(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data_dir, {"val/Aves/leak.jpg": tree()["train/Aves/000.jpg"]})
    assert check(data_dir) == 0
    assert "several splits: train/Aves/000.jpg = val/Aves/leak.jpg" in capsys.readouterr().out


def test_all_folders_that_stop_a_run_are_listed(data_dir: Path) -> None:
    (data_dir / "train/Empty").mkdir()
    (fault,) = examine(data_dir).faults
    assert "train/Empty is a class without pictures" in fault
    (data_dir / "train/Empty").rmdir()
    write(data_dir, {"val/Only/1.jpg": jpeg(2000)})
    found = examine(data_dir)
    (fault,) = found.faults
    assert "val: no training pictures of Only" in fault
    assert found.counts["val"]["Only"] == 1


def test_too_few_pictures_to_validate_are_a_fault_in_check_and_in_a_run(tmp_path: Path) -> None:
    write(tmp_path, tree(train=1))
    (fault,) = examine(tmp_path).faults
    assert "leaves none to validate" in fault
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
    assert found.faults == []
    assert found.counts["test"] == {"Aves": 1, "Fungi": 0}
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
    write(data_dir, {"train/Aves/.DS_Store": b"x", "train/Aves/clip.mp4": b"x", "train/notes": b""})
    assert examine(data_dir).ignored == ["train/Aves/clip.mp4"]


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


def test_turned_pictures_formats_and_ranges_of_values_are_counted(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(1).integers(0, 4096, (9, 9)).astype(np.uint16)
    Image.fromarray((noise // 16).astype(np.uint8)).save(data_dir / "val/Aves/t.jpg", exif=exif)
    Image.fromarray(noise).save(data_dir / "train/Aves/deep.png")
    (data_dir / "train/Aves/none").write_bytes(jpeg(5))
    found = examine(data_dir)
    assert found.turned == {"orientation 6": 1}
    assert found.formats == {".jpg JPEG": 11, ".png PNG": 1, "without suffix JPEG": 1}
    assert found.value_ranges == {"I;16": [noise.min(), noise.max()]}
    check(data_dir)
    lines = capsys.readouterr().out.splitlines()
    assert "turned upright by EXIF: orientation 6 1" in lines
    assert "files: .jpg JPEG 11, .png PNG 1, without suffix JPEG 1" in lines
    assert f"values of mode I;16: {noise.min()} to {noise.max()}" in lines


def smooth(seed: int) -> Image.Image:
    """A picture with few details, as a photograph has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)


def test_pictures_compressed_anew_or_resized_are_a_note(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(20):
        smooth(i).save(data_dir / f"train/Fungi/{i:02}.png")
    smooth(3).save(data_dir / "val/Fungi/compressed.jpg", quality=30)
    smooth(4).resize((160, 120)).save(data_dir / "val/Fungi/resized.png")
    found = examine(data_dir)
    assert found.similar == [
        ("train/Fungi/03.png", "val/Fungi/compressed.jpg"),
        ("train/Fungi/04.png", "val/Fungi/resized.png"),
    ]
    assert check(data_dir) == 0
    assert (
        "nearly the same picture, compressed anew or resized: "
        "train/Fungi/03.png ~ val/Fungi/compressed.jpg"
    ) in capsys.readouterr().out


def test_what_a_run_says_of_the_data_is_said_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {f"{c}/{i}.jpg": jpeg(100 * i + len(c)) for c in ("cat", "bird") for i in range(5)})  # noqa: E501  # fmt: skip
    write(tmp_path, {"cat/notes.txt": b"x", "cat/more/6.jpg": jpeg(9)})
    assert check(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    notes = find_splits(RunConfig(data_dir=tmp_path)).notes
    assert len(notes) == 4
    assert set(notes) <= set(lines)
    assert "all/: 11 pictures; bird 5, cat 6" in lines


def test_labels_in_a_file_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {f"{i}.jpg": jpeg(i) for i in range(6)})
    rows = [f"{i}.jpg,{'cat' if i % 2 else 'dog'}" for i in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    labels = str(tmp_path / "labels.csv")
    assert main(["check", "--data_dir", str(tmp_path), "--labels", labels]) == 0
    assert "all/: 6 pictures; cat 3, dog 3" in capsys.readouterr().out
