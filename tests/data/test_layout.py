"""Which folders are splits and classes, which files are pictures, what is said of the others."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config.fields import RunConfig
from finetune.data.layout import find_layout
from finetune.data.pictures import find_pictures
from finetune.data.splits import Splits, find_splits, find_test
from finetune.system.errors import DataError
from tests.support.picture_trees import jpeg


def place(folder: Path, counts: dict[str, int], suffix: str = ".jpg") -> Path:
    """`counts`: the number of pictures of each folder; all differ."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            content = jpeg(abs(hash((name, number))) % 2**31)
            (folder / name / f"{number:03}{suffix}").write_bytes(content)
    return folder


def splits_of(data_dir: Path, **fields: Any) -> Splits:
    return find_splits(RunConfig.from_fields({"data_dir": data_dir, **fields}))


def counts_of(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.val), len(splits.test) if splits.test else 0


PAIR = {"cat": 10, "dog": 10}


def in_splits(*names: str) -> dict[str, int]:
    return {f"{split}/{c}": n for split in names for c, n in PAIR.items()}


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "VAL", "Validation"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
def test_splits_are_found_by_their_usual_names(tmp_path: Path, train: str, val: str) -> None:
    splits = splits_of(place(tmp_path, in_splits(train, val, "testing")))
    assert counts_of(splits) == (20, 20, 20)
    assert splits.val_fraction == 0
    for name, split in ((train, "train"), (val, "val"), ("testing", "test")):
        assert (f"{name}/ is read as {split}/" in splits.notes) == (name != split)
    canonical = splits_of(place(tmp_path / "again", in_splits("train", "val", "test")))
    assert canonical.split_fingerprint == splits.split_fingerprint


def test_two_folders_for_one_split_are_refused_by_name(tmp_path: Path) -> None:
    place(tmp_path, in_splits("train", "val", "valid"))
    with pytest.raises(DataError, match=r"holds val/ and valid/; keep or rename one, as val/"):
        find_layout(tmp_path)


