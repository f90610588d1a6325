"""Pictures divided by class, without a seed: a share that is held out, or folds."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from finetune.data.pictures import Indices, Pictures
from finetune.data.seeding import mixed


def split_stratified(
    pictures: Pictures, fraction: float, hashes: Sequence[str | None] = ()
) -> tuple[Indices, Indices]:
    """Indices (kept, held out): the same share of each class, rounded to whole pictures.

    Pictures of equal hashes, in whatever class, are on the same side. At least one picture of each
    class is kept, and of a class of two or more, one is held out.
    """
    group_of = _groups(hashes, len(pictures))
    group_keys = mixed(pictures.keys, 0x5B117)[group_of]
    side: dict[int, bool] = {}  # by group: whether it is held out
    for label in range(len(pictures.class_names)):
        members = np.flatnonzero(pictures.labels == label)
        ranked = members[np.argsort(group_keys[members], kind="stable")]
        sizes = Counter(group_of[ranked].tolist())
        missing = num_held_out(len(members), fraction)
        missing -= sum(size for group, size in sizes.items() if side.get(group))
        for group, size in sizes.items():  # in the order of their keys
            if group not in side:
                side[group] = 0 < size <= missing
                missing -= size * side[group]
    held_out = np.array([side[group] for group in group_of.tolist()], dtype=bool)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_folds(pictures: Pictures, num_folds: int, hashes: Sequence[str | None] = ()) -> Indices:
    """The fold in which each picture validates, from 1; 0: in none, because its class has no
    others to train on. Stratified by class; pictures of equal hashes are in the same fold."""
    group_of = _groups(hashes, len(pictures))
    group_keys = mixed(pictures.keys, 0xF01D)[group_of]
    fold_of_group: dict[int, int] = {}
    totals = np.zeros(num_folds, dtype=np.int64)
    for label in range(len(pictures.class_names)):
        members = np.flatnonzero(pictures.labels == label)
        ranked = members[np.argsort(group_keys[members], kind="stable")]
        sizes = Counter(group_of[ranked].tolist())
        of_class = np.zeros(num_folds, dtype=np.int64)
        for group, size in sizes.items():
            if group not in fold_of_group:
                smallest = int(np.lexsort((totals, of_class))[0])
                fold_of_group[group] = 0 if len(sizes) == 1 else smallest + 1
            if fold := fold_of_group[group]:
                of_class[fold - 1] += size
                totals[fold - 1] += size
    return np.array([fold_of_group[group] for group in group_of.tolist()])


def _groups(hashes: Sequence[str | None], count: int) -> Indices:
    """For each picture the first one with its hash, or itself."""
    first: dict[str, int] = {}
    known = list(hashes) or [None] * count
    return np.array([i if h is None else first.setdefault(h, i) for i, h in enumerate(known)])


def num_held_out(num_pictures: int, fraction: float) -> int:
    """The number of a class's pictures that `split_stratified` holds out, without copies."""
    return min(max(1, round(num_pictures * fraction)), max(0, num_pictures - 1))
