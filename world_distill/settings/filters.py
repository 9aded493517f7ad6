"""Settings of the filters of scene images."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which images are left out before a VLM is asked about them; by default none is.

    Attributes:
      broken: leave out images that cannot be read, instead of stopping.
      min_side: least pixels of the shorter side.
      min_mean: least mean luminance, 0 to 255; a darker image is night.
      max_mean: greatest mean luminance; a brighter image is glare.
      min_spread: least standard deviation of luminance; less is fog, a wall, a loading screen.
      min_sharpness: least variance of the Laplacian at 512 pixels; less is blur.
      near: bits of 64 in which the hashes of near-duplicates differ, at most; -1: none is sought.
    """

    broken: bool = False
    min_side: int = 0
    min_mean: float = 0.0
    max_mean: float = 255.0
    min_spread: float = 0.0
    min_sharpness: float = 0.0
    near: int = -1
