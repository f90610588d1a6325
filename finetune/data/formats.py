"""Picture files: which formats are read, how they are opened, and how a viewer shows them."""

import stat
from functools import cache
from pathlib import Path
from typing import cast

from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF", "AVIF")
"""The formats, in Pillow's names, that a picture's content may have, whatever its suffix. Pillow's
readers for other formats are less safe: an EPS file is executed by Ghostscript."""

_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_SIGNATURE_BYTES = 32
_ORIENTATION = 0x0112  # the EXIF tag


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_picture(path: Path) -> Image.Image:
    """The file as Pillow's lazy image, by its content; `OSError` or `ValueError` if it is none."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
        raise ValueError("it is not a regular file")
    try:
        return Image.open(path, formats=_known_formats())
    except UnidentifiedImageError:
        start = first_bytes(path, _SIGNATURE_BYTES)
        if _is_avif(start) and "AVIF" not in _known_formats():
            advice = "to read them: pip install 'pillow>=11.3'"
            raise ValueError(f"it is an AVIF picture; {advice}") from None
        if not _is_heif(start):
            raise
    try:
        import pillow_heif
    except ImportError:
        raise ValueError("it is a HEIF picture; to read them: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()
    return Image.open(path, formats=("HEIF",))


def _is_heif(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS


def _is_avif(start: bytes) -> bool:
    return start[4:12] in (b"ftypavif", b"ftypavis")


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file; none if it can't be read. A pipe, which would block, has none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def has_picture_content(path: Path) -> bool:
    """Whether the file starts as a picture of these formats does; for files of unknown suffix.

    >>> has_picture_content(Path(__file__))
    False
    """
    start = first_bytes(path, _SIGNATURE_BYTES)
    is_tiff = start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return start.startswith(starts) or is_tiff or is_webp or _is_heif(start) or _is_avif(start)


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 is upright."""
    return int(image.getexif().get(_ORIENTATION, 1))


def turn_upright(image: Image.Image) -> Image.Image:
    """Load the picture and apply EXIF's orientation in place; Pillow itself does so for a TIFF."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def opaque(image: Image.Image, background: str) -> Image.Image:
    """The picture in RGB, with the background behind its transparent pixels."""
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, ImageColor.getrgb(background))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def shown(path: Path, max_size: int | None = None) -> Image.Image:
    """The picture in RGB as a viewer shows it, at most `max_size` pixels wide and high.

    One of more than 8 bits is shown from its darkest to its brightest value. Raises what decoders
    raise, errors of any type.
    """
    with open_picture(path) as image:
        if max_size:
            image.draft("RGB", (max_size, max_size))
        upright = turn_upright(image)
        if upright.mode.startswith(("I", "F")):
            upright = _to_8bit(upright)
        rgb = opaque(upright, "white")
    if max_size:
        rgb.thumbnail((max_size, max_size))
    return rgb


def _to_8bit(image: Image.Image) -> Image.Image:
    values = image.convert("F")
    low, high = cast(tuple[float, float], values.getextrema())
    scale = 255 / (high - low or 1)
    return values.point(lambda value: value * scale - low * scale).convert("L")
