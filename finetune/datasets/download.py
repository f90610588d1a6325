"""iNaturalist-12K and ImageNet's weights, fetched once for machines without a network later.

Turns a URL or a local zip into a checked `data_dir`, and torchvision's URL into the file where
torch.hub looks for it. Knows nothing about training, and imports no torch.

    python -m finetune download --data_dir data/inaturalist_12K
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from finetune.data.layout import SPLITS, class_dirs, find_data_dir, pictures_of_class
from finetune.datasets.archive import changed_files, existing_parent, read_manifest, sha256, unpack
from finetune.datasets.fetch import PATIENCE, Part, Patience, fetch, fetch_again, name_of
from finetune.datasets.zip_safety import Damaged, Expected, Foreign, Refused, count_pictures
from finetune.system.errors import ConfigError, DataError, WeightsError
from finetune.system.progress import bar

INATURALIST_URL = "https://storage.googleapis.com/wandb_datasets/nature_12K.zip"
INATURALIST = Expected(
    frozenset(
        {"Amphibia", "Animalia", "Arachnida", "Aves", "Fungi"}
        | {"Insecta", "Mammalia", "Mollusca", "Plantae", "Reptilia"}
    ),
    {"train": 9_999, "val": 2_000},
)
WEIGHTS_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
"""torchvision's ResNet18_Weights.IMAGENET1K_V1; the name ends in the start of its sha256."""


def download(
    data_dir: Path,
    url: str | None = None,
    archive: Path | None = None,
    weights_only: bool = False,
    *,
    weights_url: str = WEIGHTS_URL,
    patience: Patience = PATIENCE,
) -> None:
    """Fetch the data, from `url` or a local `archive` where one is given, and the weights.

    Tests point `url` and `weights_url` at a server of their own. Raises `FinetuneError`.
    """
    if url is not None and archive is not None:
        raise ConfigError("url, archive: got both; pass one")
    if weights_only and (url is not None or archive is not None):
        raise ConfigError("weights_only: fetches no data; leave --url and --archive out")
    if archive is not None:
        unpack_archive(data_dir, archive)
    elif not weights_only:
        fetch_data(
            data_dir,
            INATURALIST_URL if url is None else url,
            INATURALIST if url is None else None,
            patience,
        )
    fetch_weights(weights_url, patience)


# the data


def fetch_data(
    data_dir: Path, url: str, expected: Expected | None, patience: Patience = PATIENCE
) -> None:
    """Make `data_dir` hold the data set in the zip at `url`. Raises `DataError`.

    What was fetched waits in NAME.zip.part beside `data_dir` until it is unpacked.
    """
    data_dir = _place(data_dir)
    part = Part(url, data_dir.parent / f"{name_of(url) or 'data.zip'}.part")
    with _alone(data_dir):
        if _is_there(data_dir, part.source, expected):
            return
        with _alone(part.path):  # another data_dir beside this one has the same part
            fetch(part, patience, lambda missing: _check_room(data_dir, missing, part))
            try:
                _unpack_mending(part, data_dir, expected, patience)
            except Refused as refused:
                raise DataError(f"{refused}; {_dispose(part, refused)}") from None
            part.remove()
            _say_what_is_there(data_dir)


def _dispose(part: Part, refused: Refused) -> str:
    """Remove what would be refused for ever; what a user can do about the rest."""
    match refused:
        case Damaged():
            advice = "run the same command again to fetch the bad part again"
        case Foreign():
            advice = f"remove it to fetch afresh, or pass --archive {part.path} to use it as it is"
        case _:
            part.remove()
            return "it was removed"
    return f"{part.path} is kept: {advice}"


def unpack_archive(data_dir: Path, archive: Path) -> None:
    """Make `data_dir` hold the data set in a local zip, which stays. Raises `DataError`."""
    data_dir, archive = _place(data_dir), archive.expanduser().absolute()
    with _alone(data_dir):
        if not _is_there(data_dir, str(archive), None):
            unpack(archive, data_dir, str(archive), progress=bar)
            _say_what_is_there(data_dir)


def _unpack_mending(
    part: Part, data_dir: Path, expected: Expected | None, patience: Patience
) -> None:
    """Unpack; the bytes for which it is refused are fetched again, once."""
    try:
        unpack(part.path, data_dir, part.source, expected, progress=bar)
    except Refused as refused:
        num_bytes = sum(end - start for start, end in refused.spans)
        print(f"{refused}; fetching {num_bytes} bytes again", flush=True)
        fetch_again(part, refused.spans, patience)
        unpack(part.path, data_dir, part.source, expected, progress=bar)


