"""The training, validation and test pictures of a run; they depend on the pictures' names alone."""

from dataclasses import dataclass

import numpy as np

from finetune.config.fields import RunConfig
from finetune.data.layout import find_data_dir
from finetune.data.pictures import Indices, Pictures, find_pictures
from finetune.data.seeding import mixed
from finetune.system.array_store import digest
from finetune.system.errors import DataError

AUTO_VAL_FRACTION = 0.2


@dataclass(frozen=True)
class Splits:
    """The training and validation pictures, and the test pictures if there are any."""

    train: Pictures
    val: Pictures
    test: Pictures | None
    val_fraction: float
    note: str
    """The splits in one line for the terminal."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def dataset_fingerprint(self) -> str:
        """A hash of the files' names and sizes, independent of machine and split."""
        parts = [self.train, self.val, *([self.test] if self.test else [])]
        return digest(sorted(size for part in parts for size in part.sizes))

    @property
    def split_fingerprint(self) -> str:
        return digest([[p.folder.name, p.names] for p in (self.train, self.val)])


def find_splits(config: RunConfig) -> Splits:
    """The splits that `config` asks for. Raises `DataError`."""
    data_dir = find_data_dir(config.data_dir)
    has_test = (data_dir / "test").is_dir()
    fraction = config.val_fraction
    if fraction == "auto":
        fraction = 0.0 if has_test else AUTO_VAL_FRACTION
    train, val = find_pictures(data_dir / "train"), find_pictures(data_dir / "val")
    _same_classes(train, val)
    test = find_pictures(data_dir / "test") if has_test and fraction == 0 else None
    if test:
        _same_classes(train, test)
    if fraction > 0:
        kept, validating = split_stratified(train, fraction)
        test, train, val = val, train.subset(kept), train.subset(validating)
        if not len(val):
            raise DataError(
                f"val_fraction: {fraction:g} of {len(train)} training pictures leaves none to "
                "validate; pass a larger one, or 0 to validate on val/"
            )
        what = f"{fraction:.0%} of train/ validates ({len(val)} pictures); val/ is kept"
    else:
        what = f"val/ validates ({len(val)} pictures); {'test/' if test else 'nothing'} is kept"
    count = f" ({len(test)} pictures)" if test else ""
    note = f"{len(train)} pictures train; {what} for the test{count}"
    return Splits(train, val, test, float(fraction), note)


def _same_classes(train: Pictures, other: Pictures) -> None:
    ours, theirs = set(train.class_names), set(other.class_names)
    if ours != theirs:
        only = [f"{c!r} only in {train.folder.name}/" for c in sorted(ours - theirs)]
        only += [f"{c!r} only in {other.folder.name}/" for c in sorted(theirs - ours)]
        raise DataError(
            f"{train.folder.parent}: the splits hold different classes: {', '.join(only)}; "
            "each split needs all classes"
        )


def split_stratified(pictures: Pictures, fraction: float) -> tuple[Indices, Indices]:
    """Indices (kept, held out): the same share of each class, rounded to whole pictures.

    It depends on the pictures' names alone, not on a seed, the order of the directory or the
    machine. At least one picture of each class is kept.
    """
    held_out = np.zeros(len(pictures), dtype=bool)
    for label in range(len(pictures.class_names)):
        members = np.flatnonzero(pictures.labels == label)
        ranked = members[np.argsort(mixed(pictures.keys[members], 0x5B117), kind="stable")]
        held_out[ranked[: num_held_out(len(members), fraction)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def num_held_out(num_pictures: int, fraction: float) -> int:
    """The number of a class's pictures that `split_stratified` holds out."""
    return max(0, min(round(num_pictures * fraction), num_pictures - 1))
