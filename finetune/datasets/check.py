"""Read every picture of a data set once and report what would stop a run or distort its accuracy.

python -m finetune check --data_dir data/inaturalist_12K
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.fields import RunConfig
from finetune.data.bit_depth import find_range
from finetune.data.decode import Decoded, Preprocessing, decode_many
from finetune.data.layout import find_layout, list_pictures, suffix_of
from finetune.data.pictures import Pictures, find_pictures
from finetune.data.splits import find_sources, make_splits
from finetune.datasets.copies import NearCopies, find_copies
from finetune.system.errors import DataError
from finetune.system.progress import StartProgress, bar, no_progress
from finetune.system.text import num, one_line

MAX_IMBALANCE = 3.0
"""Ratio of a split's largest to its smallest class from which a warning is printed."""
_IMAGE_SIZE = 64  # enough to compare pictures, and quick
_MAX_LISTED = 10
_MAX_RARE = 0.01  # of all pictures


@dataclass
class Findings:
    """What `check` reports."""

    data_dir: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Pictures by split and class; `all` for pictures that the run splits."""
    notes: list[str] = field(default_factory=list)
    """What a run says about the data."""
    faults: list[str] = field(default_factory=list)
    """Each stops a run."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Error by SPLIT/CLASS/FILE. The first stops a run without --skip_unreadable."""
    repeated: list[dict[str, object]] = field(default_factory=list)
    """Pictures with the same pixels."""
    similar: list[tuple[str, str]] = field(default_factory=list)
    """Pairs that look like one picture, compressed anew or resized."""
    ignored: list[str] = field(default_factory=list)
    """Files in class folders, and pictures outside of them, that no run reads."""
    imbalance: dict[str, float] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    """By suffix and content, such as `.jpg JPEG`."""
    rare: list[str] = field(default_factory=list)
    """Files of kinds that few others have."""
    turned: dict[str, int] = field(default_factory=dict)
    """Pictures that EXIF turns, by its orientation."""
    value_ranges: dict[str, list[float]] = field(default_factory=dict)
    """Smallest and largest value of the pictures of more than 8 bits, by mode."""
    sizes: dict[str, list[int]] = field(default_factory=dict)
    """Smallest, median and largest width and height."""

    @property
    def breaks_a_run(self) -> bool:
        return bool(self.faults or self.unreadable)


def check(data_dir: Path, labels: Path | None = None, as_json: bool = False) -> int:
    """Print the findings; return 1 if any would stop a run, else 0. Raises `DataError`."""
    findings = examine(data_dir, labels, no_progress if as_json else bar)
    if as_json:
        print(json.dumps(asdict(findings) | {"breaks_a_run": findings.breaks_a_run}, indent=2))
    else:
        print("\n".join(_lines(findings)))
    return int(findings.breaks_a_run)


def examine(
    data_dir: Path, labels: Path | None = None, progress: StartProgress = no_progress
) -> Findings:
    """Read every picture once, in parallel. Raises `DataError` if there are no pictures."""
    config = RunConfig(data_dir=data_dir, labels=labels)
    findings = Findings(str(data_dir))
    sources = _find_sources(config, findings)
    paths = {f"{s}/{p.names[i]}": p.path(i) for s, p in sources.items() for i in range(len(p))}
    classes = {
        f"{s}/{n}": p.class_names[i]
        for s, p in sources.items()
        for n, i in zip(p.names, p.labels, strict=True)
    }
    names = list(paths)
    done = progress(f"reading {data_dir}", len(names))
    read: dict[str, Decoded] = {}

    def add(index: int, decoded: Decoded | DataError) -> None:
        if isinstance(decoded, DataError):
            findings.unreadable[names[index]] = str(decoded)
        else:
            read[names[index]] = decoded
        done()

    pixel_range = find_range(list(paths.values()))
    decode_many(list(paths.values()), Preprocessing(_IMAGE_SIZE, pixel_range=pixel_range), add)
    read = {name: read[name] for name in names if name in read}
    findings.unreadable = dict(sorted(findings.unreadable.items()))
    _examine_classes(sources, read, findings)
    if not findings.faults:
        source = sources.get("all") or sources["train"]
        found = (read.get(f"{source.name}/{name}") for name in source.names)
        hashes = [decoded and decoded.pixels_hash for decoded in found]
        try:
            findings.notes = list(make_splits(config, sources, findings.notes, hashes).notes)
        except DataError as error:
            findings.faults.append(str(error))
    _examine_files(read, findings)
    findings.repeated = find_copies(read, classes, paths)
    near = NearCopies()
    different = {decoded.pixels_hash: name for name, decoded in reversed(read.items())}
    for name in reversed(different.values()):  # equal ones are in `repeated`
        near.add(name, read[name].image)
    findings.similar = near.pairs()
    return findings


def _find_sources(config: RunConfig, findings: Findings) -> dict[str, Pictures]:
    """The pictures by split, as a run finds them; without its rules if they stop it."""
    try:
        sources, findings.notes = find_sources(config)
    except DataError as error:
        findings.faults.append(str(error))
        if config.labels:
            raise
        layout = find_layout(config.data_dir)
        folders = layout.folders or {"all": layout.data_dir}
        findings.notes = list(layout.notes)
        sources = {}
        for split, folder in folders.items():
            if any(list_pictures(folder).files.values()):
                sources[split] = find_pictures(folder, split, allow_empty=True)
                findings.notes += sources[split].notes
        if not sources:
            raise
    findings.ignored = [
        f"{split}/{name}" for split, pictures in sources.items() for name in pictures.left_out
    ]
    return sources


