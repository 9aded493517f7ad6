"""PNG and JPEG files without what is not the picture: places, cameras, times, thumbnails, comments, profiles, films.

The compressed picture is copied as it is, so no pixel changes. Colours and orientation are for the caller to check: a
file that needs its profile or its orientation is another picture without them.
"""

import struct

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PARTS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")  # that make the picture; transparency (tRNS) makes another one
_JFIF, _ADOBE = 0xE0, 0xEE  # APP0 and APP14, which says how colours are stored
_LAYOUT = b"tEXtscene\0"  # a drawn picture says there what it shows, for its world's checker


def without_tags(data: bytes) -> bytes | None:
    """The picture alone; None if `data` is neither PNG nor JPEG, or is not built as those are."""
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    return None


def _png(data: bytes) -> bytes | None:
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        end = at + 12 + length
        name = data[at + 4 : at + 8]
        if end > len(data):
            return None
        if name in _PNG_PARTS or data[at + 4 : end].startswith(_LAYOUT):
            kept.append(data[at:end])
        if name == b"IEND":
            return b"".join(kept)
        at = end
    return None


def _jpeg(data: bytes) -> bytes | None:
    """Segments up to the end of the first picture. Phones put another one, depths or a film behind."""
    kept, at = [data[:2]], 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xD9:
            return b"".join([*kept, b"\xff\xd9"])
        length = struct.unpack_from(">H", data, at + 2)[0]
        end = at + 2 + length
        segment = data[at:end]
        is_tag = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not is_tag or (marker == _ADOBE and segment[4:9] == b"Adobe"):
            kept.append(segment)
        elif marker == _JFIF and segment[4:8] == b"JFIF":
            kept.append(b"\xff\xe0\x00\x10" + segment[4:16] + b"\0\0")  # without its thumbnail
        at = end
        if marker == 0xDA:  # the pixels follow, up to a marker that is neither an escaped 0xFF nor a restart
            while True:
                end = data.find(b"\xff", end)
                if end < 0 or end + 1 >= len(data):
                    return None
                if data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7:
                    end += 2
                else:
                    break
            kept.append(data[at:end])
            at = end
    return b"".join([*kept, b"\xff\xd9"]) if data[at : at + 2] == b"\xff\xd9" else None
