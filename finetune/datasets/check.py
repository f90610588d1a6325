"""A data set, read once -> what is in it, and what would break or flatter a run.

Turns `train/CLASS/*`, `val/CLASS/*` and perhaps `test/CLASS/*` into counts, sizes, modes, faults
that stop a run and notes that a reader of its accuracy should know. Knows nothing about how they
are split or trained on.

    python -m finetune check --data_dir data/inaturalist_12K
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from finetune.data.decode import decode_many
from finetune.data.layout import (
    PICTURE_FORMATS,
    SPLITS,
    class_dirs,
    files_of_class,
    find_data_dir,
    is_picture_name,
)
from finetune.data.splits import AUTO_VAL_FRACTION, num_held_out
from finetune.system.errors import DataError
from finetune.system.progress import bar
from finetune.system.text import one_line

IMBALANCE = 3.0
"""The largest class over the smallest, from which on it is noted."""
_SIDE = 64  # decoded at this size: enough to tell pictures apart, and quick
_LISTED = 10


@dataclass(frozen=True)
class Picture:
    """One readable picture."""

    name: str
    """SPLIT/CLASS/FILE."""
    width: int
    height: int
    mode: str
    """Pillow's: RGB, L, P, CMYK ..."""
    bytes_hash: str
    pixels_hash: str

    @property
    def split(self) -> str:
        return self.name.split("/")[0]

    @property
    def class_name(self) -> str:
        return self.name.split("/")[1]


@dataclass
class Findings:
    """All that `check` says."""

    data_dir: str
    counts: dict[str, dict[str, int]]
    """Picture files by split and class."""
    faults: list[str] = field(default_factory=list)
    """Each one stops a run."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """SPLIT/CLASS/FILE and why; without --skip_unreadable the first one stops a run."""
    repeated: list[dict[str, object]] = field(default_factory=list)
    """The same picture in several splits or under several classes."""
    ignored: list[str] = field(default_factory=list)
    """Files in class folders that no run reads."""
    imbalance: dict[str, float] = field(default_factory=dict)
    """The largest class over the smallest, by split."""
    modes: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    """Width and height: smallest, median, largest."""

    @property
    def breaks_a_run(self) -> bool:
        return bool(self.faults or self.unreadable)


def check(data_dir: Path, as_json: bool = False) -> int:
    """Print the findings; 1 when something in them would stop a run. Raises `DataError`."""
    findings = examine(data_dir, (lambda what, total: lambda: None) if as_json else bar)
    if as_json:
        content = asdict(findings) | {"breaks_a_run": findings.breaks_a_run}
        print(json.dumps(content, indent=2))
    else:
        print("\n".join(_lines(findings)))
    return int(findings.breaks_a_run)


def examine(
    data_dir: Path,
    progress: Callable[[str, int], Callable[[], None]] = lambda what, total: lambda: None,
) -> Findings:
    """Read every picture once, in parallel. Raises `DataError` where there are no splits."""
    data_dir = find_data_dir(data_dir)
    findings, names = _list(data_dir)
    done = progress(f"reading {data_dir}", len(names))
    read: dict[str, Picture] = {}

    def look(index: int, image: object) -> None:
        name = names[index]
        if isinstance(image, DataError):
            findings.unreadable[name] = str(image)
        else:
            read[name] = _describe(data_dir, name, image.numpy().tobytes())  # type: ignore[attr-defined]
        done()

    decode_many([data_dir / name for name in names], _SIDE, look)
    pictures = [read[name] for name in names if name in read]
    findings.unreadable = dict(sorted(findings.unreadable.items()))
    findings.faults += _classes_without_readable(findings.counts, read)
    findings.repeated = find_repeated(pictures)
    findings.modes = dict(Counter(p.mode for p in pictures).most_common())
    for side in ("width", "height"):
        values = sorted(getattr(p, side) for p in pictures) or [0]
        findings.sizes[side] = [values[0], statistics.median_low(values), values[-1]]
    return findings


def _describe(data_dir: Path, name: str, pixels: bytes) -> Picture:
    path = data_dir / name
    with Image.open(path, formats=PICTURE_FORMATS) as image:
        width, height, mode = image.width, image.height, image.mode
    with path.open("rb") as file:
        bytes_hash = hashlib.file_digest(file, "blake2b").hexdigest()
    shown = f"{width}x{height} ".encode() + pixels
    return Picture(name, width, height, mode, bytes_hash, hashlib.blake2b(shown).hexdigest())


def _list(data_dir: Path) -> tuple[Findings, list[str]]:
    """Findings of the folders alone, and every picture's name."""
    findings = Findings(str(data_dir), {})
    names: list[str] = []
    for split in SPLITS:
        if not (data_dir / split).is_dir():
            continue
        counts = findings.counts[split] = {}
        for class_dir in class_dirs(data_dir / split):
            files = [f"{split}/{class_dir.name}/{name}" for name in files_of_class(class_dir)]
            found = sorted(name for name in files if is_picture_name(name))
            findings.ignored += sorted(set(files) - set(found))
            counts[class_dir.name] = len(found)
            names += found
            if not found:
                findings.faults.append(f"{split}/{class_dir.name} is a class without pictures")
        if not counts:
            findings.faults.append(f"{split}/ holds no class folders")
        elif min(counts.values()):
            findings.imbalance[split] = round(max(counts.values()) / min(counts.values()), 2)
    findings.faults += _class_differences(findings.counts)
    fewest = min(number for number in range(9) if num_held_out(number, AUTO_VAL_FRACTION))
    train = findings.counts["train"].values()
    if "test" not in findings.counts and 0 < max(train, default=0) < fewest:
        findings.faults.append(
            f"train/ has fewer than {fewest} pictures in each class, so a fifth of it leaves none "
            "to validate; add some, or train with --val_fraction 0"
        )
    return findings, names


