"""Colours to sRGB, by the ICC profile that a picture carries (Display P3 of phones, Adobe RGB of cameras, CMYK)."""

import functools
import io
from typing import Any

import numpy as np

_SAME = 2  # of 255: a profile that moves no colour farther than this is sRGB's own, as most are
_OF_MODE = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}  # colour space of a profile -> mode of its pictures


def to_srgb(image: Any) -> Any:
    """A picture of Pillow as RGB in sRGB. One without a profile, or with a damaged one, is taken for sRGB."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    transform, mode = _transform(profile) if profile else (None, "")
    # A profile of another kind than the picture is a mistake of whoever wrote it.
    fits = {"CMYK": ("CMYK",), "L": ("L", "LA", "1"), "RGB": ("RGB", "P", "RGBA", "L", "LA", "PA", "RGBX")}
    if transform is None or image.mode not in fits[mode]:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    assert converted is not None  # it was not made in place
    return converted


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[Any, str]:
    """(transform to sRGB, mode that it takes); (None, "") if there is nothing to do, or no way to do it."""
    from PIL import Image, ImageCms

    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _OF_MODE.get(source.profile.xcolor_space)
        if mode is None:
            return None, ""
        transform = ImageCms.buildTransform(
            source, _srgb(), mode, "RGB", renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
        if mode == "CMYK":
            return transform, mode
        steps = np.linspace(0, 255, 9).astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        probe = Image.fromarray(grid).convert(mode)
        moved = ImageCms.applyTransform(probe, transform)
        assert moved is not None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        return None, ""
    change = np.abs(np.asarray(moved, np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max()
    return (transform, mode) if change > _SAME else (None, "")


@functools.cache
def _srgb() -> Any:
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")
