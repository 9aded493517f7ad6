"""Image files to pixels: upright, in sRGB, on white, 8 bits a channel. What cannot be used is refused with its name.

Images come from anywhere, so nothing in them is trusted: only plain picture formats are opened, and sizes are checked
before anything is decoded. Of several pictures in a file (GIF, TIFF, a phone's JPEG) the first counts.
"""

import io
import os
import pathlib
from typing import Any

import numpy as np

from world_distill.data.images.colours import to_srgb
from world_distill.data.images.kinds import SUFFIXES as SUFFIXES
from world_distill.data.images.kinds import is_image as is_image
from world_distill.data.images.kinds import true_kind
from world_distill.data.images.png import ImageError, decode_png, encode_png
from world_distill.data.images.private_tags import without_tags

MAX_BYTES = 1 << 28  # of a file; a picture of MAX_PIXELS without compression has as many
MAX_PIXELS = 80_000_000  # of a picture once decoded: a small file may claim any size
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # none that runs a program, as EPS does


def clean_text(text: str) -> str:
    """`text` without the half characters that file names and JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def read_image(path: str | os.PathLike, *, min_side: int = 16) -> np.ndarray:
    """An image file as RGB [H W 3] uint8, as `decode_image` gives it. Raises ImageError, if it is missing too."""
    return decode_image(read_bytes(pathlib.Path(path)), str(path), min_side=min_side)


def read_bytes(path: pathlib.Path) -> bytes:
    """A file's bytes. Raises ImageError if it cannot be read, or is larger than any picture."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ImageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"{path}: more than {MAX_BYTES >> 20} MiB, which is too large for a picture")
    return data


def decode_image(data: bytes, where: str, *, min_side: int = 16) -> np.ndarray:
    """Image bytes as RGB [H W 3] uint8: upright (EXIF orientation), in sRGB (ICC profile), transparency on white.

    Raises ImageError, naming `where` they are from, if they are damaged, of more than 8 bits a channel, have a side
    below `min_side` pixels or more than MAX_PIXELS.
    """
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with _opened(data) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{where}: {image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
            if image.mode.startswith(("I", "F")):
                raise ImageError(f"{where}: mode {image.mode} has more than 8 bits a channel: convert it to 8-bit RGB")
            pixels = np.array(_on_white(ImageOps.exif_transpose(image)))
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # its text holds an address, and lists of rejected images are reproducible
        kind = true_kind(data) or f"none of the formats {', '.join(_FORMATS)}"
        raise ImageError(f"{where}: {'' if kind.startswith('a damaged') else 'no picture, but '}{kind}") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise ImageError(f"{where}: not a whole image ({type(error).__name__}: {error})") from error
    if min(pixels.shape[:2]) < min_side:
        raise ImageError(f"{where}: {pixels.shape[1]}x{pixels.shape[0]} pixels, and a side has at least {min_side}")
    return pixels


def _opened(data: bytes) -> Any:
    """The first picture, by Pillow; HEIC where pillow-heif is installed."""
    from PIL import Image

    Image.init()
    formats = tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF is Pillow's since 11.3
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis"):
        try:
            import pillow_heif  # pyright: ignore[reportMissingImports]
        except ImportError:
            pass
        else:
            pillow_heif.register_heif_opener()
            formats = (*formats, "HEIF")
    return Image.open(io.BytesIO(data), formats=formats)


def _on_white(image: Any) -> Any:
    """A picture as RGB in sRGB, what lies under transparency white."""
    from PIL import Image

    if not image.has_transparency_data:
        return to_srgb(image)
    layer = image.convert("RGBA")
    colours = to_srgb(layer.convert("RGB"))
    colours.putalpha(layer.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), colours).convert("RGB")


def shrink(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """The image [H W 3] uint8 with its longer side `max_side` pixels; as it is, if that is shorter or `max_side` 0."""
    from PIL import Image

    longest = max(pixels.shape[:2])
    if not max_side or longest <= max_side:
        return pixels
    height, width = (max(1, round(side * max_side / longest)) for side in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def as_kept(data: bytes, pixels: np.ndarray) -> bytes:
    """A picture as records keep it: `data` without its tags if that is a PNG or JPEG of just these pixels; else a PNG.

    Places, cameras, comments and whatever follows the picture are left out.
    """
    plain = without_tags(data)
    try:
        if plain is not None and np.array_equal(decode_png(plain), pixels):
            return plain
    except ImageError:  # it needs what was taken out
        pass
    return encode_png(pixels)
