"""Odd pictures: other colour spaces, private tags, formats of phones and the web, and files that are no pictures."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from world_distill.data.images import kinds
from world_distill.data.images.decode import as_kept, decode_image
from world_distill.data.images.png import ImageError, decode_png
from world_distill.data.images.private_tags import without_tags

PIXELS = np.kron(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8), np.ones((8, 8, 1), np.uint8))


def data(kind="JPEG", pixels=PIXELS, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def fixed(*values):
    return b"".join(struct.pack(">i", round(x * 65536)) for x in values)


def profile(red, green, blue, gamma=2.2):
    """A minimal ICC profile with these primaries (XYZ, adapted to D50) and a power for a curve."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 3) + b"P3\0" + b"\0" * 79}
    tags |= {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)}
    for name, xyz in zip((b"r", b"g", b"b"), (red, green, blue), strict=True):
        tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*xyz), name + b"TRC": curve}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + body


P3 = np.array([[0.5151, 0.2412, -0.0011], [0.292, 0.6922, 0.0419], [0.1571, 0.0666, 0.7841]])
SRGB = np.array([[0.4361, 0.2225, 0.0139], [0.3851, 0.7169, 0.0971], [0.1431, 0.0606, 0.7141]])


def by_hand(colour, gamma=2.2):
    """A colour of Display P3 in sRGB: to linear light, from one set of primaries to the other, and back."""
    light = (np.array(colour) / 255) ** gamma @ P3 @ np.linalg.inv(SRGB)
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("colour", [(150, 140, 90), (90, 160, 110)])
def test_colours_are_converted_by_the_profile(kind, colour):
    flat = np.full((32, 32, 3), colour, np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    seen = decode_image(data(kind, flat, icc_profile=profile(*P3), **options), "x")
    expected = by_hand(colour)
    assert np.abs(expected - colour).max() > 5  # it is another colour
    np.testing.assert_allclose(seen[16, 16], expected, atol=3)
    kept = as_kept(data(kind, flat, icc_profile=profile(*P3), **options), seen)
    with Image.open(io.BytesIO(kept)) as image:
        assert "icc_profile" not in image.info
    np.testing.assert_array_equal(decode_png(kept), seen)


def test_transparency_and_palettes_keep_their_profile():
    flat = np.full((32, 32, 4), (90, 160, 110, 255), np.uint8)
    flat[:16, :, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(flat).save(buffer, "PNG", icc_profile=profile(*P3))
    seen = decode_image(buffer.getvalue(), "x")
    assert (seen[:16] == 255).all()
    np.testing.assert_allclose(seen[20, 20], by_hand((90, 160, 110)), atol=3)
    palette = data("PNG", np.full((32, 32, 3), (90, 160, 110), np.uint8), mode="P", icc_profile=profile(*P3))
    assert np.abs(decode_image(palette, "x")[0, 0] - np.array((90, 160, 110.0))).max() > 5


@pytest.mark.parametrize(
    "icc", [b"", b"no profile", profile(*P3)[:200], ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_srgb_and_damaged_profiles_change_nothing(icc):
    plain, with_profile = data(), data(icc_profile=icc)
    np.testing.assert_array_equal(decode_image(with_profile, "x"), decode_image(plain, "x"))
    assert as_kept(with_profile, decode_image(plain, "x")) == plain


def test_a_profile_of_another_kind_of_picture_is_passed_over():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_array_equal(decode_image(data("PNG", icc_profile=lab), "x"), PIXELS)
    cmyk = data("JPEG", mode="CMYK", icc_profile=profile(*P3), quality=95)
    assert decode_image(cmyk, "x").shape == PIXELS.shape


def private_jpeg():
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0), 3: "E", 4: (4.0, 5.0, 6.0)})
    jpeg = data(exif=exif, comment=b"SecretComment", dpi=(72, 72), quality=80)
    film = b"\0\0\0\x18ftypmp42SecretFilm"  # as a phone's motion photo
    return jpeg + data(quality=20) + film


def test_places_cameras_comments_and_what_follows_are_dropped():
    jpeg = private_jpeg()
    seen = decode_image(jpeg, "x.jpg")
    kept = as_kept(jpeg, seen)
    assert b"Secret" in jpeg and b"Secret" not in kept and b"Exif" not in kept and kept.count(b"\xff\xd8\xff") == 1
    np.testing.assert_array_equal(decode_png(kept), seen)
    assert kept.startswith(b"\xff\xd8") and len(kept) < len(jpeg)  # the compressed picture itself, not a PNG
    text = data("PNG", pnginfo=_text("Author", "Secret"))
    kept = as_kept(text, decode_image(text, "x.png"))
    assert b"Secret" in text and kept == data("PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = data(exif=exif)
    kept = as_kept(turned, decode_image(turned, "x"))
    assert kept.startswith(b"\x89PNG") and decode_png(kept).shape == (48, 32, 3)


def _text(key, value):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(key, value)
    return info


def test_what_a_drawn_picture_shows_stays_with_it():
    drawn = data("PNG", pnginfo=_text("scene", "[1]"))
    assert Image.open(io.BytesIO(as_kept(drawn, decode_png(drawn)))).text == {"scene": "[1]"}
    told = data("PNG", pnginfo=_text("scenery", "[1]"))
    assert Image.open(io.BytesIO(as_kept(told, decode_png(told)))).text == {}


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_without_their_tags_have_the_same_pixels(mode, progressive):
    jpeg = data(mode=mode, progressive=progressive, restart_marker_blocks=1, comment=b"x", quality=70)
    plain = without_tags(jpeg)
    assert plain is not None and len(plain) < len(jpeg)
    np.testing.assert_array_equal(decode_png(plain), decode_png(jpeg))
    for length in range(0, len(jpeg), 53):
        without_tags(jpeg[:length])  # None or bytes, and never an error
    assert without_tags(jpeg[:-2]) is None


@pytest.mark.parametrize(
    "kind, name", [("AVIF", "a.avif"), ("GIF", "a.gif"), ("TIFF", "a.tiff"), ("JPEG", "a.jfif"), ("PPM", "a.ppm")]
)
def test_formats_of_the_web_are_read(kind, name):
    try:
        picture = data(kind)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {kind}")
    assert kinds.is_image(name) and kinds.is_image(name.upper())
    seen = decode_image(picture, name).astype(int)
    assert seen.shape == PIXELS.shape and np.abs(seen - PIXELS).mean() < 25


def test_of_an_animation_the_first_picture_counts():
    first, second = Image.new("RGB", (32, 32), (200, 30, 30)), Image.new("RGB", (32, 32), (30, 30, 200))
    for kind in ("GIF", "PNG", "TIFF", "MPO"):
        buffer = io.BytesIO()
        first.save(buffer, kind, save_all=True, append_images=[second])
        seen = decode_image(buffer.getvalue(), "x")
        assert np.abs(seen[0, 0].astype(int) - (200, 30, 30)).max() < 4, kind


ELSE = {
    "a Parquet file": b"PAR1" + bytes(40),
    "a zip archive: give it the ending": b"PK\3\4" + bytes(40),
    "git-lfs pointer.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "an HTML page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "JSON, not": b'{"error": "rate limit"}',
    "an empty file": b"",
    "nothing but zeros": bytes(4096),
    "text: 'Access denied'": b"Access denied",
    "MP4 or MOV video": b"\0\0\0\x18ftypmp42" + bytes(40),
    "gzip-compressed": b"\x1f\x8b\x08" + bytes(40),
    "a tar archive": b"a.png".ljust(257, b"\0") + b"ustar" + bytes(300),
    "JPEG XL": b"\xff\x0a" + bytes(40),
    "none of the formats PNG": bytes(range(128, 256)),
    "HEIC picture: pip install": b"\0\0\0\x18ftypheic" + bytes(40),
}  # fmt: skip


@pytest.mark.parametrize("words", ELSE)
def test_what_is_no_picture_is_called_what_it_is(words):
    if "HEIC" in words:
        try:
            import pillow_heif  # noqa: F401

            pytest.skip("pillow-heif is installed")
        except ImportError:
            pass
    with pytest.raises(ImageError, match=f"^x.png: no picture, but .*{words}"):
        decode_image(ELSE[words], "x.png")


def test_a_damaged_picture_says_how():
    jpeg = data()
    with pytest.raises(ImageError, match="x.jpg: not a whole image .OSError"):
        decode_image(jpeg[: len(jpeg) // 2], "x.jpg")
    png = bytearray(data("PNG"))
    png[40] ^= 255
    with pytest.raises(ImageError, match="x.png: a damaged PNG"):
        decode_image(bytes(png), "x.png")
