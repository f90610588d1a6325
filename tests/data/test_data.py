"""Data sets on disk, splits, random order, batches and decoding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from finetune.config.fields import RunConfig
from finetune.data.batches import batch_bounds
from finetune.data.decode import Preprocessing, decode, decode_many
from finetune.data.images import open_images
from finetune.data.layout import find_layout
from finetune.data.pictures import find_pictures
from finetune.data.seeding import epoch_augment_seeds, epoch_flips, epoch_order
from finetune.data.splits import find_splits, split_stratified
from finetune.system.errors import DataError
from tests.support.picture_trees import jpeg


def place_files(folder: Path, counts: dict[str, int], content: bytes = b"x") -> Path:
    """`counts`: the number of files of each SPLIT/CLASS."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number:05d}.jpg").write_bytes(content)
    return folder


def config(data_dir: Path, **fields: Any) -> RunConfig:
    return RunConfig.from_fields({"data_dir": data_dir, **fields})


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    counts = {"train/a": 1, "train/b": 2, "train/c": 7, "train/d": 50, "train/e": 333}
    return place_files(tmp_path / "data", counts | {f"val/{c}": 2 for c in "abcde"})


# folders


@pytest.mark.parametrize("nested", ["", "inaturalist_12K", "mirror/inaturalist_12K"])
def test_a_data_dir_is_found_up_to_two_levels_down(tmp_path: Path, nested: str) -> None:
    place_files(tmp_path / nested, {"train/a": 1, "val/a": 1})
    assert find_layout(tmp_path).data_dir == tmp_path / nested


def test_a_data_dir_three_levels_down_or_hidden_is_not_found(tmp_path: Path) -> None:
    place_files(tmp_path / "a/b/c", {"train/a": 1, "val/a": 1})
    place_files(tmp_path / ".data.unpacking", {"train/a": 1, "val/a": 1})
    with pytest.raises(
        DataError, match=r"no train/CLASS/ folders and no class folders \(found: .*a"
    ):
        find_layout(tmp_path)


def test_two_data_sets_in_one_folder_are_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        place_files(tmp_path / name, {"train/a": 1, "val/a": 1})
    with pytest.raises(DataError, match=r"several data sets: .*one and .*two"):
        find_layout(tmp_path)


def test_a_missing_data_dir_names_the_download_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist.*python -m finetune download --data_dir"):
        find_splits(config(tmp_path / "missing"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is not a folder"):
        find_splits(config(tmp_path / "file"))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"val/a": 1, "val/b": 1}, "no train/CLASS/ folders"),
        ({"train": 2, "val/a": 1}, "no train/CLASS/ folders"),
        ({"train/a": 1, "train/b": 0, "val/a": 1, "val/b": 1}, "train/b is a class without"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/c": 1}, "val: no training pictures of c"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "test/a": 1, "test/c": 1}, "test: no .* of c"),
        ({"train/a": 0, "train/b": 0, "val/a": 1}, "train holds no class folders with pictures"),
    ],
)
def test_folders_that_cannot_be_used_are_named(
    tmp_path: Path, counts: dict[str, int], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        find_splits(config(place_files(tmp_path, counts)))


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A folder that other users can enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("closed", [".", "train", "train/a", "train/a/deeper"])
def test_a_folder_that_cannot_be_read_is_refused_by_name(open_dir: Path, closed: str) -> None:
    place_files(open_dir, {"train/a": 1, "train/a/deeper": 1, "val/a": 1})
    (open_dir / closed).chmod(0)
    try:
        with (
            as_nobody(),
            pytest.raises(DataError, match=f"{open_dir / closed}.* can't be read: Permission"),
        ):
            find_splits(config(open_dir))
    finally:
        (open_dir / closed).chmod(0o755)


def test_stray_files_are_ignored(tmp_path: Path) -> None:
    place_files(tmp_path, {"train/a": 2, "val/a": 2, ".git/x": 1})
    for name in (".DS_Store", "train/.DS_Store", "train/a/.hidden.jpg", "train/a/Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/a/notes.txt").write_text("x")
    assert find_pictures(tmp_path / "train").names == ("a/00000.jpg", "a/00001.jpg")


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    place_files(tmp_path, {"train/a": 2, "val/a": 1})
    (tmp_path / "train/a/up").symlink_to(tmp_path)
    (tmp_path / "train/a/again").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/self").symlink_to(tmp_path / "train/self")
    assert find_pictures(tmp_path / "train").names == ("a/00000.jpg", "a/00001.jpg")


def test_file_names_may_have_any_bytes(tmp_path: Path) -> None:
    names = [b"new\nline.jpg", b"quo\"te's.jpg", "snö☃.JPG".encode(), b"latin\xe9.jpg"]
    for place in ("train/a", "train/b", "val/a"):
        (tmp_path / place).mkdir(parents=True)
        for i, name in enumerate(names):
            (tmp_path / place / os.fsdecode(name)).write_bytes(jpeg(i + 10 * len(place)))
    splits = find_splits(config(tmp_path, val_fraction=0.5))
    assert {os.fsencode(n)[2:] for n in splits.train.names + splits.val.names} == set(names)
    assert splits.split_fingerprint
    assert splits.dataset_fingerprint
    assert splits.train.identity
    images, _ = open_images(splits.train, Preprocessing(32), False, None)
    assert images.batch(np.arange(2)).shape == (2, 32, 32, 3)


def test_a_broken_link_is_refused_by_name(tmp_path: Path) -> None:
    place_files(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1}, jpeg(1))
    (tmp_path / "train/a/gone.jpg").symlink_to("nowhere.jpg")
    splits = find_splits(config(tmp_path, val_fraction=0))
    assert splits.dataset_fingerprint
    assert splits.train.identity
    images, _ = open_images(splits.train, Preprocessing(32), False, None)
    with pytest.raises(DataError, match=r"gone.jpg can't be read"):
        images.batch(np.arange(2))
    images, lost = open_images(splits.train, Preprocessing(32), True, None)
    assert lost == ["a/gone.jpg"]
    assert len(images.pictures) == 2


