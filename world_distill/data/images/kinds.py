"""What a file is: by the ending of its name, which says how it is read, and by its first bytes, for messages."""

import pathlib

# Endings of pictures. Pillow reads all but HEIC, which pillow-heif adds (extra `data`).
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif",
    ".ppm",
)  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
TARS = (".tar", ".tgz", ".tbz2", ".txz", *(f".tar{end}" for end in COMPRESSED))
LISTS = (".txt", ".lst", ".list")  # of paths, a line each, where the user names the file
ZIPS = (".zip",)
PACKED = (".rar", ".7z")  # archives that are not read
ROWS = {
    "jsonl": (".jsonl", ".ndjson", ".jsonlines"),
    "json": (".json",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow",),
}
# Files that `datasets`, hubs and systems put beside data, which nobody misses.
_UNREMARKABLE = (
    "state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json", ".ds_store", "thumbs.db",
    "desktop.ini", "readme.md", ".gitattributes", ".gitignore", "license", "license.txt",
)  # fmt: skip

_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_STARTS: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes there, what has them
    (0, b"version https://git-lfs", "a git-lfs pointer, not the picture: `git lfs pull` brings it"),
    (0, b"PAR1", "a Parquet file: give it the ending .parquet"),
    (0, b"ARROW1", "an Arrow file: give it the ending .arrow"),
    (0, b"PK\3\4", "a zip archive: give it the ending .zip"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (0, b"Rar!", "a rar archive: unpack it"),
    (257, b"ustar", "a tar archive: give it the ending .tar"),
    (0, b"\x1f\x8b", "gzip-compressed: give it the ending .gz"),
    (0, b"BZh", "bzip2-compressed: give it the ending .bz2"),
    (0, b"\xfd7zXZ", "xz-compressed: give it the ending .xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed: give it the ending .zst"),
    (0, b"%PDF", "a PDF"),
    (0, b"%!PS", "a PostScript program"),
    (0, b"8BPS", "a Photoshop file: export it as PNG"),
    (0, b"\xff\x0a", "a JPEG XL picture, which is not read: convert it to PNG"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture, which is not read: convert it to PNG"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture, which is not read: convert it to PNG"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (8, b"AVI ", "an AVI video"),
    (8, b"WAVE", "a WAV sound"),
    (0, b"\x93NUMPY", "a numpy array"),
    (0, b"SQLite format 3", "an SQLite file"),
    (0, b"<svg", "an SVG drawing: export it as PNG"),
    (0, b"<?xml", "XML, such as an error page or an SVG drawing"),
    (0, b"<!doctype", "an HTML page, such as a failed download leaves"),
    (0, b"<html", "an HTML page, such as a failed download leaves"),
    (0, b"\x89PNG", "a damaged PNG"),
    (0, b"\xff\xd8\xff", "a damaged JPEG"),
    (0, b"GIF8", "a damaged GIF"),
    (8, b"WEBP", "a damaged WebP"),
    (0, b"II*\0", "a TIFF, or a camera's raw file, of a kind that is not read"),
    (0, b"MM\0*", "a TIFF, or a camera's raw file, of a kind that is not read"),
)


def base_name(name: str) -> str:
    """The last part of a path, in lower case."""
    return name.replace("\\", "/").rpartition("/")[2].lower()


def is_hidden(name: str) -> bool:
    """Whether macOS or a notebook made it, or somebody hides it: `._a.png`, `__MACOSX/`, `.ipynb_checkpoints/`."""
    parts = name.split("/")
    return parts[-1].startswith("._") or any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts[:-1]
    )


def is_image(name: str) -> bool:
    """By its name. macOS puts a `._` file beside each image in an archive, which is none."""
    base = base_name(name)
    return base.endswith(SUFFIXES) and not base.startswith("._")


def is_tar(name: str) -> bool:
    """By its name, compressed or not."""
    return base_name(name).endswith(TARS)


def is_archive(name: str) -> bool:
    """By its name: tar, compressed or not, or zip."""
    return is_tar(name) or base_name(name).endswith(ZIPS)


def rows_of(name: str) -> str | None:
    """The key of ROWS that a file's name says, compressed or not; None if it holds no rows."""
    base = base_name(name)
    base = next((base.removesuffix(end) for end in COMPRESSED if base.endswith(end)), base)
    return next((kind for kind, ends in ROWS.items() if base.endswith(ends)), None)


def is_unremarkable(name: str) -> bool:
    """Whether a file belongs to a tool and says nothing of pictures."""
    return base_name(name) in _UNREMARKABLE or base_name(name).startswith("._")


def ending(name: str) -> str:
    """The ending of a name for a report: `.tar.gz`, `.jpg`, or `no ending`."""
    path = pathlib.PurePosixPath(base_name(name))
    ends = path.suffixes[-2:] if path.suffix in COMPRESSED else path.suffixes[-1:]
    return "".join(ends)[:20] or "no ending"


def true_kind(data: bytes) -> str | None:
    """What bytes are that are no whole picture of a known format, in words; None if nothing is known about them."""
    if not data:
        return "an empty file"
    if not data.strip(b"\0"):
        return "nothing but zeros, as a download that was cut off leaves"
    start = data[:512].lstrip(b"\xef\xbb\xbf \r\n\t")
    if data[4:8] == b"ftyp":
        if data[8:12] in _HEIF:
            return "a HEIC picture: pip install 'world-distill[data]' has what reads it"
        return "a damaged AVIF" if data[8:12] in (b"avif", b"avis") else "an MP4 or MOV video"
    for offset, magic, words in _STARTS:
        there = data[offset : offset + len(magic)] if offset else start[: len(magic)]
        if there == magic or there.lower() == magic:
            return words
    if start[:1] in (b"{", b"["):
        return "JSON, not a picture"
    try:
        text = data[:200].decode("ascii")
    except UnicodeDecodeError:
        return None
    return f"text: {' '.join(text.split())[:60]!r}" if text.isprintable() or "\n" in text else None


def begins_as_picture(data: bytes) -> bool:
    """Whether the first 12 bytes, or more, are those of a PNG, JPEG, GIF, WebP or AVIF file."""
    return data.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8")) or data[8:12] in (b"WEBP", b"avif")
