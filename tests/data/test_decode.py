"""A picture is decoded as a viewer shows it, whatever its format, orientation and bit depth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps

from finetune.data import formats
from finetune.data.bit_depth import find_range
from finetune.data.decode import Preprocessing, decode
from finetune.data.formats import has_picture_content, shown
from finetune.system.errors import DataError

Image.init()
needs_avif = pytest.mark.skipif("AVIF" not in Image.SAVE, reason="Pillow before 11.3")

SIZE = 32
ARROW = np.full((48, 64, 3), 255, dtype=np.uint8)
ARROW[:16, :24] = (200, 30, 30)  # only one corner is dark, so every turn gives another picture
ARROW[16:32, :8] = (30, 30, 200)


def pixels(path: Path, **preprocessing: Any) -> np.ndarray[Any, Any]:
    return decode(path, Preprocessing(SIZE, **preprocessing)).image.numpy().astype(int)


def save_turned(path: Path, orientation: int) -> Path:
    """The arrow's pixels turned, with the EXIF orientation by which a viewer turns them back."""
    turned = Image.fromarray(ARROW)
    if orientation > 1:
        turned.getexif()[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)
        turned = ImageOps.exif_transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(path, exif=exif, **({"quality": 95} if path.suffix in (".jpg", ".webp") else {}))
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "suffix", ["jpg", "png", "webp", "tiff", pytest.param("avif", marks=needs_avif)]
)
def test_every_orientation_is_decoded_upright(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    Image.fromarray(ARROW).save(tmp_path / "upright.png")
    path = save_turned(tmp_path / f"x.{suffix}", orientation)
    difference = np.abs(pixels(path) - pixels(tmp_path / "upright.png"))
    assert difference.mean() < 4
    decoded = decode(path, Preprocessing(SIZE))
    assert (decoded.width, decoded.height) == (64, 48)
    if suffix != "avif":  # the file turns it by its own means
        assert decoded.orientation == orientation
    assert np.asarray(shown(path)).shape == (48, 64, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
@pytest.mark.parametrize(("background", "level"), [("white", 255), ("#204060", None)])
def test_transparent_pixels_have_the_background_s_colour(
    tmp_path: Path, mode: str, background: str, level: int | None
) -> None:
    """Black ink on a transparent ground whose hidden colour is black too."""
    ink = Image.new("LA", (SIZE, SIZE), (0, 0))
    ink.paste((0, 255), (0, 0, 16, SIZE))
    suffix = "tiff" if mode == "PA" else "png"
    image = ink.convert("RGBA")
    if mode == "P":
        image = Image.new("P", (SIZE, SIZE), 1)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(0, (0, 0, 16, SIZE))
        image.save(tmp_path / "x.png", transparency=1)
    elif mode == "PA":
        image.save(tmp_path / "x.tiff")
    else:
        image.convert(mode).save(tmp_path / "x.png")
    found = pixels(tmp_path / f"x.{suffix}", background=background)
    assert found[5, 4].tolist() == [0, 0, 0]
    assert found[5, 28].tolist() == ([level] * 3 if level else [0x20, 0x40, 0x60])


def ramp(low: float, high: float) -> np.ndarray[Any, Any]:
    return np.linspace(low, high, SIZE * SIZE).reshape(SIZE, SIZE)


def save_deep(folder: Path, kind: str, low: float, high: float) -> list[Path]:
    """Two pictures of a data set: one over its whole range, one over the lower half."""
    dtype = {"png16": np.uint16, "tiff16": np.uint16, "float": np.float32, "int32": np.int32}[kind]
    paths = [folder / f"{name}.{'png' if kind == 'png16' else 'tiff'}" for name in ("a", "b")]
    for path, top in zip(paths, (high, (low + high) / 2), strict=True):
        Image.fromarray(ramp(low, top).astype(dtype)).save(path)
    return paths


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("png16", 0, 4095),
        ("tiff16", 0, 4095),
        ("png16", 0, 65535),
        ("float", 0, 1),
        ("float", -1, 1),
        ("int32", -1024, 3071),
        ("int32", 0, 255),
        ("float", 0, 255),
    ],
)
def test_deep_pictures_are_scaled_by_the_range_of_their_data_set(
    tmp_path: Path, kind: str, low: float, high: float
) -> None:
    whole, half = save_deep(tmp_path, kind, low, high)
    found = find_range([whole, half])
    assert found is not None
    assert found == pytest.approx((low, high), abs=0.01 * (high - low))
    expected = (ramp(0, 255), ramp(0, 127.5))
    for path, levels in zip((whole, half), expected, strict=True):
        assert np.abs(pixels(path, pixel_range=found)[..., 0] - levels).max() <= 3
        assert decode(path, Preprocessing(SIZE, "white", found)).value_range is not None