def test_one_folder_of_classes_is_divided_into_three_by_class(tmp_path: Path) -> None:
    splits = splits_of(place(tmp_path / "pictures", PAIR))
    assert counts_of(splits) == (12, 4, 4)
    assert splits.test is not None
    for part in (splits.train, splits.val, splits.test):
        assert np.bincount(part.labels).tolist() == [len(part) // 2] * 2
    names = [*splits.train.names, *splits.val.names, *splits.test.names]
    assert len(set(names)) == 20
    assert splits.notes[-1] == (
        "12 pictures train, 4 validate and 4 are kept for the test, by class"
    )
    found = find_test(RunConfig(data_dir=tmp_path))  # one folder further up
    assert found is not None
    assert found.names == splits.test.names


def test_a_class_may_be_named_as_a_split(tmp_path: Path) -> None:
    splits = splits_of(place(tmp_path, {"bus": 5, "car": 5, "train": 5}))
    assert splits.class_names == ("bus", "car", "train")


def test_train_alone_is_divided_into_training_and_validation(tmp_path: Path) -> None:
    place(tmp_path, in_splits("train"))
    assert counts_of(splits_of(tmp_path)) == (16, 4, 0)
    with pytest.raises(DataError, match=r"val_fraction: got 0, but .* has no val/"):
        splits_of(tmp_path, val_fraction=0)
    place(tmp_path, in_splits("test"))
    assert counts_of(splits_of(tmp_path)) == (16, 4, 20)


def test_a_single_class_is_refused_with_the_folders_below_it(tmp_path: Path) -> None:
    place(tmp_path, {f"{s}/images/{c}": 3 for s in ("train", "val") for c in ("cat", "dog")})
    with pytest.raises(DataError) as raised:
        splits_of(tmp_path)
    assert str(raised.value).endswith(
        "only one class, images; are the classes one folder deeper (cat and dog)?"
    )
    place(tmp_path / "other", {"train/cat": 3, "val/cat": 3})
    with pytest.raises(DataError, match=r"holds only one class, cat$"):
        splits_of(tmp_path / "other")


@pytest.mark.parametrize("test", ["test", "test/images", "test/unknown"])
def test_a_test_folder_without_labels_is_left_to_predict(tmp_path: Path, test: str) -> None:
    place(tmp_path, in_splits("train", "val") | {test: 7})
    splits = splits_of(tmp_path)
    assert splits.val_fraction == 0.2
    assert splits.test is not None
    assert splits.test.name == "val"
    assert "test/ has no labels; it is not used, except by predict" in splits.notes


def test_a_split_that_is_not_used_is_said(tmp_path: Path) -> None:
    place(tmp_path, in_splits("train", "val", "test"))
    last = splits_of(tmp_path, val_fraction=0.2).notes[-1]
    assert last == (
        "16 pictures train; 20% of train/ validates (4 pictures); val/ is kept for the test "
        "(20 pictures); test/ is not used"
    )


def test_copies_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    """Forty pictures of noise with a copy each, half of them in another format."""
    for name in ("cat", "dog"):
        place(tmp_path, {f"train/{name}": 20, f"val/{name}": 1})
        for i, path in enumerate(sorted((tmp_path / "train" / name).iterdir())):
            if i % 2:
                path.with_name(f"{path.stem} (1).jpg").write_bytes(path.read_bytes())
            else:
                Image.open(path).save(path.with_name(f"{path.stem} (1).png"))
    splits = splits_of(tmp_path)
    originals = [{n.split(".")[0].removesuffix(" (1)") for n in p.names} for p in (splits.train, splits.val)]  # noqa: E501  # fmt: skip
    assert not originals[0] & originals[1]
    assert counts_of(splits)[:2] == (64, 16)
    assert "40 pictures equal to others; equal ones stay on one side of the split" in splits.notes
    other_size = splits_of(tmp_path, image_size=64, cache="off")
    assert other_size.split_fingerprint == splits.split_fingerprint


def test_a_copy_in_another_class_is_on_the_same_side(tmp_path: Path) -> None:
    place(tmp_path, in_splits("train", "val"))
    held_out = splits_of(tmp_path).val
    for i in range(len(held_out)):
        other = "dog" if held_out.names[i].startswith("cat") else "cat"
        (tmp_path / f"train/{other}/copy{i}.jpg").write_bytes(held_out.path(i).read_bytes())
    splits = splits_of(tmp_path)
    contents = [{p.path(i).read_bytes() for i in range(len(p))} for p in (splits.train, splits.val)]
    assert not contents[0] & contents[1]


@pytest.mark.parametrize("name", ["@eaDir", ".thumbnails", "__MACOSX", ".ipynb_checkpoints"])
def test_folders_of_other_programs_are_never_read(tmp_path: Path, name: str) -> None:
    place(tmp_path, in_splits("train", "val"))
    place(tmp_path, {f"train/{name}": 2, f"train/cat/{name}": 3, f"train/cat/{name}/x": 4})
    assert find_pictures(tmp_path / "train").class_names == ("cat", "dog")
    assert len(find_pictures(tmp_path / "train")) == 20


def test_folders_within_a_class_are_read_and_said(tmp_path: Path) -> None:
    place(tmp_path, in_splits("train", "val") | {"train/cat/more": 3, "train/cat/dog": 2})
    splits = splits_of(tmp_path)
    assert np.bincount(find_pictures(tmp_path / "train").labels).tolist() == [15, 10]
    assert "train/cat/more/: 3 pictures read as cat" in splits.notes
    assert "train/cat/dog/: 2 pictures read as cat (a class has that name too)" in splits.notes


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    place(tmp_path, in_splits("train", "val"))
    place(tmp_path / "elsewhere", {"album": 20})
    for link in ("album", "album again"):
        (tmp_path / "train/cat" / link).symlink_to(tmp_path / "elsewhere/album")
    (tmp_path / "train/bird").symlink_to(tmp_path / "elsewhere")
    assert np.bincount(find_pictures(tmp_path / "train").labels).tolist() == [20, 30, 10]


def test_pictures_of_any_ending_are_read_and_others_counted(tmp_path: Path) -> None:
    place(tmp_path, in_splits("train", "val"))
    for i, suffix in enumerate((".jfif", ".JPE", "", ".jpg_large", ".dat")):
        (tmp_path / f"train/cat/more{i}{suffix}").write_bytes(jpeg(i))
    Image.new("RGB", (9, 9)).save(tmp_path / "train/cat/x.gif")
    Image.new("RGB", (9, 9)).save(tmp_path / "train/cat/x.avif", "GIF")
    for name in ("a.txt", "b.txt", "README", "clip.mp4"):
        (tmp_path / "train/cat" / name).write_text("not a picture")
    (tmp_path / "train/loose.jpg").write_bytes(jpeg(99))
    splits = splits_of(tmp_path)
    assert np.bincount(find_pictures(tmp_path / "train").labels).tolist() == [17, 10]
    assert "train/: left out 2 .txt, 1 without suffix and 1 .mp4" in splits.notes
    assert "train/: 1 picture in no class folder left out, such as loose.jpg" in splits.notes


def test_class_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(f, "café") for f in ("NFC", "NFD"))
    place(tmp_path, {f"train/{composed}": 4, "train/tea": 4, f"val/{decomposed}": 2, "val/tea": 2})
    splits = splits_of(tmp_path, val_fraction=0)
    assert splits.class_names == (composed, "tea")
    assert np.bincount(splits.val.labels).tolist() == [2, 2]
    before = splits_of(tmp_path).split_fingerprint
    place(tmp_path, {f"train/{decomposed}": 3})
    merged = splits_of(tmp_path, val_fraction=0)
    assert np.bincount(merged.train.labels).tolist() == [7, 4]
    assert any("2 folders with this name in different Unicode forms" in n for n in merged.notes)
    mac = place(tmp_path / "mac", {f"train/{decomposed}": 4, "train/tea": 4, "val/tea": 2})
    assert splits_of(mac).split_fingerprint == before


