"""Pictures that occur more than once in a data set: equal pixels, and nearly equal ones."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.transforms import v2

from finetune.data.decode import Decoded

_SMALL = 32
_MAX_BITS, _MAX_LEVELS = 6, 3.0

Array = np.ndarray[Any, Any]


def find_copies(
    pictures: Mapping[str, Decoded], classes: Mapping[str, str], paths: Mapping[str, Path]
) -> list[dict[str, object]]:
    """Groups of pictures with the same pixels, by their names SPLIT/FILE."""
    by_pixels: dict[str, list[str]] = defaultdict(list)
    for name, picture in pictures.items():
        by_pixels[picture.pixels_hash].append(name)
    groups = [names for names in by_pixels.values() if len(names) > 1]
    return [
        {
            "files": names,
            "in_several_splits": len({name.split("/")[0] for name in names}) > 1,
            "under_several_classes": len({classes[name] for name in names}) > 1,
            "same_bytes": _have_same_bytes([paths[name] for name in names]),
        }
        for names in groups
    ]


def _have_same_bytes(paths: Sequence[Path]) -> bool:
    return len({path.read_bytes() for path in paths}) == 1


class NearCopies:
    """Finds pictures that were compressed anew or resized.

    Candidates differ in few bits of a difference hash: whether a pixel of a picture of 9x8 is
    brighter than its neighbour (Krawetz 2013,
    https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html). Reduced to
    32x32, they must differ by at most 3 of 255 levels on average: photographs that were compressed
    at quality 30 or halved in size differ by about 1, similar ones by 8 and more.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._hashes: list[int] = []
        self._small: list[Array] = []

    def add(self, name: str, image_HWC: Tensor) -> None:
        """Add a decoded picture."""
        image_CHW = image_HWC.permute(2, 0, 1)
        small = v2.functional.resize(image_CHW, [_SMALL, _SMALL], antialias=True)
        grey = v2.functional.resize(small.float().mean(dim=0)[None], [8, 9], antialias=True)[0]
        bits = (grey[:, 1:] > grey[:, :-1]).flatten().numpy()
        self._names.append(name)
        self._hashes.append(int.from_bytes(np.packbits(bits).tobytes(), "big"))
        self._small.append(small.numpy().astype(np.int16))

    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of names, each the later one with the first one that it resembles."""
        hashes, small = np.array(self._hashes, dtype=np.uint64), np.array(self._small)
        found = []
        for i in range(1, len(hashes)):
            near = np.flatnonzero(np.bitwise_count(hashes[:i] ^ hashes[i]) <= _MAX_BITS)
            differences = np.abs(small[near] - small[i]).mean(axis=(1, 2, 3))
            first = near[differences <= _MAX_LEVELS][:1]
            found += [(self._names[j], self._names[i]) for j in first]
        return found