# splits


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_splits_are_disjoint_complete_and_stratified_within_one_picture(
    uneven: Path, fraction: float
) -> None:
    pictures = find_pictures(uneven / "train")
    kept, held_out = split_stratified(pictures, fraction)
    assert sorted([*kept, *held_out]) == list(range(len(pictures)))
    for label in range(5):
        size = (pictures.labels == label).sum()
        share = (pictures.labels[held_out] == label).sum()
        assert abs(share - fraction * size) <= 1
        assert share < size, "a class lost every training picture"


def test_splits_do_not_depend_on_the_seed(uneven: Path) -> None:
    one, two = (find_splits(config(uneven, seed=seed)) for seed in (1, 2))
    assert one.val.names == two.val.names
    assert one.split_fingerprint == two.split_fingerprint


def test_splits_do_not_depend_on_the_order_of_the_directory(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = find_splits(config(uneven))
    walk, iterdir = os.walk, Path.iterdir

    def backwards(*args: Any, **options: Any) -> Any:
        for place, dirs, files in walk(*args, **options):
            yield place, dirs, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(list(iterdir(path))[::-1]))
    two = find_splits(config(uneven))
    assert (one.train.names, one.val.names) == (two.train.names, two.val.names)


def test_splits_are_the_same_on_another_machine(uneven: Path, tmp_path: Path) -> None:
    """Another path, other times, another process with another hash seed."""
    moved = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", uneven, moved], check=True)
    code = (
        "import sys; from finetune.config.fields import RunConfig;"
        "from finetune.data.splits import find_splits;"
        "s = find_splits(RunConfig.from_fields({'data_dir': sys.argv[1]}));"
        "print(s.split_fingerprint, s.dataset_fingerprint)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C"}
    printed = subprocess.run(
        [sys.executable, "-c", code, moved], env=environment, capture_output=True, check=True
    ).stdout
    here = find_splits(config(uneven))
    assert printed.decode().split() == [here.split_fingerprint, here.dataset_fingerprint]


def test_the_split_of_known_names_never_changes(uneven: Path) -> None:
    """Results of earlier versions stay comparable; 0.1.0 held none of two pictures out."""
    splits = find_splits(config(uneven))
    assert [n for n in splits.val.names if n[0] in "abc"] == ["b/00000.jpg", "c/00004.jpg"]
    shutil.rmtree(uneven / "train/b")
    shutil.rmtree(uneven / "val/b")
    assert find_splits(config(uneven)).split_fingerprint == "6715d0af7b53667f2da6bd9d"


