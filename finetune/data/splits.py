"""The training, validation and test pictures of a run.

They depend on the pictures' names and on which are copies of each other, not on a seed, the order
of the directory or the machine.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetune.config.field_types import fold_of
from finetune.config.fields import RunConfig
from finetune.data.bit_depth import find_range
from finetune.data.decode import Preprocessing
from finetune.data.division import split_folds, split_stratified
from finetune.data.images import picture_hashes
from finetune.data.labels import read_labels
from finetune.data.layout import find_layout, nfc, subfolders
from finetune.data.pictures import Pictures, find_pictures
from finetune.system.array_store import Cache, digest
from finetune.system.errors import DataError
from finetune.system.progress import StartProgress, no_progress
from finetune.system.text import listed, nearest, num

AUTO_VAL_FRACTION = 0.2


@dataclass(frozen=True)
class Splits:
    """The training and validation pictures, and the test pictures if there are any."""

    train: Pictures
    val: Pictures
    test: Pictures | None
    val_fraction: float
    pixel_range: str
    """As in `RunConfig`, never auto."""
    notes: tuple[str, ...]
    """What is unusual about the data, and the size of each split, one line each."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    def with_val_in_training(self) -> "Splits":
        return replace(self, train=self.train.together_with(self.val))

    @property
    def dataset_fingerprint(self) -> str:
        """A hash of the files' names and sizes, independent of machine and split."""
        parts = [self.train, self.val, *([self.test] if self.test else [])]
        return digest(sorted(size for part in parts for size in part.sizes))

    @property
    def split_fingerprint(self) -> str:
        return digest([[p.name, p.names] for p in (self.train, self.val)])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Both, by their names in last.ckpt and result.json."""
        names = ("dataset_fingerprint", "split_fingerprint")
        return {name: getattr(self, name) for name in names}


def find_splits(
    config: RunConfig, cache: Cache | None = None, progress: StartProgress = no_progress
) -> Splits:
    """The splits that `config` asks for. Raises `DataError`.

    Where training pictures are held out, every picture is read to find copies; with a cache, this
    stores the decoded pictures, which a run needs in any case.
    """
    sources, notes = find_sources(config)
    source = sources.get("all") or sources["train"]
    if config.pixel_range == "auto":
        pixel_range = _find_pixel_range(source.whole)
        config = config.model_copy(update={"pixel_range": pixel_range})
    hashes: Sequence[str | None] = ()
    if resolve_fraction(config, sources) > 0:
        hashes = picture_hashes(source, Preprocessing.of(config), cache, progress)
    return make_splits(config, sources, notes, hashes)


def make_splits(
    config: RunConfig,
    sources: dict[str, Pictures],
    notes: Sequence[str],
    hashes: Sequence[str | None],
) -> Splits:
    """The splits of the pictures and notes from `find_sources`; `hashes` are the training ones'.

    Raises `DataError`.
    """
    fraction = resolve_fraction(config, sources)
    source = sources.get("all") or sources["train"]
    train, val, test = source, sources.get("val"), _test_of(sources, fraction)
    if fraction > 0:
        train, val, test = _held_out(source, fraction, hashes, test)
    if config.fold:
        if test is not None and test.whole is source:  # the same test pictures for every fold
            kept = np.setdiff1d(np.arange(len(source)), test.rows)
            source, hashes = source.subset(kept), [hashes[row] for row in kept]
        number, count = fold_of(config.fold)
        is_val = split_folds(source, count, hashes) == number
        train = source.subset(np.flatnonzero(~is_val))
        val = source.subset(np.flatnonzero(is_val))
    assert val is not None
    if not len(val):
        raise DataError(
            f"val_fraction: {fraction:g} of {num(len(source), 'training picture')} leaves none to "
            "validate; pass a larger one, or 0 to validate on val/"
        )
    lines = [
        *notes,
        *_note_on_copies(hashes),
        *_note_on_classes(val, "validation"),
        *(_note_on_classes(test, "test") if test else []),
        _summary(train, val, test, sources, fraction, config.fold),
    ]
    return Splits(train, val, test, fraction, config.pixel_range, tuple(lines))


def find_test(config: RunConfig, split_fingerprint: str = "") -> Pictures | None:
    """The test pictures of `find_splits`; none is read if they have a folder of their own.

    Raises `DataError` if they have none and the division is no longer that of the fingerprint:
    pictures that were added could have moved training pictures into the test.
    """
    sources, _ = find_sources(config)
    if "all" in sources:
        splits = find_splits(config)
        if split_fingerprint not in ("", splits.split_fingerprint):
            raise DataError(
                f"{config.data_dir}: its pictures have changed since the run, so they are divided "
                "in another way, and the run's test pictures are no longer known"
            )
        return splits.test
    return _test_of(sources, resolve_fraction(config, sources))


def find_sources(config: RunConfig) -> tuple[dict[str, Pictures], list[str]]:
    """The labelled pictures by split, or all of them as `all`, and notes. Raises `DataError`.

    The classes are those of the training pictures.
    """
    if config.labels:
        sources = read_labels(config.labels, config.data_dir)
        notes = [f"labels: from {config.labels}"]
    else:
        layout = find_layout(config.data_dir)
        folders = layout.folders or {"all": layout.data_dir}
        sources = {s: find_pictures(p, s) for s, p in folders.items() if _is_labelled(s, folders)}
        notes = [*layout.notes, *(n for pictures in sources.values() for n in pictures.notes)]
        if "test" in folders and "test" not in sources:
            notes.append("test/ has no labels; it is not used, except by predict")
    if "all" not in sources and "train" not in sources:
        raise DataError(f"labels: {config.labels} lists no training pictures")
    first = sources.get("all") or sources["train"]
    _check_classes(first)
    for split in ("val", "test"):
        if split in sources:
            sources[split] = _with_classes_of(first, sources[split])
    return sources, notes


def _is_labelled(split: str, folders: dict[str, Path]) -> bool:
    """Whether it has class folders: for test/, at least one of train/'s."""
    if split != "test":
        return True
    known, given = ({nfc(p.name) for p in subfolders(folders[s])} for s in ("train", "test"))
    return bool(known & given)


