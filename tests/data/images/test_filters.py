"""Filters: what each measure sees, in pictures made for it, and that the search for duplicates misses none."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from world_distill.data.images import decode
from world_distill.data.images.decode import decode_image, shrink
from world_distill.data.images.filters import Filters, NearDuplicates, measure, reject
from world_distill.data.images.png import ImageError

# As in configs/wan22_5b.py, for smaller images.
STRICT = Filters(min_side=100, min_mean=20.0, max_mean=235.0, min_spread=10.0, min_sharpness=100.0)


def picture(seed=0, height=300, width=400):
    """Smooth shapes with fine texture [H W 3] uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(30, 226, (5, 6, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(coarse, np.int64) + rng.integers(-25, 26, (height, width, 1)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "reason, change",
    [
        (None, lambda x: x),
        ("tiny", lambda x: x[:99]),
        ("dark", lambda x: x // 20),
        ("bright", lambda x: 255 - x // 20),
        ("flat", lambda x: 120 + x // 40),
        ("blur", lambda x: np.asarray(Image.fromarray(x).resize((20, 15)).resize((400, 300)))),
    ],
)
def test_each_filter_finds_its_fault(reason, change):
    found = reject(measure(change(picture())), STRICT)
    assert (found and found[0]) == reason
    assert reject(measure(change(picture())), Filters()) is None


def test_measures_against_their_definitions():
    pixels = np.repeat(np.random.default_rng(0).integers(0, 256, (40, 30, 1), np.uint8), 3, axis=2)
    seen, grey = measure(pixels), pixels[..., 0].astype(float)
    kernel = {(0, 1): 1, (1, 0): 1, (1, 2): 1, (2, 1): 1, (1, 1): -4}
    laplacian = sum(weight * grey[i : i + 38, j : j + 28] for (i, j), weight in kernel.items())
    expected = (30, grey.mean(), grey.std(), laplacian.var())
    np.testing.assert_allclose((seen.side, seen.mean, seen.spread, seen.sharpness), expected, rtol=1e-12)


def test_smallest_images_are_measured():
    for shape in ((1, 1, 3), (1, 2000, 3), (2, 3, 3)):
        assert measure(np.zeros(shape, np.uint8)).sharpness == 0


def test_hash_keeps_through_size_and_compression_and_differs_between_pictures():
    hashes = []
    for seed in range(20):
        pixels, buffer = picture(seed), io.BytesIO()
        Image.fromarray(pixels).resize((200, 150)).save(buffer, "JPEG", quality=60)
        again = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
        hashes.append(measure(pixels).hash)
        assert (hashes[-1] ^ measure(again).hash).bit_count() <= 4
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 12


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, 9])
def test_search_finds_what_comparing_all_finds(distance):
    rng = np.random.default_rng(distance)
    values = []
    for _ in range(600):
        value = int(rng.integers(0, 1 << 63)) * 2 + 1
        if values and rng.random() < 0.6:  # something near an earlier one
            value = values[rng.integers(len(values))]
            for bit in rng.choice(64, rng.integers(0, 2 * distance + 3), replace=False):
                value ^= 1 << int(bit)
        values.append(value)
    near, kept = NearDuplicates(distance), []
    for i, value in enumerate(values):
        close = [j for j in kept if (values[j] ^ value).bit_count() <= distance]
        found = near.add(value, str(i))
        assert (found is None) == (not close)
        if found is None:
            kept.append(i)
        else:
            assert int(found[1]) in close and found[0] == (values[int(found[1])] ^ value).bit_count()
    assert 100 < len(kept) < 600


def test_distance_that_would_match_everything_is_refused():
    with pytest.raises(ValueError, match="give 0 to 15"):
        NearDuplicates(16)


# ---- Decoding and size


@pytest.mark.parametrize("side, message", [(9000, "9000x9000 pixels are more than 80,000,000"), (30000, "Bomb")])
def test_images_that_claim_too_many_pixels_are_refused(side, message):
    buffer = io.BytesIO()
    Image.new("1", (32, 32)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ImageError, match=f"x.png: .*{message}"):
        decode_image(bytes(data), "x.png")


def test_files_too_large_and_formats_that_run_programs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_BYTES", 99)
    (tmp_path / "x.png").write_bytes(bytes(100))
    with pytest.raises(ImageError, match="x.png: more than 0 MiB"):
        decode.read_image(tmp_path / "x.png")
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "EPS")
    with pytest.raises(ImageError, match="x.png: no picture, but a PostScript program"):
        decode_image(buffer.getvalue(), "x.png")


def test_shrink_keeps_the_shape_and_never_enlarges():
    assert shrink(picture(), 200).shape == (150, 200, 3) and shrink(picture(), 7).shape == (5, 7, 3)
    assert shrink(np.zeros((1, 1000, 3), np.uint8), 10).shape == (1, 10, 3)
    pixels = picture()
    assert shrink(pixels, 400) is pixels and shrink(pixels, 0) is pixels
