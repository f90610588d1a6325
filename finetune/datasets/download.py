"""Download iNaturalist-12K and ImageNet's weights, for machines that have no network later."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from finetune.config.backbones import BACKBONES, DEFAULT_MODEL, known_backbone
from finetune.data.layout import split_of
from finetune.datasets.archive import Counts, ExpectedDataset, read_manifest, sha256, unpack
from finetune.datasets.fetch import PartialDownload, fetch
from finetune.datasets.zip_safety import ArchiveError, UnexpectedArchive
from finetune.system.errors import ConfigError, DataError, WeightsError
from finetune.system.text import command_line

INATURALIST_URL = "https://storage.googleapis.com/wandb_datasets/nature_12K.zip"
INATURALIST = ExpectedDataset(
    frozenset(
        {"Amphibia", "Animalia", "Arachnida", "Aves", "Fungi"}
        | {"Insecta", "Mammalia", "Mollusca", "Plantae", "Reptilia"}
    ),
    {"train": 9_999, "val": 2_000},
)
WEIGHTS_SERVER = "https://download.pytorch.org/models/"
"""Has torchvision's weights; a file's name ends in the start of its sha256."""


def download(
    data_dir: Path,
    url: str | None = None,
    archive: Path | None = None,
    weights_only: Sequence[str] | None = None,
) -> None:
    """Download the data set, from `url` or a local `archive`, and the default network's weights.

    `weights_only`: no data, and the weights of these networks (of none: of the default one).
    """
    if [url is not None, archive is not None, weights_only is not None].count(True) > 1:
        raise ConfigError("url, archive, weights_only: only one of them may be given")
    names = [weights_name(model) for model in weights_only or [DEFAULT_MODEL]]
    if archive is not None:
        unpack_archive(data_dir, archive)
    elif url is not None:
        fetch_data(data_dir, url, None)
    elif weights_only is None:
        fetch_data(data_dir, INATURALIST_URL, INATURALIST)
    for name in names:
        fetch_weights(WEIGHTS_SERVER + name)
    if weights_only is None:
        print("next:", command_line("-m", "finetune", "check", "--data_dir", data_dir))
        print("next:", command_line("-m", "finetune", "best", data_dir, "--minutes", 15))


def weights_name(model: str) -> str:
    """The file name of a network's ImageNet weights. Raises `ConfigError` if it has none."""
    backbone = known_backbone(model)
    if backbone is None or backbone.weights_file is None:
        known = [name for name, entry in BACKBONES.items() if entry.weights_file]
        raise ConfigError(
            f"weights_only: no ImageNet weights of {model} are known; of {', '.join(known)} they "
            "are. timm downloads those of its networks at the first run"
        )
    return backbone.weights_file


def fetch_data(data_dir: Path, url: str, expected: ExpectedDataset | None) -> None:
    """Make `data_dir` hold the data set in the zip at `url`. Raises `DataError`.

    The archive is kept in NAME.zip.part beside `data_dir` until it is unpacked.
    """
    data_dir = Path(os.path.realpath(data_dir.expanduser()))
    partial = PartialDownload(url, data_dir.parent)
    with _locked(data_dir.parent):
        if _is_complete(data_dir, partial.source, expected):
            return
        fetch(partial, unpacked_ratio=1.05)  # unpacked, pictures are hardly larger
        try:
            counts = unpack(partial.path, data_dir, partial.source, expected)
        except UnexpectedArchive as error:
            raise DataError(
                f"{error}; {partial.path} is kept: remove it to download it again, or pass "
                f"--archive {partial.path} to use it as it is"
            ) from None
        except ArchiveError as error:
            partial.remove()
            raise DataError(f"{error}; it was removed: run the same command again") from None
        partial.remove()
        _print_summary(data_dir, counts)


def unpack_archive(data_dir: Path, archive: Path) -> None:
    """Make `data_dir` hold the data set in a local zip, which is kept. Raises `DataError`."""
    data_dir = Path(os.path.realpath(data_dir.expanduser()))
    archive = archive.expanduser().absolute()
    with _locked(data_dir.parent):
        if not _is_complete(data_dir, str(archive), None):
            _print_summary(data_dir, unpack(archive, data_dir, str(archive)))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises `DataError` while another process downloads into the same folder."""
    lock = FileLock(folder / ".download.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DataError(f"{folder}: another process is downloading into it; wait for it") from None
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _is_complete(data_dir: Path, source: str, expected: ExpectedDataset | None) -> bool:
    """Whether the data set exists already. Raises `DataError` if anything else does."""
    try:
        is_empty = not any(data_dir.iterdir())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"data_dir: {data_dir} cannot be read: {error.strerror}") from None
    if is_empty and data_dir.is_mount():  # no folder can be renamed to it
        raise DataError(f"data_dir: {data_dir} is a mount point; pass a folder in it")
    if is_empty:
        return False
    manifest = read_manifest(data_dir)
    if manifest is None:
        raise DataError(
            f"data_dir: {data_dir} holds files that this command did not make; pass a new or an "
            "empty folder. A data set that you unpacked yourself needs no download"
        )
    difference = expected.difference(manifest["pictures"]) if expected else None
    if difference or Path(manifest["source"]).name != Path(source).name:
        raise DataError(
            f"{data_dir} holds the data of {manifest['source']}, not of {source}"
            f"{f' ({difference})' if difference else ''}; pass another --data_dir"
        )
    changed = [
        name
        for name, (num_bytes, _) in manifest["files"].items()
        if not (path := data_dir / name).is_file() or path.stat().st_size != num_bytes
    ]
    if changed:
        raise DataError(
            f"{data_dir} is incomplete: {len(changed)} files are missing or changed, such as "
            f"{changed[0]}; remove the folder and run the same command again"
        )
    _print_summary(data_dir, manifest["pictures"])
    return True


def _print_summary(data_dir: Path, counts: Counts) -> None:
    listed = ", ".join(f"{split}/ {sum(classes.values())}" for split, classes in counts.items())
    num_classes = max(
        (len(c) for name, c in counts.items() if split_of(name) == "train"), default=0
    )
    print(f"{data_dir}: complete; {num_classes} classes; pictures: {listed}", flush=True)


def checkpoints_dir() -> Path:
    """Where torch.hub keeps weights, by its own rules, without importing torch."""
    cache = Path(os.getenv("XDG_CACHE_HOME", "~/.cache"))
    home = Path(os.getenv("TORCH_HOME", cache / "torch"))
    return home.expanduser() / "hub" / "checkpoints"


def fetch_weights(url: str) -> None:
    """Make torch.hub's file of these weights exist, with the hash that its name promises."""
    folder = checkpoints_dir()
    partial = PartialDownload(url, folder)
    path = folder / partial.name
    promised = path.stem.rpartition("-")[2]
    with _locked(folder):
        if path.exists() and sha256(path).startswith(promised):
            print(f"weights: {path} exists already")
            return
        fetch(partial)
        found = sha256(partial.path)
        if not found.startswith(promised):
            partial.remove()
            raise WeightsError(
                f"weights: {partial.source} has the sha256 {found[:12]}..., but its name promises "
                f"{promised}; it was removed: run the same command again"
            )
        partial.path.replace(path)
        partial.remove()
        print(f"weights: {path}", flush=True)