def test_the_data_sets_fingerprint_does_not_depend_on_how_it_is_split(uneven: Path) -> None:
    prints = {
        find_splits(config(uneven, val_fraction=f)).dataset_fingerprint for f in (0, 0.2, 0.5)
    }
    assert len(prints) == 1
    (uneven / "train/e/00000.jpg").write_bytes(b"longer")
    assert find_splits(config(uneven)).dataset_fingerprint not in prints


@pytest.mark.parametrize(
    ("has_test", "asked", "resolved", "val", "test"),
    [
        (False, "auto", 0.2, "train", "val"),
        (True, "auto", 0.0, "val", "test"),
        (False, 0, 0.0, "val", None),
        (True, 0.5, 0.5, "train", "val"),
    ],
)
def test_val_fraction_selects_the_validation_and_test_sets(
    uneven: Path, has_test: bool, asked: Any, resolved: float, val: str, test: str | None
) -> None:
    if has_test:
        place_files(uneven, {f"test/{c}": 2 for c in "abcde"})
    splits = find_splits(config(uneven, val_fraction=asked))
    assert splits.val_fraction == resolved
    assert splits.val.folder.name == val
    assert (splits.test.folder.name if splits.test else None) == test
    assert not set(splits.train.names) & set(splits.val.names) or val != "train"
    assert f"{val}/" in splits.notes[-1]


def test_a_fraction_without_validation_pictures_is_refused(tmp_path: Path) -> None:
    place_files(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1})
    with pytest.raises(DataError, match="leaves none to validate"):
        find_splits(config(tmp_path, val_fraction=0.1))


# random order, flips, augmentation


def test_order_flips_and_augmentation_depend_on_seed_epoch_and_picture(uneven: Path) -> None:
    pictures = find_pictures(uneven / "train")
    for draw in (epoch_order, epoch_flips, epoch_augment_seeds):
        again = find_pictures(uneven / "train")
        assert np.array_equal(draw(pictures, 1, 2), draw(again, 1, 2))
        assert not np.array_equal(draw(pictures, 1, 2), draw(pictures, 1, 3))
        assert not np.array_equal(draw(pictures, 1, 2), draw(pictures, 2, 2))


def test_a_pictures_random_values_do_not_depend_on_the_other_pictures(uneven: Path) -> None:
    pictures = find_pictures(uneven / "train")
    some = np.arange(0, len(pictures), 3)
    few = pictures.subset(some)
    assert np.array_equal(epoch_flips(pictures, 5, 1)[some], epoch_flips(few, 5, 1))
    seeds = epoch_augment_seeds(pictures, 5, 1)
    assert np.array_equal(seeds[some], epoch_augment_seeds(few, 5, 1))
    position = np.argsort(epoch_order(pictures, 5, 1))
    assert np.array_equal(np.argsort(position[some]), epoch_order(few, 5, 1))


def test_every_picture_trains_once_an_epoch_and_half_are_flipped(uneven: Path) -> None:
    pictures = find_pictures(uneven / "train")
    assert sorted(epoch_order(pictures, 1, 0)) == list(range(len(pictures)))
    flips = np.mean([epoch_flips(pictures, 1, epoch) for epoch in range(50)], axis=0)
    assert abs(flips.mean() - 0.5) < 0.02
    assert flips.min() > 0.1 and flips.max() < 0.9, "a picture is flipped always or never"


@pytest.mark.parametrize(
    ("num", "bounds"),
    [
        (1, [(0, 1)]),
        (4, [(0, 4)]),
        (5, [(0, 5)]),
        (6, [(0, 4), (4, 6)]),
        (8, [(0, 4), (4, 8)]),
        (9, [(0, 4), (4, 9)]),
    ],
)
def test_a_last_batch_of_one_picture_is_merged_with_the_previous_one(
    num: int, bounds: list[Any]
) -> None:
    assert batch_bounds(num, 4) == bounds