def test_eight_bit_pictures_have_no_range_and_keep_their_values(tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path in paths:
        Image.fromarray(ramp(0, 100).astype(np.uint8)).save(path)
    assert find_range(paths) is None
    Image.fromarray(ramp(0, 4095).astype(np.uint16)).save(tmp_path / "c.png")
    mixed = find_range([*paths, tmp_path / "c.png"])
    assert mixed is not None
    assert np.array_equal(pixels(paths[0], pixel_range=mixed), pixels(paths[0]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_picture_with_nan_is_refused_by_its_path(tmp_path: Path, value: float) -> None:
    values = ramp(0, 1).astype(np.float32)
    values[3, 4] = value
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(DataError, match=r"x\.tiff can't be read.*NaN or infinite"):
        pixels(tmp_path / "x.tiff", pixel_range=(0.0, 1.0))


def test_32_bit_pictures_without_a_known_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(ramp(0, 1).astype(np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(DataError, match=r"x\.tiff.*no range is known.*--pixel_range LOW\.\.HIGH"):
        pixels(tmp_path / "x.tiff")


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        ("x.jfif", "JPEG"),
        ("x.jpe", "JPEG"),
        ("x.gif", "GIF"),
        pytest.param("x.avif", "AVIF", marks=needs_avif),
        ("x", "JPEG"),
        ("x.png", "JPEG"),
        ("x.webp", "WEBP"),
        ("x.tif", "TIFF"),
    ],
)
def test_a_picture_is_read_by_its_content(tmp_path: Path, name: str, format_name: str) -> None:
    path = tmp_path / name
    Image.fromarray(ARROW).save(path, format_name)
    assert has_picture_content(path)
    assert decode(path, Preprocessing(SIZE)).format == format_name
    assert np.abs(pixels(path)[20:, 20:] - 255).mean() < 4


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(path) - [255, 0, 0]).max() <= 2


def test_without_avif_in_pillow_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_known_formats", lambda: ("JPEG", "PNG"))
    (tmp_path / "x.avif").write_bytes(b"\0\0\0\x1cftypavif" + bytes(20))
    with pytest.raises(DataError, match=r"x\.avif.*AVIF picture; to read them: pip install 'pil"):
        pixels(tmp_path / "x.avif")


def test_heic_is_read_with_pillow_heif_and_else_the_message_names_it(tmp_path: Path) -> None:
    path = tmp_path / "x.heic"
    pillow_heif.from_pillow(Image.fromarray(ARROW)).save(path, quality=95)
    assert has_picture_content(path)
    assert np.abs(pixels(path)[20:, 20:] - 255).mean() < 4
    program = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from pathlib import Path\n"
        "from finetune.data.formats import open_picture\n"
        f"open_picture(Path({str(path)!r}))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith(
        "ValueError: it is a HEIF picture; to read them: pip install pillow-heif"
    )


def photograph(quality: int = 90) -> bytes:
    import io

    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((160, 120)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize("padding", [b"\0" * 512, b"\0", b"\r\n", b"trailing data" * 9])
def test_a_jpeg_with_bytes_after_its_end_is_read(tmp_path: Path, padding: bytes) -> None:
    (tmp_path / "x.jpg").write_bytes(photograph())
    (tmp_path / "padded.jpg").write_bytes(photograph() + padding)
    assert np.array_equal(pixels(tmp_path / "padded.jpg"), pixels(tmp_path / "x.jpg"))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_jpeg_that_ends_early_is_refused_by_its_path_without_another_line(
    tmp_path: Path, share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    content = photograph()
    (tmp_path / "x.jpg").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"x\.jpg can't be read as a picture: .*truncated"):
        pixels(tmp_path / "x.jpg")
    assert capfd.readouterr().err == ""


def test_equal_pixels_have_equal_hashes_whatever_the_file(tmp_path: Path) -> None:
    image = Image.fromarray(ARROW)
    names = ("a.png", "b.bmp", "c.tiff", "d.png")
    for name in names:
        image.save(tmp_path / name, **({"compress_level": 1} if name == "d.png" else {}))
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    hashes = [decode(tmp_path / name, Preprocessing(SIZE)).pixels_hash for name in names]
    assert len(set(hashes)) == 1
    other = decode(tmp_path / "turned.png", Preprocessing(64, "black")).pixels_hash
    assert other not in hashes