def test_a_class_of_two_pictures_has_one_to_validate_and_a_class_of_one_is_named(
    tmp_path: Path,
) -> None:
    place(tmp_path, {f"train/c{i}": 2 for i in range(8)} | {"train/big": 40, "train/one": 1})
    splits = splits_of(tmp_path)
    assert np.bincount(splits.val.labels, minlength=10).tolist() == [8, *[1] * 8, 0]
    assert "no validation pictures of 1 class: one" in splits.notes


def test_classes_missing_in_val_are_said_and_unknown_ones_stop(tmp_path: Path) -> None:
    place(tmp_path, in_splits("train", "test") | {"train/owl": 5, "val/dog": 3})
    splits = splits_of(tmp_path)
    assert "no validation pictures of 2 classes: cat and owl" in splits.notes
    assert "no test pictures of 1 class: owl" in splits.notes
    assert splits.val.labels.tolist() == [1, 1, 1]
    assert splits.val.class_names == ("cat", "dog", "owl")
    place(tmp_path, {"val/dogs": 1})
    with pytest.raises(DataError, match=r"no training pictures of dogs; did you mean dog\?"):
        splits_of(tmp_path)


def test_pipes_are_never_opened(tmp_path: Path) -> None:
    place(tmp_path, in_splits("train", "val"))
    for name in ("pipe", "pipe.jpg"):
        os.mkfifo(tmp_path / "train/cat" / name)
    splits = splits_of(tmp_path)
    assert [name for name in splits.train.names + splits.val.names if "pipe" in name] == [
        "cat/pipe.jpg"
    ]
    assert "train/: left out 1 without suffix" in splits.notes