def _is_there(data_dir: Path, source: str, expected: Expected | None) -> bool:
    """Whether the data is in place already. Raises `DataError` where something else is."""
    try:
        is_empty = not any(data_dir.iterdir())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"data_dir: {data_dir} can't be read: {error.strerror}") from None
    if is_empty:
        if data_dir.is_mount():  # nothing can be moved into its place
            raise DataError(
                f"data_dir: {data_dir} is a disk of its own; pass a folder in it: "
                f"{data_dir / 'inaturalist_12K'}"
            )
        return False
    manifest = read_manifest(data_dir)
    if manifest is None:
        return _is_there_unmanaged(data_dir, expected)
    if Path(manifest["source"]).name != Path(source).name:
        raise DataError(
            f"{data_dir} holds the data of {manifest['source']}, not of {source}; pass another "
            "--data_dir"
        )
    if expected and (difference := expected.difference(manifest["pictures"])):
        raise DataError(f"{data_dir} holds another data set: {difference}; pass another --data_dir")
    if changed := changed_files(data_dir, manifest):
        raise DataError(
            f"{data_dir} is not whole any more: {len(changed)} files are gone or changed, such as "
            f"{changed[0]}; remove the folder and run the same command again"
        )
    _say_what_is_there(data_dir)
    return True


def _is_there_unmanaged(data_dir: Path, expected: Expected | None) -> bool:
    """Whether a folder that this program did not make holds what is expected."""
    try:
        found = find_data_dir(data_dir)
    except DataError:
        raise DataError(
            f"data_dir: {data_dir} holds something else already; pass a new or an empty folder"
        ) from None
    difference = expected.difference(_counts_of(found)) if expected else "nothing says which one"
    if difference:
        raise DataError(
            f"data_dir: {found} holds a data set already, which this command did not make "
            f"({difference}); pass another --data_dir, or `python -m finetune check` this one"
        )
    print(f"{found}: class names and counts are right; `python -m finetune check` reads it all")
    return True


def _counts_of(data_dir: Path) -> dict[str, dict[str, int]]:
    return count_pictures(
        f"{split}/{place.name}/{name}"
        for split in SPLITS
        if (data_dir / split).is_dir()
        for place in class_dirs(data_dir / split)
        for name in pictures_of_class(place)
    )


def _say_what_is_there(data_dir: Path) -> None:
    counts = _counts_of(data_dir)
    listed = ", ".join(f"{split}/ {sum(held.values())}" for split, held in counts.items())
    num_classes = len(counts.get("train", {}))
    print(f"{data_dir}: whole; {num_classes} classes; pictures: {listed}", flush=True)


def _check_room(data_dir: Path, missing_bytes: int, part: Part) -> None:
    """Room for the rest of the archive and, beside it, for pictures, which zip hardly shrinks."""
    assert part.total_bytes is not None
    needed = missing_bytes + 1.05 * part.total_bytes
    free = shutil.disk_usage(existing_parent(data_dir)).free
    if free < needed:
        raise DataError(
            f"data_dir: {data_dir} needs {needed / 1e9:.2f} GB, for the archive and for what is in "
            f"it; the disk has {free / 1e9:.2f} GB free. Pass a --data_dir on another disk"
        )


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Raises `DataError` while another process makes the same folder or file."""
    lock = FileLock(target.parent / f".{target.name}.lock", timeout=0)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DataError(f"{target} is being made by another process; wait for it") from None
    except OSError as error:
        raise DataError(f"{target.parent} can't be written: {error.strerror}") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _place(data_dir: Path) -> Path:
    """Where the folder is or will be, links followed. Raises `DataError` where it can't be."""
    place = Path(os.path.realpath(data_dir.expanduser()))
    try:
        stands = place.lstat()
    except OSError:  # nothing is there yet, or making it will say why it can't be
        return place
    if not stat.S_ISDIR(stands.st_mode):
        raise DataError(f"data_dir: {data_dir} is no folder; pass a new or an empty one")
    return place


# the weights


def checkpoints_dir() -> Path:
    """Where torch.hub keeps weights, by its own rules, without importing torch."""
    cache = Path(os.getenv("XDG_CACHE_HOME", "~/.cache"))
    home = Path(os.getenv("TORCH_HOME", cache / "torch"))
    return home.expanduser() / "hub" / "checkpoints"


def fetch_weights(url: str = WEIGHTS_URL, patience: Patience = PATIENCE) -> None:
    """Make torch.hub's file of these weights exist, its hash the one that its name promises.

    Raises `DataError` or `WeightsError`.
    """
    place = checkpoints_dir() / name_of(url)
    promised = place.stem.rpartition("-")[2]
    with _alone(place):
        if place.exists():
            if not sha256(place).startswith(promised):
                raise WeightsError(f"weights: {place} is damaged; remove it and run this again")
            print(f"weights: {place} is there, and whole")
            return
        part = Part(url, place.with_name(f"{place.name}.part"))
        fetch(part, patience, lambda missing: _check_room_for_weights(place, missing))
        found = sha256(part.path)
        if not found.startswith(promised):
            part.remove()
            raise WeightsError(
                f"weights: what {url} sent has the sha256 {found[:12]}..., and its name promises "
                f"{promised}; it was removed"
            )
        part.path.replace(place)
        part.remove()
        print(f"weights: {place}", flush=True)


def _check_room_for_weights(place: Path, missing_bytes: int) -> None:
    free = shutil.disk_usage(existing_parent(place)).free
    if free < missing_bytes:
        raise DataError(f"{place}: {missing_bytes} bytes don't fit; the disk has {free} free")
