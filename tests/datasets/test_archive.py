from __future__ import annotations

import io
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.data.layout import find_layout
from finetune.datasets import zip_safety
from finetune.datasets.archive import read_manifest, unpack
from finetune.datasets.zip_safety import ArchiveError, find_root
from finetune.system.errors import DataError
from tests.support.picture_trees import tree, zipped

FILES = tree()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "inside"


def write(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    archive = folder / "data.zip"
    archive.write_bytes(content)
    return archive


def with_names(rename: Callable[[str], bytes], marked: Callable[[str], bool]) -> bytes:
    """A zip of FILES with these bytes as names, of which some are marked as UTF-8."""

    class Info(zipfile.ZipInfo):
        def _encodeFilenameFlags(self) -> tuple[bytes, int]:
            flag = 0x800 if marked(self.filename) else 0
            return rename(self.filename), self.flag_bits | flag

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(Info(name), content)
    return out.getvalue()


def never(name: str) -> bool:
    return False


def with_windows_paths(root: str) -> bytes:
    return with_names(lambda name: (root + name).replace("/", "\\").encode(), never)


def assert_nothing_left(folder: Path) -> None:
    """The archive is the only file, in its folder and beside it."""
    assert [p.relative_to(folder.parent).as_posix() for p in folder.parent.rglob("*")] == [
        "inside",
        "inside/data.zip",
    ]


def with_member(name: str, content: bytes = b"x", kind: int = 0) -> bytes:
    """A valid archive with an additional member."""
    out = io.BytesIO(zipped(FILES))
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(info, content)
    return out.getvalue()


@pytest.mark.parametrize("root", ["", "inaturalist_12K/", "mirror/nature 12K/", "a/b/c/"])
def test_the_data_set_is_found_at_any_depth(folder: Path, root: str) -> None:
    unpack(write(folder, zipped(FILES, root)), folder / "data", "test")
    assert {n: (folder / "data" / n).read_bytes() for n in FILES} == FILES
    assert find_layout(folder / "data").data_dir == folder / "data"


@pytest.mark.parametrize("root", ["", "inaturalist_12K/", "mirror/nature 12K/"])
def test_backslashes_separate_folders(
    folder: Path, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    unpack(write(folder, with_windows_paths(root)), folder / "data", "test")
    assert {n: (folder / "data" / n).read_bytes() for n in FILES} == FILES
    assert "backslashes in names are read as separators of folders" in capsys.readouterr().out


def test_folders_of_their_own_with_backslashes_are_no_files(folder: Path) -> None:
    archive = write(folder, with_windows_paths("d/"))
    with zipfile.ZipFile(archive, "a") as opened:
        for name in ("d\\", "d\\train\\", "d\\train\\Aves\\"):
            opened.writestr(name, b"")
    unpack(archive, folder / "data", "test")
    assert {n: (folder / "data" / n).read_bytes() for n in FILES} == FILES


CHINESE, RARE, ACCENTED = "两栖动物", "朱镕", "Möwen und Füchse"


@pytest.mark.parametrize(
    ("name", "encoding", "assumed"),
    [
        (CHINESE, "gbk", "gbk"),
        (f"{CHINESE}{RARE}", "gbk", "gbk"),
        (f"{CHINESE}誠", "gbk", "gbk"),  # whose second byte is that of a backslash
        (CHINESE, "utf-8", "utf-8"),
        (ACCENTED, "utf-8", "utf-8"),
        (ACCENTED, "cp437", "cp437"),
        ("Pájaros", "cp437", "cp437"),
    ],
)
@pytest.mark.parametrize("separator", "/\\")
def test_names_that_are_not_marked_as_utf8_are_decoded(
    folder: Path,
    name: str,
    encoding: str,
    assumed: str,
    separator: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rename(path: str) -> bytes:
        return path.replace("Aves", name).replace("/", separator).encode(encoding)

    counts = unpack(write(folder, with_names(rename, never)), folder / "data", "test")
    assert counts == {split: {name: n, "Fungi": n} for split, n in (("train", 3), ("val", 2))}
    assert (folder / "data" / "val" / name / "001.jpg").is_file()
    assert f"names that are not marked as UTF-8 are read as {assumed}" in capsys.readouterr().out


def test_names_marked_as_utf8_are_utf8_beside_names_in_gbk(folder: Path) -> None:
    def rename(path: str) -> bytes:
        known = {"Aves": CHINESE, "Fungi": ACCENTED}
        for old, new in known.items():
            path = path.replace(old, new)
        return path.encode("gbk" if CHINESE in path else "utf-8")

    content = with_names(rename, lambda path: "Fungi" in path)
    counts = unpack(write(folder, content), folder / "data", "test")
    assert counts["train"] == {CHINESE: 3, ACCENTED: 3}


def test_nothing_is_assumed_about_plain_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unpack(write(folder, zipped(FILES)), folder / "data", "test")
    assert capsys.readouterr().out == ""


def test_files_beside_the_splits_are_left_out(folder: Path) -> None:
    extra = {
        "__MACOSX/inaturalist_12K/train/Aves/._000.jpg": b"x",
        "inaturalist_12K/.DS_Store": b"x",
        "inaturalist_12K/train/.DS_Store": b"x",
        "inaturalist_12K/LICENSE": b"x",
        "README.txt": b"x",
    }
    content = zipped({f"inaturalist_12K/{n}": c for n, c in FILES.items()} | extra, root="")
    unpack(write(folder, content), folder / "data", "test")
    made = folder / "data"
    found = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert found == FILES.keys() | {"manifest.json"}


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("/etc/cron.d/x", 0, "not a relative path"),
        ("../outside.jpg", 0, "leads out"),
        ("inaturalist_12K/train/Aves/../../../../outside.jpg", 0, "leads out"),
        ("..\\outside.jpg", 0, "leads out"),
        ("inaturalist_12K\\train\\Aves\\..\\..\\..\\..\\outside.jpg", 0, "leads out"),
        ("inaturalist_12K/train/Aves\\../../../..\\outside.jpg", 0, "leads out"),
        ("\\windows\\x.jpg", 0, "not a relative path"),
        ("\\\\server\\share\\x.jpg", 0, "not a relative path"),
        ("C:/windows/x.jpg", 0, "not a relative path"),
        ("C:\\windows\\x.jpg", 0, "not a relative path"),
        ("inaturalist_12K\\train\\Aves\\000.jpg\\x.jpg", 0, "also a file"),
        ("inaturalist_12K\\\\train\\Aves\\x.jpg", 0, "empty"),
        ("inaturalist_12K\\train\\Aves\\x.jpg\0.png", 0, "invalid parts"),
        ("inaturalist_12K/train/Aves/link.jpg", stat.S_IFLNK, "link"),
        ("inaturalist_12K/train/Linked", stat.S_IFLNK, "link"),
        ("inaturalist_12K/train/Aves/pipe.jpg", stat.S_IFIFO, "special"),
        ("inaturalist_12K/train/Aves/000.jpg/x.jpg", 0, "also a file"),
        ("", 0, "empty"),
        ("inaturalist_12K//train/Aves/000.jpg", 0, "empty"),
        ("inaturalist_12K/train/Aves/./000.jpg", 0, "invalid parts"),
        (f"inaturalist_12K/train/Aves/{'n' * 300}.jpg", 0, "too long"),
    ],
)
def test_an_unsafe_member_is_refused_and_nothing_is_left(
    folder: Path, name: str, kind: int, words: str
) -> None:
    archive = write(folder, with_member(name, b"/etc/passwd", kind))
    with pytest.raises(ArchiveError, match=words):
        unpack(archive, folder / "data", "test")
    assert_nothing_left(folder)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("separator", "/\\")
def test_a_duplicate_member_is_refused(folder: Path, separator: str) -> None:
    name = "inaturalist_12K/train/Aves/000.jpg".replace("/", separator)
    archive = write(folder, with_member(name))
    with pytest.raises(ArchiveError, match="twice"):
        unpack(archive, folder / "data", "test")
    assert_nothing_left(folder)


def test_an_encrypted_member_is_refused(folder: Path) -> None:
    content = bytearray(zipped(FILES))
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= 1
    with pytest.raises(ArchiveError, match="encrypted"):
        unpack(write(folder, bytes(content)), folder / "data", "test")
    assert_nothing_left(folder)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_method_that_unpacks_in_blocks_of_any_size_is_refused(folder: Path, method: int) -> None:
    """Such a member may be larger than its header says and fill the memory."""
    archive = write(folder, zipped(FILES))
    with zipfile.ZipFile(archive, "a", method) as opened:
        opened.writestr("inaturalist_12K/train/Aves/bomb.jpg", bytes(1000))
    with pytest.raises(
        ArchiveError, match=r"bomb.jpg' is packed by method \d+; 0 and 8 are allowed"
    ):
        unpack(archive, folder / "data", "test")
    assert_nothing_left(folder)


def test_a_damaged_name_is_detected_without_expected_counts(folder: Path) -> None:
    content = zipped(FILES)
    directory = content.index(b"PK\x01\x02")
    content = content[:directory] + content[directory:].replace(
        b"train/Aves/000", b"trbin/Aves/000"
    )
    with pytest.raises(ArchiveError, match="trbin/Aves/000"):
        unpack(write(folder, content), folder / "data", "test")
    assert_nothing_left(folder)


def test_a_zip_bomb_is_refused_by_its_compression_ratio(folder: Path) -> None:
    archive = write(folder, with_member("inaturalist_12K/train/Aves/bomb.jpg", b""))
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("inaturalist_12K/train/Aves/zeros.jpg", bytes(20_000_000))
    with pytest.raises(ArchiveError, match="100 times its own size"):
        unpack(archive, folder / "data", "test")
    assert_nothing_left(folder)


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [("MAX_MEMBERS", 9, "10 members; at most 9"), ("MAX_BYTES", 5000, "at most 5000")],
)
def test_too_many_members_or_bytes_are_refused(
    folder: Path, limit: str, value: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zip_safety, limit, value)
    archive = write(folder, zipped(FILES))
    with pytest.raises(ArchiveError, match=words):
        unpack(archive, folder / "data", "test")
    assert_nothing_left(folder)