def _examine_classes(
    sources: dict[str, Pictures], read: dict[str, Decoded], findings: Findings
) -> None:
    """Counts by class, and the faults and warnings that follow from them."""
    for split, pictures in sources.items():
        readable: Counter[str] = Counter()
        counts = findings.counts[split] = dict.fromkeys(pictures.class_names, 0)
        for name, label in zip(pictures.names, pictures.labels, strict=True):
            class_name = pictures.class_names[label]
            counts[class_name] += 1
            readable[class_name] += f"{split}/{name}" in read
        # This stops a run with --skip_unreadable too.
        findings.faults += [
            f"{split}/{name} has no readable picture"
            for name, number in counts.items()
            if number and not readable[name]
        ]
        if present := [number for number in counts.values() if number]:
            findings.imbalance[split] = round(max(present) / min(present), 2)


def _examine_files(read: dict[str, Decoded], findings: Findings) -> None:
    """What the files say of themselves."""
    modes, turned = Counter[str](), Counter[str]()
    kinds = {n: f"{suffix_of(n) or 'without suffix'} {p.format}" for n, p in read.items()}
    formats = Counter(kinds.values())
    for picture in read.values():
        modes[picture.mode] += 1
        if picture.orientation != 1:
            turned[f"orientation {picture.orientation}"] += 1
        if picture.value_range:
            low, high = findings.value_ranges.get(picture.mode, picture.value_range)
            found = (min(low, picture.value_range[0]), max(high, picture.value_range[1]))
            findings.value_ranges[picture.mode] = list(found)
    findings.modes, findings.formats = dict(modes.most_common()), dict(formats.most_common())
    few = {kind for kind, number in formats.items() if number <= _MAX_RARE * len(read)}
    findings.rare = [f"{name} ({kind})" for name, kind in kinds.items() if kind in few]
    findings.turned = dict(sorted(turned.items()))
    for side in ("width", "height"):
        values = sorted(getattr(p, side) for p in read.values()) or [0]
        findings.sizes[side] = [values[0], statistics.median_low(values), values[-1]]


def _lines(findings: Findings) -> list[str]:
    """The findings for a terminal."""
    lines = [one_line(findings.data_dir), *map(one_line, findings.notes)]
    for split, counts in findings.counts.items():
        listed = ", ".join(f"{one_line(name)} {number}" for name, number in counts.items())
        lines.append(f"{split}/: {num(sum(counts.values()), 'picture')}; {listed}")
    for side, (smallest, median, largest) in findings.sizes.items():
        lines.append(f"{side}: {smallest} to {largest}, median {median} pixels")
    for what, found in (("files", findings.formats), ("modes", findings.modes)):
        lines.append(f"{what}: " + ", ".join(f"{one_line(m)} {n}" for m, n in found.items()))
    if findings.turned:
        turned = ", ".join(f"{what} {n}" for what, n in findings.turned.items())
        lines.append(f"turned upright by EXIF: {turned}")
    for mode, (low, high) in findings.value_ranges.items():
        lines.append(f"values of mode {mode}: {low:g} to {high:g}")
    lines += [
        f"warning: {split}/ is imbalanced: its largest class has {ratio:g} times the pictures of "
        "its smallest, so accuracy favours the large classes"
        for split, ratio in findings.imbalance.items()
        if ratio >= MAX_IMBALANCE
    ]
    lines += _first("an unusual kind of file:", findings.rare)
    lines += _first("warning: not read:", findings.ignored)
    lines += _lines_on_copies(findings)
    lines += _first("error:", findings.faults)
    lines += _first("error:", list(findings.unreadable.values()))
    if findings.unreadable:
        lines.append("repair or remove the unreadable pictures, or train with --skip_unreadable")
    lines.append("a run would fail" if findings.breaks_a_run else "no errors")
    return lines


def _lines_on_copies(findings: Findings) -> list[str]:
    kinds: dict[str, list[str]] = {
        "warning: the same picture in several splits:": [],
        "warning: the same picture in several classes:": [],
        "the same picture within a class, kept on one side of a split:": [],
    }
    for found in findings.repeated:
        kind = 0 if found["in_several_splits"] else 1 if found["under_several_classes"] else 2
        names: Any = found["files"]
        list(kinds.values())[kind].append(" = ".join(names))
    lines = [line for words, files in kinds.items() for line in _first(words, files)]
    pairs = [f"{first} ~ {second}" for first, second in findings.similar]
    return lines + _first("nearly the same picture, compressed anew or resized:", pairs)


def _first(start: str, items: Iterable[str]) -> list[str]:
    items = list(items)
    lines = [f"{start} {one_line(item)}" for item in items[:_MAX_LISTED]]
    if len(items) > _MAX_LISTED:
        lines.append(f"{start} {len(items) - _MAX_LISTED} more; --json lists all")
    return lines