def _classes_without_readable(counts: dict[str, dict[str, int]], read: Iterable[str]) -> list[str]:
    """What stops a run with --skip_unreadable too."""
    good = {tuple(name.split("/")[:2]) for name in read}
    return [
        f"{split}/{name} has no picture that can be read"
        for split, held in counts.items()
        for name, number in held.items()
        if number and (split, name) not in good
    ]


def _class_differences(counts: dict[str, dict[str, int]]) -> list[str]:
    every = sorted(set().union(*counts.values()))
    return [
        f"class {name!r} is in {', '.join(f'{s}/' for s in counts if name in counts[s])} and not "
        f"in {', '.join(f'{s}/' for s in counts if name not in counts[s])}"
        for name in every
        if any(name not in held for held in counts.values())
    ]


def find_repeated(pictures: list[Picture]) -> list[dict[str, object]]:
    """Pictures that are in several splits or under several classes.

    The same by their files' bytes or, with other bytes (another format, other metadata), by their
    size and decoded pixels. A copy within one class of one split is not listed.
    """
    by_pixels: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_pixels[picture.pixels_hash].append(picture)
    repeated: list[dict[str, object]] = []
    for same in by_pixels.values():
        splits, classes = {p.split for p in same}, {p.class_name for p in same}
        if len(splits) > 1 or len(classes) > 1:
            repeated.append(
                {
                    "files": [p.name for p in same],
                    "in_several_splits": len(splits) > 1,
                    "under_several_classes": len(classes) > 1,
                    "same_bytes": len({p.bytes_hash for p in same}) == 1,
                }
            )
    return repeated


def _lines(findings: Findings) -> list[str]:
    """The findings for a terminal."""
    lines = [one_line(findings.data_dir)]
    for split, counts in findings.counts.items():
        listed = ", ".join(f"{one_line(name)} {number}" for name, number in counts.items())
        lines.append(f"{split}/: {sum(counts.values())} pictures; {listed}")
    for side, (low, middle, high) in findings.sizes.items():
        lines.append(f"{side}: {low} to {high}, median {middle} pixels")
    lines.append("modes: " + ", ".join(f"{m} {n}" for m, n in findings.modes.items()))
    for split, ratio in findings.imbalance.items():
        if ratio >= IMBALANCE:
            lines.append(
                f"note: {split}/ is imbalanced, its largest class is {ratio:g} times its smallest; "
                "accuracy favours the large ones"
            )
    lines += _some("note: no run reads", [one_line(name) for name in findings.ignored])
    leaks = [r for r in findings.repeated if r["in_several_splits"]]
    others = [r for r in findings.repeated if not r["in_several_splits"]]
    for what, held in (("in several splits", leaks), ("under several classes", others)):
        lines += _some(f"note: the same picture {what}:", [_joined(r["files"]) for r in held])
    lines += _some("fault:", [one_line(fault) for fault in findings.faults])
    lines += _some("fault:", [one_line(reason) for reason in findings.unreadable.values()])
    if findings.unreadable:
        lines.append("repair or remove the unreadable ones, or train with --skip_unreadable")
    lines.append("a run would stop here" if findings.breaks_a_run else "nothing would stop a run")
    return lines


def _joined(names: object) -> str:
    assert isinstance(names, list)
    return " = ".join(map(one_line, names))


def _some(start: str, items: list[str]) -> list[str]:
    lines = [f"{start} {item}" for item in items[:_LISTED]]
    if len(items) > _LISTED:
        lines.append(f"{start} {len(items) - _LISTED} more; --json lists them all")
    return lines