def lying_about_size(content: bytes) -> bytes:
    """Both headers of the first member say that it has ten bytes."""
    lied = bytearray(content)
    for magic, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = lied.index(magic) + offset
        lied[at : at + 4] = (10).to_bytes(4, "little")
    return bytes(lied)


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def with_flipped_byte(content: bytes) -> bytes:
    flipped = bytearray(content)
    flipped[300] ^= 0xFF
    return bytes(flipped)


def with_other_local_name(content: bytes) -> bytes:
    return content.replace(b"train/Aves/000.jpg", b"train/Aves/00X.jpg", 1)


@pytest.mark.parametrize(
    "damage", [lying_about_size, truncated, with_flipped_byte, with_other_local_name]
)
def test_a_damaged_archive_is_refused_and_nothing_is_left(
    folder: Path, damage: Callable[[bytes], bytes]
) -> None:
    archive = write(folder, damage(zipped(FILES)))
    with pytest.raises(ArchiveError, match="damaged"):
        unpack(archive, folder / "data", "test")
    assert_nothing_left(folder)


def test_the_manifest_is_written_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    write_text = Path.write_text

    def watch(path: Path, *args: object, **options: object) -> int:
        seen.append({p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*.jpg")})
        return write_text(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", watch)
    unpack(write(folder, zipped(FILES)), folder / "data", "test")
    assert seen == [set(FILES)]


def test_leftovers_of_an_interrupted_unpacking_are_replaced(folder: Path) -> None:
    archive = write(folder, zipped(FILES))
    half = folder / ".data.unpacking" / "train" / "Aves"
    half.mkdir(parents=True)
    (half / "000.jpg").write_bytes(b"half")
    unpack(archive, folder / "data", "test")
    assert (folder / "data/train/Aves/000.jpg").read_bytes() == FILES["train/Aves/000.jpg"]
    assert not half.exists()


def test_a_folder_with_files_is_not_overwritten(folder: Path) -> None:
    archive = write(folder, zipped(FILES))
    (folder / "data").mkdir()
    (folder / "data" / "mine").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        unpack(archive, folder / "data", "test")
    assert [p.name for p in (folder / "data").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/train/X/1.jpg", "a/val/X/1.jpg", "b/train/X/1.jpg", "b/val/X/1.jpg"], "found.*a/.*b/"),
        (["a/train/X/1.jpg", "b/val/X/1.jpg"], "found"),
        (["train/1.jpg", "val/1.jpg"], "found"),
        ([], "found"),
    ],
)
def test_an_archive_must_have_exactly_one_train_and_val_folder(
    names: list[str], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        find_root(names)


def test_a_class_may_be_called_train() -> None:
    assert find_root(["d/train/train/1.jpg", "d/val/train/1.jpg"]) == "d/"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", json.dumps({"other": 1}), json.dumps({"files": [], "source": "", "pictures": {}})],
)
def test_an_invalid_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError):
        read_manifest(tmp_path)
