"""Pictures whose labels are in a file: a CSV, or Hugging Face's metadata.jsonl.

path,label,split
IMG_1.jpg,cat,train
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.layout import SPLITS, nfc, readable
from finetune.data.pictures import Pictures
from finetune.system.errors import DataError
from finetune.system.text import listed, num, one_line

_COLUMNS = {
    "path": ("path", "file_name", "filename", "file", "image"),
    "label": ("label", "class", "category"),
    "split": ("split", "set", "subset"),
}
"""The names of each column, in any case."""

_MAX_NAMED = 3


def read_labels(file: Path, data_dir: Path) -> dict[str, Pictures]:
    """The pictures by split, or all as `all` if the file has no splits.

    Paths are relative to `data_dir`, or to the file's own folder if it is within `data_dir`. Raises
    `DataError` for a file that can't be used, and for paths that are missing, listed twice or
    outside.
    """
    entries = [_entry(row, number, file) for number, row in enumerate(_rows(file), 1)]
    if not entries:
        raise DataError(f"labels: {file} lists no pictures")
    files = _files(file, data_dir, [path for path, _, _ in entries])
    order = sorted(range(len(entries)), key=lambda i: (entries[i][1], files[i]))
    labels, splits = ([entries[i][column] for i in order] for column in (1, 2))
    classes, indices = np.unique(labels, return_inverse=True)
    whole = Pictures(
        data_dir,
        tuple(files[i] for i in order),
        indices.astype(np.int64),
        tuple(map(str, classes)),
        np.arange(len(order)),
        "all",
        file,
    )
    if not any(splits):
        return {"all": whole}
    parts = {split: np.flatnonzero(np.array(splits) == split) for split in SPLITS}
    return {s: replace(whole.subset(part), name=s) for s, part in parts.items() if len(part)}


def _files(file: Path, data_dir: Path, given: Sequence[str]) -> list[str]:
    """The given paths relative to `data_dir`. Raises `DataError`."""
    base = file.parent if file.is_relative_to(data_dir) else data_dir
    paths = [Path(os.path.normpath(base / path)) for path in given]
    counts = Counter(nfc(str(path)) for path in paths)
    problems = {
        "outside of data_dir": [not path.is_relative_to(data_dir) for path in paths],
        "missing": [not path.is_file() for path in paths],
        "listed twice": [counts[nfc(str(path))] > 1 for path in paths],
    }
    for what, affected in problems.items():
        if names := [one_line(name) for name in compress(given, affected)]:
            raise DataError(
                f"labels: {file}: {num(names, 'path')} {what}: {listed(names, _MAX_NAMED)} (paths "
                f"are relative to {base})"
            )
    return [path.relative_to(data_dir).as_posix() for path in paths]


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """The file's rows as mappings. Raises `DataError`."""
    try:
        with readable(), file.open(encoding="utf-8-sig", newline="") as opened:
            if file.suffix.lower() == ".jsonl":
                yield from (json.loads(line) for line in opened if line.strip())
            else:
                yield from csv.DictReader(opened)
    except (ValueError, csv.Error) as error:
        raise DataError(f"labels: {file} can't be read: {error}") from None


def _entry(row: Any, number: int, file: Path) -> tuple[str, str, str]:
    """Path, label and split ("" if there is none) of a row. Raises `DataError`."""
    given = {str(k).strip().lower(): v for k, v in row.items()} if isinstance(row, dict) else {}
    found = {
        column: next((given[name] for name in names if given.get(name) not in (None, "")), None)
        for column, names in _COLUMNS.items()
    }
    if found["path"] is None or found["label"] is None:
        raise DataError(
            f"labels: {file} needs the columns path and label, and may have split; entry {number} "
            f"has {listed(list(given)) or 'none'}"
        )
    split = str(found["split"] or "").strip().lower()
    names = {name: s for s, known in SPLITS.items() for name in known} | {"": ""}
    if split not in names:
        raise DataError(f"labels: {file}: split of entry {number}: got {split!r}, must be train, "
                        "val or test")  # fmt: skip
    return str(found["path"]), nfc(str(found["label"]).strip()), names[split]
