"""Labels in a CSV file or in metadata.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.fields import RunConfig
from finetune.data.splits import Splits, find_splits
from finetune.system.errors import DataError
from tests.support.picture_trees import jpeg


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "data/photos").mkdir(parents=True)
    for i in range(20):
        (tmp_path / f"data/photos/IMG_{i:02}.jpg").write_bytes(jpeg(i))
    return tmp_path / "data"


def label(i: int) -> str:
    return "cat" if i % 2 else "dog"


def table(header: str = "path,label", **changed: str) -> str:
    rows = {f"{i:02}": f"photos/IMG_{i:02}.jpg,{label(i)}" for i in range(20)} | changed
    return "\n".join([header, *rows.values()]) + "\n"


def splits_of(data_dir: Path, content: str, name: str = "labels.csv") -> Splits:
    (data_dir / name).write_text(content)
    return find_splits(RunConfig(data_dir=data_dir, labels=data_dir / name))


def labels_of(splits: Splits) -> dict[str, str]:
    parts = [splits.train, splits.val, *([splits.test] if splits.test else [])]
    return {n: p.class_names[k] for p in parts for n, k in zip(p.names, p.labels, strict=True)}


EXPECTED = {f"photos/IMG_{i:02}.jpg": label(i) for i in range(20)}


@pytest.mark.parametrize("header", ["path,label", "\ufeffPath,Label", "filename,class", "image,category"])  # noqa: E501  # fmt: skip
def test_a_csv_without_splits_is_divided_by_class(data_dir: Path, header: str) -> None:
    splits = splits_of(data_dir, table(header))
    assert labels_of(splits) == EXPECTED
    assert [len(part) for part in (splits.train, splits.val, splits.test or [])] == [12, 4, 4]


def test_a_split_column_divides_them(data_dir: Path) -> None:
    names = ("train", "valid", "Test")
    rows = [f"photos/IMG_{i:02}.jpg,{label(i)},{names[i // 2 % 3]}" for i in range(20)]
    splits = splits_of(data_dir, "\n".join(["path,label,split", *rows]))
    assert labels_of(splits) == EXPECTED
    assert splits.val_fraction == 0
    assert [len(part) for part in (splits.train, splits.val, splits.test or [])] == [8, 6, 6]


def test_hugging_face_s_metadata_is_read(data_dir: Path) -> None:
    lines = [json.dumps({"file_name": f"IMG_{i:02}.jpg", "label": i % 2}) for i in range(20)]
    splits = splits_of(data_dir, "\n".join(lines), "photos/metadata.jsonl")
    assert labels_of(splits) == {name: str(i % 2) for i, name in enumerate(EXPECTED)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"03": "photos/gone.jpg,cat"}, "1 path missing: photos/gone.jpg"),
        ({"03": "photos/IMG_04.jpg,cat"}, "2 paths listed twice: photos/IMG_04.jpg and "),
        ({"03": "../secret.jpg,cat"}, "1 path outside of data_dir: ../secret.jpg"),
        ({"03": "photos/IMG_03.jpg,"}, "needs the columns path and label"),
    ],
)
def test_paths_that_cannot_be_used_are_named(
    data_dir: Path, changed: dict[str, str], words: str
) -> None:
    with pytest.raises(DataError, match="labels: ") as raised:
        splits_of(data_dir, table(**changed))
    assert words in str(raised.value)


def test_files_that_are_no_labels_are_refused(data_dir: Path) -> None:
    for content, words in (
        ("", "lists no pictures"),
        ("a,b\n1,2\n", "needs the columns path and label, .* entry 1 has a and b"),
        (table("path,label,split", **{"00": "photos/IMG_00.jpg,dog,holdout"}), "got 'holdout'"),
    ):
        with pytest.raises(DataError, match=words):
            splits_of(data_dir, content)
    with pytest.raises(DataError, match=r"gone\.csv can't be read: No such file"):
        find_splits(RunConfig(data_dir=data_dir, labels=data_dir / "gone.csv"))


def test_a_changed_label_changes_the_data_s_fingerprint(data_dir: Path) -> None:
    before = splits_of(data_dir, table()).dataset_fingerprint
    assert splits_of(data_dir, table()).dataset_fingerprint == before
    other = splits_of(data_dir, table(**{"03": "photos/IMG_03.jpg,dog"}))
    assert other.dataset_fingerprint != before
