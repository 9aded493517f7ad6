"""Which images are worth asking about: size, exposure, sharpness, and whether the like was there before.

    tiny       shorter side
    dark       mean of the luminance (ITU-R 601, 0 to 255)
    bright     the same
    flat       its standard deviation
    blur       variance of its Laplacian (4 neighbours), the longer side scaled down to 512 pixels: edges make it large
    duplicate  Hamming distance of perceptual hashes: signs of the 8 x 8 lowest frequencies of a 32 x 32 thumbnail's
               cosine transform, about their median (64 bits)

All arithmetic behind the hash is of whole numbers, so that every machine finds the same duplicates.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from world_distill.settings.filters import Filters as Filters

_SCALE = 512  # pixels of the longer side for exposure and sharpness
_THUMB, _LOW = 32, 8  # sides of the thumbnail and of the block of frequencies
_ANGLES = np.pi * np.outer(np.arange(_LOW), 2 * np.arange(_THUMB) + 1) / (2 * _THUMB)
_COSINES = np.rint(1024 * np.cos(_ANGLES)).astype(np.int64)  # [8 32]
_BANDS, _BAND_BITS = 4, 16


@dataclasses.dataclass(frozen=True)
class Measures:
    """What the filters look at."""

    side: int
    mean: float
    spread: float
    sharpness: float
    hash: int  # 64 bits


def measure(pixels: np.ndarray) -> Measures:
    """The measures of an image [H W 3] uint8."""
    from PIL import Image

    grey = Image.fromarray(pixels).convert("L")
    thumb = np.asarray(grey.resize((_THUMB, _THUMB), Image.Resampling.BOX), np.int64)
    if max(grey.size) > _SCALE:
        factor = _SCALE / max(grey.size)
        grey = grey.resize([max(3, round(side * factor)) for side in grey.size], Image.Resampling.BOX)
    light = np.asarray(grey, np.float64)
    inner = light[1:-1, 1:-1]
    laplacian = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * inner
    sharpness = float(laplacian.var()) if laplacian.size else 0.0
    return Measures(min(pixels.shape[:2]), float(light.mean()), float(light.std()), sharpness, _hash(thumb))


def _hash(thumb: np.ndarray) -> int:
    """Perceptual hash of a thumbnail [32 32]. Every fourth bit is of one band, so that bands see the whole picture."""
    low = (_COSINES @ thumb @ _COSINES.T).ravel()
    bits = (low > np.median(low)).reshape(_BAND_BITS, _BANDS).T
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def reject(measures: Measures, filters: Filters) -> tuple[str, float] | None:
    """(reason, measured value) if a limit is broken, the first in the order above; None for a good image."""
    checks = {
        "tiny": (measures.side, measures.side < filters.min_side),
        "dark": (measures.mean, measures.mean < filters.min_mean),
        "bright": (measures.mean, measures.mean > filters.max_mean),
        "flat": (measures.spread, measures.spread < filters.min_spread),
        "blur": (measures.sharpness, measures.sharpness < filters.min_sharpness),
    }
    return next(((reason, round(value, 3)) for reason, (value, broken) in checks.items() if broken), None)


class NearDuplicates:
    """Hashes of the images that stay, to be searched by distance.

    If two hashes differ in at most `distance` bits, then some band of 16 bits differs in at most distance // 4 of them:
    only those with such a band are compared, which are few.
    """

    def __init__(self, distance: int):
        """`distance` in bits, 0 to 15: beyond, unrelated pictures are alike."""
        if not 0 <= distance < _BAND_BITS:
            raise ValueError(f"near-duplicates within {distance} bits: give 0 to {_BAND_BITS - 1}, or -1 for none")
        self._distance = distance
        flips = [bits for n in range(distance // _BANDS + 1) for bits in itertools.combinations(range(_BAND_BITS), n)]
        self._flips = [sum(1 << bit for bit in bits) for bits in flips]
        self._tables: list[dict[int, list[int]]] = [{} for _ in range(_BANDS)]  # indices of hashes, by band
        self._hashes: list[int] = []
        self._names: list[str] = []

    def add(self, value: int, name: str) -> tuple[int, str] | None:
        """(distance, name) of an image that is there and near; otherwise `value` is one to compare with from now on."""
        for i in self._candidates(value):
            if (different := (self._hashes[i] ^ value).bit_count()) <= self._distance:
                return different, self._names[i]
        for table, band in zip(self._tables, _bands(value), strict=True):
            table.setdefault(band, []).append(len(self._hashes))
        self._hashes.append(value)
        self._names.append(name)
        return None

    def _candidates(self, value: int) -> Iterator[int]:
        for table, band in zip(self._tables, _bands(value), strict=True):
            for flip in self._flips:
                yield from table.get(band ^ flip, ())


def _bands(value: int) -> list[int]:
    return [value >> (_BAND_BITS * i) & ((1 << _BAND_BITS) - 1) for i in range(_BANDS)]
