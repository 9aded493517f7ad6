"""Image files to pixels: upright, on white, 8 bits a channel. What cannot be used is refused with its name.

Images come from anywhere, so nothing in them is trusted: only plain picture formats are opened, and sizes are checked
before anything is decoded.
"""

import io
import os
import pathlib

import numpy as np

from world_distill.data.images.png import ImageError, decode_png, encode_png

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # what counts as an image in a folder or an archive
MAX_BYTES = 1 << 28  # of a file; a picture of MAX_PIXELS without compression has as many
MAX_PIXELS = 80_000_000  # of a picture once decoded: a small file may claim any size
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that runs a program, as EPS does


def is_image(name: str) -> bool:
    """By its name. macOS puts a `._` file beside each image in an archive, which is none."""
    base = name.rpartition("/")[2]
    return base.lower().endswith(SUFFIXES) and not base.startswith("._")


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
    """Image bytes as RGB [H W 3] uint8, upright (EXIF orientation applied), transparency on white.

    Raises ImageError, naming `where` they are from, if they are damaged, of more than 8 bits a channel, have a side
    below `min_side` pixels or more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{where}: {image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
            if image.mode.startswith(("I", "F")):
                raise ImageError(f"{where}: mode {image.mode} has more than 8 bits a channel: convert it to 8-bit RGB")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            pixels = np.array(image.convert("RGB"))
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # its text holds an address, and lists of rejected images are reproducible
        raise ImageError(f"{where}: not a whole image, or of none of the formats {', '.join(_FORMATS)}") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise ImageError(f"{where}: not a whole image ({type(error).__name__}: {error})") from error
    if min(pixels.shape[:2]) < min_side:
        raise ImageError(f"{where}: {pixels.shape[1]}x{pixels.shape[0]} pixels, and a side has at least {min_side}")
    return pixels


def shrink(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """The image [H W 3] uint8 with its longer side `max_side` pixels; as it is, if that is shorter or `max_side` 0."""
    from PIL import Image

    longest = max(pixels.shape[:2])
    if not max_side or longest <= max_side:
        return pixels
    height, width = (max(1, round(side * max_side / longest)) for side in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def as_png(data: bytes, pixels: np.ndarray) -> bytes:
    """`data` itself if that is a PNG of just these pixels, with whatever its text chunks say; else a new PNG."""
    if data.startswith(b"\x89PNG") and np.array_equal(decode_png(data), pixels):
        return data
    return encode_png(pixels)