# decoding


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (10, 200, 30), "png", (10, 200, 30)),
        ("L", 77, "png", (77, 77, 77)),
        ("L", 77, "jpg", (77, 77, 77)),
        ("LA", (77, 51), "png", (219, 219, 219)),
        ("1", 1, "png", (255, 255, 255)),
        ("RGBA", (10, 200, 30, 255), "png", (10, 200, 30)),
        ("RGBA", (10, 200, 30, 0), "tiff", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "tiff", (255, 0, 0)),
        ("I;16", 65535, "png", (255, 255, 255)),
        ("I;16", 257 * 100, "png", (100, 100, 100)),
        ("I;16", 200, "png", (1, 1, 1)),
    ],
)
def test_every_mode_becomes_rgb_of_the_same_colour(
    tmp_path: Path, mode: str, colour: Any, suffix: str, expected: tuple[int, int, int]
) -> None:
    path = saved(tmp_path / f"x.{suffix}", Image.new(mode, (9, 7), colour))
    image_HWC = decode(path, Preprocessing(32)).image
    assert image_HWC.shape == (32, 32, 3)
    assert image_HWC.dtype == torch.uint8
    difference = image_HWC.int() - torch.tensor(expected, dtype=torch.int32)
    assert difference.abs().max() <= (2 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_decoding_equals_torchvisions_transforms(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    path = saved(tmp_path / f"x.{suffix}", Image.fromarray(pixels))
    with Image.open(path) as image:
        whole_CHW = v2.functional.pil_to_tensor(image.convert("RGB"))
    expected = v2.Resize((32, 32), antialias=True)(whole_CHW).permute(1, 2, 0)
    assert (decode(path, Preprocessing(32)).image.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (3, 500)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pictures_of_extreme_shapes_are_decoded(
    tmp_path: Path, size: tuple[int, int], suffix: str
) -> None:
    path = saved(tmp_path / f"x.{suffix}", Image.new("RGB", size, (40, 40, 40)))
    assert (decode(path, Preprocessing(32)).image.int() - 40).abs().max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_refused_by_its_path(
    tmp_path: Path, suffix: str, share: float
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"x.{suffix}", Image.fromarray(pixels))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="can't be read as a picture") as caught:
        decode(path, Preprocessing(32))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n"]
)
def test_other_content_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x.jpg can't be read as a picture: ."):
        decode(path, Preprocessing(32))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", Image.new("1", (20_000, 20_000)))
    with pytest.raises(DataError, match="pixels"):
        decode(path, Preprocessing(32))


def test_a_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(DataError, match="not a regular file"):
        decode(tmp_path / "x.jpg", Preprocessing(32))


def test_decoding_in_parallel_restores_the_warning_filters(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{i}.png", Image.new("L", (9, 9))) for i in range(64)]
    before = list(warnings.filters)
    decode_many(paths, Preprocessing(32), lambda index, image: None)
    assert warnings.filters == before


def test_an_unreadable_picture_is_refused_or_left_out(tmp_path: Path) -> None:
    place_files(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1}, jpeg(1))
    (tmp_path / "train/b/00001.jpg").write_bytes(b"x")
    pictures = find_pictures(tmp_path / "train")
    images, lost = open_images(pictures, Preprocessing(32), True, None)
    assert lost == ["b/00001.jpg"]
    assert "b/00001.jpg" not in images.pictures.names
    assert images.batch(np.arange(5)).shape == (5, 32, 32, 3)
    images, _ = open_images(pictures, Preprocessing(32), False, None)
    with pytest.raises(DataError, match=r"train/b/00001.jpg can't be read"):
        images.batch(np.arange(6))


def test_a_class_without_readable_pictures_is_refused(tmp_path: Path) -> None:
    place_files(tmp_path, {"train/a": 3, "val/a": 1}, jpeg(1))
    place_files(tmp_path, {"train/b": 2, "val/b": 1}, b"x")
    with pytest.raises(DataError, match="no picture of these classes can be read: b"):
        open_images(find_pictures(tmp_path / "train"), Preprocessing(32), True, None)
    pictures = find_pictures(tmp_path / "train")
    images, lost = open_images(pictures, Preprocessing(32), True, None, needs_all_classes=False)
    assert (len(images.pictures), len(lost)) == (3, 2)
    only_b = pictures.subset(np.array([3, 4]))
    with pytest.raises(DataError, match="no picture of these classes can be read: a, b"):
        open_images(only_b, Preprocessing(32), True, None, needs_all_classes=False)
