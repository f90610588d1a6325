"""Pictures that would crash, hang or exhaust memory are refused, each by its name."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.__main__ import main
from finetune.data.decode import Preprocessing, decode, decode_many
from finetune.datasets.check import examine
from finetune.runs.result import RunResult
from finetune.system.errors import DataError, FinetuneError

NUM_DAMAGED = int(os.environ.get("NUM_DAMAGED", "500"))


def picture(rng: random.Random, format_name: str) -> bytes:
    size = (rng.randrange(1, 80), rng.randrange(1, 80))
    mode = rng.choice(["RGB", "L", "CMYK" if format_name == "JPEG" else "RGBA"])
    pixels = np.frombuffer(rng.randbytes(size[0] * size[1] * len(mode)), np.uint8)
    image = Image.frombytes(mode, size, pixels.tobytes())
    options: dict[str, Any] = {"progressive": rng.random() < 0.5} if format_name == "JPEG" else {}
    out = io.BytesIO()
    image.save(out, format_name, **options)
    return out.getvalue()


def spoilt(rng: random.Random) -> bytes:
    """A JPEG or a PNG with one kind of damage."""
    kinds = ("JPEG", "PNG")
    content = bytearray(picture(rng, rng.choice(kinds)))
    match rng.choice(("truncated", "flipped", "spliced", "header", "lengths")):
        case "truncated":
            del content[rng.randrange(len(content)) :]
        case "flipped":
            for _ in range(rng.randrange(1, 30)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "spliced":
            other = picture(rng, rng.choice(kinds))
            at = rng.randrange(len(content))
            content[at:] = other[rng.randrange(len(other)) :]
        case "header":
            content[: rng.randrange(2, 30)] = rng.randbytes(rng.randrange(2, 30))
        case "lengths":
            at = rng.randrange(2, len(content))
            content[at : at + 2] = rng.choice((b"\xff\xff", b"\x00\x00", b"\x7f\xff"))
    return bytes(content)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("damaged"), random.Random(8)
    paths = []
    for i in range(NUM_DAMAGED):
        path = folder / f"{i:03}.{rng.choice(('jpg', 'png'))}"
        path.write_bytes(spoilt(rng))
        paths.append(path)
    return paths


def test_damaged_pictures_are_read_or_refused_by_name(damaged: list[Path]) -> None:
    found: dict[int, Any] = {}
    decode_many(damaged, Preprocessing(32), found.__setitem__)
    assert sorted(found) == list(range(len(damaged)))
    refused = [str(one) for one in found.values() if isinstance(one, DataError)]
    assert len(refused) > len(damaged) / 3
    for i, one in found.items():
        if isinstance(one, DataError):
            assert str(one).startswith(f"{damaged[i]} can't be read as a picture: ")
            assert "\n" not in str(one)
        else:
            assert one.image.shape == (32, 32, 3)


@pytest.fixture(scope="module")
def spoilt_tree(
    damaged: list[Path], digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The digits with a hundred damaged pictures among them."""
    tree = tmp_path_factory.mktemp("tree")
    for path in digits.glob("*/*/*.png"):
        place = tree / path.relative_to(digits)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    for i, path in enumerate(damaged[:100]):
        split, label = ("train", "val")[i % 2], "56789"[i % 5]
        (tree / split / label / f"bad-{path.name}").write_bytes(path.read_bytes())
    return tree


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_run_stops_at_damaged_pictures_or_skips_them(
    cache: str, spoilt_tree: Path, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fields |= {"data_dir": spoilt_tree, "strategy": "freeze", "epochs": 1, "image_size": 32}
    with pytest.raises(DataError, match="repair or remove it, or pass --skip_unreadable"):
        finetune.train_and_finetune(**fields, cache=cache)
    model = finetune.train_and_finetune(**fields, cache=cache, skip_unreadable=True)
    result = model.result
    assert isinstance(result, RunResult)
    unreadable = examine(spoilt_tree).unreadable
    assert sorted(result.unreadable) == sorted(unreadable)
    assert result.num_train + result.num_val == 35 + 100 - len(unreadable)
    capsys.readouterr()
    run_dir = Path(result.config["out"]) / result.run_id
    assert main(["predict", str(run_dir), str(spoilt_tree), "--json"]) == 1
    answers = json.loads(capsys.readouterr().out)
    bad = {a["path"].removeprefix(f"{spoilt_tree}/") for a in answers if a["class"] is None}
    assert bad == set(unreadable)


def chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(width: int, height: int, *before: bytes, body: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


BOMBS = {
    "pixels.png": png(60_000, 60_000, body=zlib.compress(bytes(1_000_000))),
    "claim.png": png(2**31 - 1, 2**31 - 1),
    "text.png": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))),
    "claim.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),  # noqa: E501
    "claim.ppm": b"P6 2000000000 2000000000 255\n",
    "loop.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_uses_no_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="can't be read as a picture"):
        decode(path, Preprocessing(32))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_picture_of_another_format_is_read_and_no_program_is_executed(tmp_path: Path) -> None:
    """Pillow would pass an EPS to Ghostscript, whatever the name of its file."""
    gif, eps = tmp_path / "a.jpg", tmp_path / "b.jpg"
    Image.new("RGB", (9, 9), (200, 0, 0)).save(gif, "GIF")
    assert decode(gif, Preprocessing(32)).image[0, 0].tolist() == [200, 0, 0]
    Image.new("RGB", (9, 9)).save(eps, "EPS")
    with pytest.raises(DataError, match="cannot identify image file"):
        decode(eps, Preprocessing(32))


def test_no_command_follows_loops_of_links(
    fields: dict[str, Any], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop, tree = tmp_path / "loop", tmp_path / "tree"
    loop.symlink_to(loop)
    tree.mkdir()
    for split in ("train", "val"):
        (tree / split).symlink_to(digits / split)
    (tree / "again").symlink_to(tree)
    (tree / "loop.jpg").symlink_to(tree / "loop.jpg")
    assert not examine(tree).breaks_a_run
    model = finetune.train_and_finetune(
        **fields | {"data_dir": tree, "epochs": 1, "strategy": "freeze", "out": tree / "runs"}
    )
    assert isinstance(model.result, RunResult)
    run_dir = tree / "runs" / model.result.run_id
    (tree / "runs" / "up").symlink_to(tree)
    assert not main(["report", str(tree / "runs")])
    capsys.readouterr()
    assert main(["predict", str(run_dir), str(tree / "loop.jpg"), str(tree), "--json"]) == 1
    answers = json.loads(capsys.readouterr().out)
    assert [a["path"] for a in answers if a["class"] is None] == [str(tree / "loop.jpg")] * 2
    for command in (
        ["check", "--data_dir", loop],
        ["report", loop],
        ["predict", loop, loop],
        ["sweep", loop],
        ["download", "--data_dir", loop, "--archive", loop],
        ["confirm", loop],
    ):
        with pytest.raises(FinetuneError):
            main([*map(str, command)])
    for name in ("out", "cache_dir", "data_dir", "weights", "config", "resume"):
        small = fields | {"epochs": 1, "strategy": "freeze", name: loop}
        if name == "cache_dir":
            finetune.train_and_finetune(**small)
            continue
        with pytest.raises(FinetuneError, match=str(loop)):
            finetune.train_and_finetune(**small)
