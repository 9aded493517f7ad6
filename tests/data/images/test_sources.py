"""Sources of images: folders, patterns, archives and JSONL in one order, read in place; what is damaged is named."""

import io
import json
import os
import re
import tarfile

import pytest

from world_distill.data.images.archives import in_archive
from world_distill.data.images.files import File
from world_distill.data.images.png import ImageError
from world_distill.data.images.reader import find_images
from world_distill.data.images.sources import as_sources
from world_distill.data.images.unused import Unused

BODIES = {f"{i:03d}.png": bytes([i]) * (400 + i) for i in range(6)}


def write_tar(path, mode="w", bodies=BODIES, kind=tarfile.REGTYPE):
    with tarfile.open(path, mode) as tar:
        for name, body in bodies.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(body) if kind == tarfile.REGTYPE else 0, kind
            tar.addfile(info, io.BytesIO(body))
    return path


def contents(sources):
    return [(source.name, source.read()) for source in sources]


def test_folder_and_pattern_are_in_order_with_names_below_them(tmp_path):
    for name in ("b/2.PNG", "a.jpg", "b/c/1.webp", "._a.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert contents(find_images(tmp_path)) == [(n, n.encode()) for n in ("a.jpg", "b/2.PNG", "b/c/1.webp")]
    assert [s.name for s in find_images(f"{tmp_path}/*/**/*.webp")] == ["b/c/1.webp"]
    assert [s.name for s in find_images(f"{tmp_path}/{{b/2.PNG,a.jpg}}")] == ["2.PNG", "a.jpg"]
    assert find_images(f"{tmp_path}/*.gif") == [] and find_images(f"{tmp_path}/a.jpg")[0].name == "a.jpg"
    assert [s.name for s in as_sources([tmp_path / "b", str(tmp_path / "a")])] == ["a", "b"]


def test_braces_count_with_leading_zeros(tmp_path):
    for i in range(8, 12):
        write_tar(tmp_path / f"x-{i:02d}.tar", bodies={"i.png": bytes([i])})
    found = contents(find_images(f"{tmp_path}/x-{{08..10}}.tar"))
    assert found == [(f"x-{i:02d}.tar/i.png", bytes([i])) for i in (8, 9, 10)]
    with pytest.raises(ImageError, match=re.escape("x-12.tar: no such file")):
        find_images(f"{tmp_path}/x-{{11..12}}.tar")
    for pattern in ("{5..1}.tar", "{0..9999999999}.tar", "{0..999}{0..9999}.tar"):
        with pytest.raises(ImageError, match="names"):
            find_images(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_are_read_in_any_order_and_never_extracted(tmp_path, mode):
    path = write_tar(tmp_path / ("x.tar.gz" if mode == "w:gz" else "x.tar"), mode)
    sources = find_images(path)
    expected = [(f"{path.name}/{name}", body) for name, body in BODIES.items()]
    assert contents(sources) == expected and contents(sources[::-1]) == expected[::-1]
    assert os.listdir(tmp_path) == [path.name]


def test_only_images_in_an_archive_count(tmp_path):
    write_tar(tmp_path / "x.tar", bodies={"1.json": b"{}", "._1.png": b"x", "../../1.png": b"y", "/etc/2.jpg": b"z"})
    found = contents(find_images(tmp_path / "x.tar"))
    assert found == [("x.tar/../../1.png", b"y"), ("x.tar//etc/2.jpg", b"z")]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
        assert in_archive(File(str(write_tar(tmp_path / "y.tar", kind=kind)), "y.tar"), Unused()) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_every_truncation_of_an_archive_names_file_and_member(tmp_path, mode):
    path = write_tar(tmp_path / ("x.tar.gz" if mode == "w:gz" else "x.tar"), mode)
    data = path.read_bytes()
    # Of the end mark, two blocks of zeros padded to 20, the first is all that is asked for.
    whole = len(data) if mode == "w:gz" else data.rfind(bytes([5]) * 400) + 405
    whole += -whole % 512 + 512 if mode == "w" else 0
    for length in range(0, whole, 7 if mode == "w:gz" else 97):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=f"{path.name}: damaged or cut off (at its start|at or after member '00)"):
            find_images(path)
    path.write_bytes(data[:whole])
    assert len(find_images(path)) == 6


def test_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar")
    data = path.read_bytes()
    path.write_bytes(data[: 2 * 1024 + 8] + b"\xff" + data[2 * 1024 + 9 :])
    with pytest.raises(ImageError, match="after member '001.png' .what follows is neither a member nor the end"):
        find_images(path)
    path.write_bytes(data + data)  # two archives in one: the second would be lost
    with pytest.raises(ImageError, match="after member '005.png'"):
        find_images(path)


def test_archive_that_shrinks_after_it_was_listed_is_noticed(tmp_path):
    path = write_tar(tmp_path / "x.tar")
    sources = find_images(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ImageError, match="x.tar, member 000.png: the archive is cut off inside it"):
        sources[0].read()


# ---- JSONL


def write_rows(folder, *rows):
    path = folder / "list.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_name_images_and_say_where_they_are_from(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/ä.png").write_bytes(b"A")
    (tmp_path / "b.png").write_bytes(b"B")
    path = write_rows(
        tmp_path, {"path": "sub/ä.png", "license": "CC0", "id": 7, "note": None}, "\n",
        {"image": "b.png", "path": "other", "tags": ["x", 1], "bad": "\ud800"},
    )  # fmt: skip
    first, second = find_images(path)
    assert (first.name, first.read(), first.metadata) == ("sub/ä.png", b"A", {"licence": "CC0", "id": "7"})
    assert (second.name, second.read()) == ("b.png", b"B")
    assert second.metadata == {"path": "other", "tags": '["x", 1]', "bad": "?"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "../secret.png"}, "leads out of"),
        ({"image": "sub/../../secret.png"}, "leads out of"),
        ({"image": "/etc/passwd"}, "leads out of"),
        ({"image": "link.png"}, "leads out of"),
        ({"image": "folder/secret.png"}, "leads out of"),
        ({"image": "loop.png"}, "leads out of|is no path|loop"),
        ({"image": "a\0b.png"}, "leads out of"),
        ({"image": "\ud800.png"}, "is not there"),
        ({"image": 3, "prompt": "x"}, "no path in any of .* it has image, prompt"),
        ("[1]\n", "a JSON list, not an object"),
        ("{\n", "not JSON"),
        ("[" * 100_000 + "\n", "not JSON"),
    ],
)
def test_rows_that_lead_elsewhere_or_are_damaged_are_named(tmp_path, row, message):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    (root / "fine.png").write_bytes(b"")
    with pytest.raises(ImageError, match=f"list.jsonl, line 2: .*({message})"):
        (find_images(write_rows(root, {"image": "fine.png"}, row)) or [None])[1].read()


def test_link_that_is_put_there_later_is_not_followed(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "root/a.png").write_bytes(b"")
    (source,) = find_images(write_rows(tmp_path / "root", {"image": "a.png"}))
    (tmp_path / "root/a.png").unlink()
    (tmp_path / "root/a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ImageError, match="leads out of"):
        source.read()