def _check_classes(pictures: Pictures) -> None:
    """Raises `DataError` for a single class or an empty one."""
    if len(pictures.class_names) > 1:
        return
    name, inner = pictures.class_names[0], Counter[str]()
    for file in pictures.files:
        inner.update(file.split("/")[1:-1][:1])
    deeper = f"; are the classes one folder deeper ({listed(sorted(inner))})?" if inner else ""
    raise DataError(f"{pictures.folder} holds only one class, {name}{deeper}")


def _with_classes_of(train: Pictures, other: Pictures) -> Pictures:
    """The other split's pictures with train's classes. Raises `DataError` for an unknown class."""
    unknown = [name for name in other.class_names if name not in train.class_names]
    if unknown:
        named = [f"{name}{nearest(name, train.class_names)}" for name in unknown]
        raise DataError(
            f"{other.folder}: no training pictures of {listed(named)}; the classes are those of "
            f"{train.name}/: {listed(train.class_names)}"
        )
    positions = np.array([train.class_names.index(name) for name in other.class_names])
    return replace(other, labels=positions[other.labels], class_names=train.class_names)


def _note_on_classes(pictures: Pictures, what: str) -> list[str]:
    present = set(pictures.labels.tolist())
    missing = [name for i, name in enumerate(pictures.class_names) if i not in present]
    if not missing:
        return []
    return [f"no {what} pictures of {num(missing, 'class', 'classes')}: {listed(missing)}"]


def resolve_fraction(config: RunConfig, sources: dict[str, Pictures]) -> float:
    """`val_fraction` without auto. Raises `DataError` if 0 leaves nothing to validate on.

    For folds, it is that by which pictures without splits are divided to find the test pictures.
    """
    if config.fold:
        return AUTO_VAL_FRACTION
    asked = config.val_fraction
    if "val" not in sources and asked == 0:
        raise DataError(
            f"val_fraction: got 0, but {config.data_dir} has no val/; pass a val_fraction above 0"
        )
    if asked == "auto":
        return 0.0 if {"val", "test"} <= sources.keys() else AUTO_VAL_FRACTION
    return float(asked)


def _test_of(sources: dict[str, Pictures], fraction: float) -> Pictures | None:
    """The split that is kept for the test: val/, unless it validates."""
    return (sources.get("val") if fraction > 0 else None) or sources.get("test")


def _summary(
    train: Pictures,
    val: Pictures,
    test: Pictures | None,
    sources: dict[str, Pictures],
    fraction: float,
    fold: str | None,
) -> str:
    """The size and origin of each split, in one line."""
    counts = f"{num(len(train), 'picture')} train"
    if "all" in sources:
        tested = len(test) if test else 0
        return f"{counts}, {len(val)} validate and {tested} are kept for the test, by class"
    what = f"{fraction:.0%} of train/ validates" if fraction > 0 else "val/ validates"
    what = f"fold {fold} of train/ validates" if fold else what
    kept = f"{test.name}/ is kept for the test ({num(len(test), 'picture')})" if test else ""
    unused = "; test/ is not used" if test and test.name == "val" and "test" in sources else ""
    kept = (kept or "nothing is kept for the test") + unused
    return f"{counts}; {what} ({num(len(val), 'picture')}); {kept}"


def _find_pixel_range(pictures: Pictures) -> str:
    found = find_range(pictures.paths)
    return "none" if found is None else f"{found[0]:g}..{found[1]:g}"


def _note_on_copies(hashes: Sequence[str | None]) -> list[str]:
    known = [found for found in hashes if found is not None]
    count = len(known) - len(set(known))
    if not count:
        return []
    return [f"{num(count, 'picture')} equal to others; equal ones stay on one side of the split"]


def _held_out(
    source: Pictures, fraction: float, hashes: Sequence[str | None], test: Pictures | None
) -> tuple[Pictures, Pictures, Pictures | None]:
    """Training, validation and test pictures; the latter from `source` if it has no splits."""
    train, val = _hold_out(source, fraction, hashes)
    if source.name == "all":
        rest = [hashes[row] for row in train.rows]
        train, test = _hold_out(train, fraction / (1 - fraction), rest)
    return train, val, test


def _hold_out(
    pictures: Pictures, fraction: float, hashes: Sequence[str | None]
) -> tuple[Pictures, Pictures]:
    kept, held_out = split_stratified(pictures, fraction, hashes)
    return pictures.subset(kept), pictures.subset(held_out)
