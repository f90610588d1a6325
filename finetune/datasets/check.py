"""Read every picture of a data set once and report what would stop a run or distort its accuracy.

python -m finetune check --data_dir data/inaturalist_12K
"""

import json
import statistics
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.data import layout
from finetune.data.decode import Decoded, Preprocessing, decode_many
from finetune.data.splits import AUTO_VAL_FRACTION, num_held_out
from finetune.system.errors import DataError
from finetune.system.progress import StartProgress, bar, no_progress
from finetune.system.text import one_line

MAX_IMBALANCE = 3.0
"""Ratio of a split's largest to its smallest class from which a warning is printed."""
_PREPROCESSING = Preprocessing(image_size=64)  # enough to compare pictures, and quick
_MAX_LISTED = 10


@dataclass
class Findings:
    """What `check` reports."""

    data_dir: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Picture files by split and class."""
    faults: list[str] = field(default_factory=list)
    """Each stops a run."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Error by SPLIT/CLASS/FILE. The first stops a run without --skip_unreadable."""
    repeated: list[dict[str, object]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    """Files in class folders that no run reads."""
    imbalance: dict[str, float] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    """Smallest, median and largest width and height."""

    @property
    def breaks_a_run(self) -> bool:
        return bool(self.faults or self.unreadable)


def check(data_dir: Path, as_json: bool = False) -> int:
    """Print the findings; return 1 if any would stop a run, else 0. Raises `DataError`."""
    findings = examine(data_dir, no_progress if as_json else bar)
    if as_json:
        print(json.dumps(asdict(findings) | {"breaks_a_run": findings.breaks_a_run}, indent=2))
    else:
        print("\n".join(_lines(findings)))
    return int(findings.breaks_a_run)


def examine(data_dir: Path, progress: StartProgress = no_progress) -> Findings:
    """Read every picture once, in parallel. Raises `DataError` if there are no splits."""
    data_dir = layout.find_data_dir(data_dir)
    findings = Findings(str(data_dir))
    names = _list_files(data_dir, findings)
    done = progress(f"reading {data_dir}", len(names))
    pictures: dict[str, Decoded] = {}

    def add(index: int, decoded: Any) -> None:
        name = names[index]
        if isinstance(decoded, DataError):
            findings.unreadable[name] = str(decoded)
        else:
            pictures[name] = decoded
        done()

    decode_many([data_dir / name for name in names], _PREPROCESSING, add)
    pictures = {name: pictures[name] for name in names if name in pictures}
    findings.unreadable = dict(sorted(findings.unreadable.items()))
    classes, readable = (
        dict.fromkeys("/".join(name.split("/")[:2]) for name in some) for some in (names, pictures)
    )
    # This stops a run with --skip_unreadable too.
    findings.faults += [f"{c} has no readable picture" for c in classes if c not in readable]
    findings.repeated = _find_repeated(data_dir, pictures)
    findings.modes = dict(Counter(p.mode for p in pictures.values()).most_common())
    for side in ("width", "height"):
        values = sorted(getattr(p, side) for p in pictures.values()) or [0]
        findings.sizes[side] = [values[0], statistics.median_low(values), values[-1]]
    return findings


def _list_files(data_dir: Path, findings: Findings) -> list[str]:
    """Names of all pictures. Adds the findings that need no picture to be read."""
    names: list[str] = []
    for split in layout.SPLITS:
        if not (data_dir / split).is_dir():
            continue
        counts = findings.counts[split] = {}
        for class_dir in layout.class_dirs(data_dir / split):
            place = f"{split}/{class_dir.name}"
            files = sorted(f"{place}/{name}" for name in layout.files_of_class(class_dir))
            pictures = [name for name in files if layout.is_picture_name(name)]
            findings.ignored += [name for name in files if not layout.is_picture_name(name)]
            counts[class_dir.name] = len(pictures)
            names += pictures
            if not pictures:
                findings.faults.append(f"{place} is a class without pictures")
        if not counts:
            findings.faults.append(f"{split}/ holds no class folders")
        elif min(counts.values()):
            findings.imbalance[split] = round(max(counts.values()) / min(counts.values()), 2)
    for name in sorted(set().union(*findings.counts.values())):
        present = [f"{split}/" for split, counts in findings.counts.items() if name in counts]
        missing = [f"{split}/" for split in findings.counts if f"{split}/" not in present]
        if missing:
            where = f"is in {', '.join(present)} but not in {', '.join(missing)}"
            findings.faults.append(f"class {name!r} {where}")
    fewest = min(number for number in range(9) if num_held_out(number, AUTO_VAL_FRACTION))
    largest_class = max(findings.counts["train"].values(), default=0)
    if "test" not in findings.counts and 0 < largest_class < fewest:
        findings.faults.append(
            f"train/ has fewer than {fewest} pictures in each class, so a fifth of it leaves none "
            "to validate; add some, or train with --val_fraction 0"
        )
    return names


def _find_repeated(data_dir: Path, pictures: dict[str, Decoded]) -> list[dict[str, object]]:
    """Pictures that occur in several splits or classes: of the same size and decoded pixels."""
    by_pixels: dict[str, list[str]] = defaultdict(list)
    for name, picture in pictures.items():
        by_pixels[picture.pixels_hash].append(name)
    repeated: list[dict[str, object]] = []
    for names in by_pixels.values():
        num_splits, num_classes = (len({n.split("/")[level] for n in names}) for level in (0, 1))
        if num_splits > 1 or num_classes > 1:
            same_bytes = len({(data_dir / name).read_bytes() for name in names}) == 1
            where = {"in_several_splits": num_splits > 1, "under_several_classes": num_classes > 1}
            repeated.append({"files": names, **where, "same_bytes": same_bytes})
    return repeated


def _lines(findings: Findings) -> list[str]:
    """The findings for a terminal."""
    lines = [one_line(findings.data_dir)]
    for split, counts in findings.counts.items():
        listed = ", ".join(f"{one_line(name)} {number}" for name, number in counts.items())
        lines.append(f"{split}/: {sum(counts.values())} pictures; {listed}")
    for side, (smallest, median, largest) in findings.sizes.items():
        lines.append(f"{side}: {smallest} to {largest}, median {median} pixels")
    lines.append("modes: " + ", ".join(f"{m} {n}" for m, n in findings.modes.items()))
    lines += [
        f"warning: {split}/ is imbalanced: its largest class has {ratio:g} times the pictures of "
        "its smallest, so accuracy favours the large classes"
        for split, ratio in findings.imbalance.items()
        if ratio >= MAX_IMBALANCE
    ]
    lines += _first("warning: not a picture, ignored:", findings.ignored)
    for words, is_leak in (("in several splits", True), ("in several classes", False)):
        same = [r["files"] for r in findings.repeated if r["in_several_splits"] == is_leak]
        files = [" = ".join(names) for names in same if isinstance(names, list)]
        lines += _first(f"warning: the same picture {words}:", files)
    lines += _first("error:", findings.faults)
    lines += _first("error:", list(findings.unreadable.values()))
    if findings.unreadable:
        lines.append("repair or remove the unreadable pictures, or train with --skip_unreadable")
    lines.append("a run would fail" if findings.breaks_a_run else "no errors")
    return lines


def _first(start: str, items: list[str]) -> list[str]:
    lines = [f"{start} {one_line(item)}" for item in items[:_MAX_LISTED]]
    if len(items) > _MAX_LISTED:
        lines.append(f"{start} {len(items) - _MAX_LISTED} more; --json lists all")
    return lines
