"""What people keep pictures and rows in: each layout is read, each loss counted, damage passed over or named."""

import base64
import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile

import fsspec
import pytest

from world_distill.data.images.png import ImageError
from world_distill.data.images.reader import find_images
from world_distill.data.images.unused import Unused


def put(folder, **files):
    """Writes files; `__` in a name stands for a slash, the last `_` for the dot."""
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def found(spec, **options):
    """({name: bytes}, metadata by name, the closing line)."""
    unused = Unused()
    images = find_images(spec, unused=unused, **options)
    return {i.name: i.read() for i in images}, {i.name: dict(i.metadata) for i in images}, unused.line()


# ---- Folders


def test_a_folder_has_images_archives_and_tables_and_the_rest_is_counted(tmp_path):
    put(tmp_path, a_jpg="a", b_jfif="b", c_AVIF="c", d_heic="d", e__f_tiff="f", notes_txt="n", clip_mp4="m")
    put(tmp_path, list_jsonl="{}", __a_x="", README_md="r", e___DS_Store="x", hidden__x_png="x")
    (tmp_path / "hidden").rename(tmp_path / ".cache")
    (tmp_path / "x.tar").write_bytes(
        tar_bytes({"1.png": b"1", "1.json": b'{"url": "u"}', "2.mp4": b"2", "9.txt": b"9"})
    )
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    files, metadata, line = found(tmp_path)
    assert sorted(files) == ["a.jpg", "b.jfif", "c.AVIF", "d.heic", "e/f.tiff", "x.tar/1.png"]
    assert metadata["x.tar/1.png"] == {"url": "u"}
    for part in (
        "1 .jsonl (rows: name the file itself)", "1 .txt (no picture by its name)", "1 .mp4 (no picture by its name)",
        "1 .mp4 (no picture, in an archive)", "1 .txt (beside no picture, in an archive)",
        "1 .png (a link to nothing, or no file)", "1 .png (in a hidden folder)",
    ):  # fmt: skip
        assert part in line
    assert ".md" not in line


def test_links_are_followed_and_a_loop_of_them_ends(tmp_path):
    put(tmp_path, set__a_jpg="a", set__sub__b_jpg="b", other__c_jpg="c")
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/sub/up").symlink_to("..")
    (tmp_path / "set/linked").symlink_to(tmp_path / "other")
    (tmp_path / "set/0.jpg").symlink_to("a.jpg")
    files, _, line = found(tmp_path / "set")
    assert (
        sorted(files) == ["0.jpg", "linked/c.jpg", "sub/b.jpg"]
        and line == "not used: 1 .jpg (there under another name)"
    )
    assert found(f"{tmp_path}/set/**")[0] == files


def test_patterns_of_folders_and_of_everything(tmp_path):
    put(tmp_path, s1__a_jpg="1", s2__deep__b_jpg="2", s3__c_txt="3")
    files, _, line = found(f"{tmp_path}/s?")
    assert files == {"s1/a.jpg": b"1", "s2/deep/b.jpg": b"2"} and line == "not used: 1 .txt (no picture by its name)"
    assert found(f"{tmp_path}/s*/*")[0] == files  # a text that a star takes in is no broken picture
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n\x1a\nx")
    (tmp_path / "program").write_bytes(b"\x7fELF")
    files, _, line = found(tmp_path)
    assert "picture" in files and "1 no ending (no picture by its name)" in line


def test_texts_beside_pictures_and_metadata_of_folders(tmp_path):
    put(tmp_path, a_jpg="a", a_txt="A red cup.\n", a_json='{"license": "CC0", "n": 1}', b_jpg="b", c_json="{}")
    put(tmp_path, sub__metadata_csv="file_name;text\r\nx.jpg;hello\r\n", sub__x_jpg="x", sub__y_jpg="y")
    files, metadata, line = found(tmp_path)
    assert list(files) == ["sub/x.jpg", "a.jpg", "b.jpg", "sub/y.jpg"]
    assert metadata["a.jpg"] == {"txt": "A red cup.", "licence": "CC0", "n": "1"}
    assert metadata["sub/x.jpg"] == {"text": "hello"} and not metadata["sub/y.jpg"] and not metadata["b.jpg"]
    assert line == "not used: 1 .json (rows: name the file itself)"


# ---- Rows


ROWS = {
    "a.jsonl": '{"file_name": "1.jpg", "n": 1}\n\n{"file_name": "2.jpg"}\n',
    "a.ndjson": b'\xef\xbb\xbf{"file_name": "1.jpg", "n": 1}\r\n{"file_name": "2.jpg"}',
    "a.jsonl.gz": gzip.compress(b'{"file_name": "1.jpg", "n": 1}\n{"file_name": "2.jpg"}\n'),
    "a.jsonl.bz2": bz2.compress(b'{"file_name": "1.jpg", "n": 1}\n{"file_name": "2.jpg"}\n'),
    "a.jsonl.xz": lzma.compress(b'{"file_name": "1.jpg", "n": 1}\n{"file_name": "2.jpg"}\n'),
    "utf16.jsonl": '{"file_name": "1.jpg", "n": 1}\n{"file_name": "2.jpg"}\n'.encode("utf-16"),
    "list.json": '[{"file_name": "1.jpg", "n": 1}, {"file_name": "2.jpg"}]',
    "inside.json": '{"version": 1, "data": [{"file_name": "1.jpg", "n": 1}, {"file_name": "2.jpg"}]}',
    "columns.json": '{"file_name": ["1.jpg", "2.jpg"], "n": ["1", ""]}',
    "by_name.json": '{"1.jpg": {"n": 1}, "2.jpg": {}}',
    "lines.json": '{"file_name": "1.jpg", "n": 1}\n{"file_name": "2.jpg"}\n',
    "a.csv": "file_name,n\n1.jpg,1\n2.jpg,\n",
    "excel.csv": b"\xef\xbb\xbfFile Name;n\r\n1.jpg;1\r\n2.jpg;\r\n;\r\n",
    "a.tsv": "file_name\tn\n1.jpg\t1\n2.jpg\t\n",
    "list.txt": "1.jpg\r\n\n  /mnt/old/2.jpg\n",
}


@pytest.mark.parametrize("name", ROWS)
def test_files_of_rows(tmp_path, name):
    put(tmp_path, **{"1_jpg": "1", "2_jpg": "2"})
    (tmp_path / name).write_bytes(ROWS[name] if isinstance(ROWS[name], bytes) else ROWS[name].encode())
    files, metadata, line = found(tmp_path / name)
    assert files == {"1.jpg": b"1", "2.jpg": b"2"} and metadata["2.jpg"] == {} and not line
    assert metadata["1.jpg"] == ({} if name == "list.txt" else {"n": "1"})


def test_paths_of_another_machine_are_found_by_their_ends(tmp_path):
    put(tmp_path, set__frames__a__0_jpg="a0", set__frames__b__0_jpg="b0", set__frames__1_JPG="1", else__2_jpg="2")
    put(tmp_path, **{"set__frames__e\u0301_jpg": "e"})
    paths = ["/scratch/x/frames/b/0.jpg", "a/0.jpg", "C:\\data\\1.jpg", "gs://bucket/é.jpg"]
    (tmp_path / "set/rows.jsonl").write_text("".join(json.dumps({"image": path}) + "\n" for path in paths))
    files, _, line = found(tmp_path / "set/rows.jsonl")
    assert list(files.values()) == [b"b0", b"a0", b"1", b"e"] and not line
    (tmp_path / "set/rows.jsonl").write_text('{"image": "0.jpg"}\n')
    with pytest.raises(ImageError, match="rows.jsonl, line 1: '0.jpg' is the name of several images"):
        found(tmp_path / "set/rows.jsonl")
    (tmp_path / "set/rows.jsonl").write_text('{"image": "/home/me/2.jpg"}\n')
    with pytest.raises(ImageError, match="leads out of the folder of its rows.*--image-root"):
        found(tmp_path / "set/rows.jsonl")
    files, _, _ = found(tmp_path / "set/rows.jsonl", image_root=tmp_path / "else")
    assert files == {"2.jpg": b"2"}


def test_the_longest_end_of_a_path_decides(tmp_path):
    put(tmp_path, **{"x__b__c__0_jpg": "xbc", "y__b__c__0_jpg": "ybc", "rows_csv": "image\n/mnt/old/y/b/c/0.jpg\n"})
    assert list(found(tmp_path / "rows.csv")[0]) == ["y/b/c/0.jpg"]
    (tmp_path / "rows.csv").write_text("image\n/mnt/old/b/c/0.jpg\n")
    with pytest.raises(ImageError, match="name of several"):
        found(tmp_path / "rows.csv")


def test_pictures_in_rows_as_base64(tmp_path):
    jpeg = b"\xff\xd8\xff\xe0" + bytes(range(256))
    text = base64.b64encode(jpeg).decode()
    rows = [{"image": f"data:image/jpeg;base64,{text}", "n": 1}, {"image": {"bytes": text}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files, metadata, _ = found(tmp_path / "a.jsonl")
    assert files == {"a.jsonl/line 1": jpeg, "a.jsonl/line 2": jpeg} and metadata["a.jsonl/line 1"] == {"n": "1"}


def test_an_image_of_several_rows_comes_once(tmp_path):
    put(tmp_path, **{"1_jpg": "1", "a_csv": "image,n\n1.jpg,1\n./1.jpg,2\n"})
    files, metadata, line = found(tmp_path / "a.csv")
    assert metadata == {"1.jpg": {"n": "1"}} and line == "not used: 1 rows (of an image with a row before)"


# ---- What is damaged


def test_damage_stops_or_is_passed_over_with_its_reason(tmp_path):
    put(tmp_path, **{"1_jpg": "1", "a_jsonl": '{"image": "1.jpg"}\n{no\n[]\n{"n": 1}\n{"image": "../x.jpg"}\n'})
    with pytest.raises(ImageError, match="a.jsonl, line 2: not JSON"):
        found(tmp_path / "a.jsonl")
    unused = Unused()
    assert len(find_images(tmp_path / "a.jsonl", skip_bad=True, unused=unused)) == 1
    assert [(s.name, s.reason) for s in unused.lines] == [(f"a.jsonl:{n}", "row") for n in (2, 3, 4, 5)]
    line = unused.line()
    assert "1 rows (image_outside)" in line and "1 rows (no_image)" in line and "1 rows (not_json)" in line
    whole = tar_bytes({f"{i}.jpg": bytes([i]) * 3000 for i in range(3)})
    for name, cut in {"a.tar": whole[:7120], "b.tar.gz": gzip.compress(whole, 0)[:7120]}.items():
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(ImageError, match=f"{name}: damaged or cut off .*--skip-bad goes on"):
            found(tmp_path / name)
        files, _, line = found(tmp_path / name, skip_bad=True)
        assert list(files) == [f"{name}/0.jpg", f"{name}/1.jpg"] and "(damaged or cut off)" in line
    rows = gzip.compress(b'{"image": "1.jpg"}\n' * 2000, 0)
    (tmp_path / "c.jsonl.gz").write_bytes(rows[:20000])
    with pytest.raises(ImageError, match="c.jsonl.gz: damaged or cut off"):
        found(tmp_path / "c.jsonl.gz")
    assert list(found(tmp_path / "c.jsonl.gz", skip_bad=True)[0]) == ["1.jpg"]


# ---- Archives


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, "zstd"])
def test_compressed_archives_with_side_files(tmp_path, pack):
    members = {}
    for i in range(4):  # texts of whole blocks, too, after which tarfile goes back by a byte
        members |= {f"d.1/{i}.jpg": bytes([i]) * 9000, f"d.1/{i}.txt": b"t" * (512 * 40)}
    data = tar_bytes(members)
    if pack == "zstd":
        pyarrow = pytest.importorskip("pyarrow")
        packed, suffix = pyarrow.Codec("zstd").compress(data, asbytes=True), "tar.zst"
    else:
        packed, suffix = pack(data), "tar"
    (tmp_path / f"x.{suffix}").write_bytes(packed)
    images = find_images(tmp_path / f"x.{suffix}")
    assert [image.read() for image in images] == [bytes([i]) * 9000 for i in range(4)]
    assert [image.read()[0] for image in images[::-1]] == [3, 2, 1, 0]
    assert all(image.metadata == {"txt": "t" * (512 * 40)} for image in images)


def test_names_in_archives_may_have_dots(tmp_path):
    # github.com/huggingface/datasets/issues/6880 and /7732
    members = {"22.05.png": b"a", "22.05.json": b'{"n": 5}', "22.06.png": b"b", "22.06.JSON": b'{"n": 6}'}
    members |= {"1.left.jpg": b"l", "1.right.jpg": b"r", "1.json": b'{"n": 1}', "2.jpg": b"2", "2.json": b"[3]"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    _, metadata, line = found(tmp_path / "x.tar")
    numbers = {name.removeprefix("x.tar/"): m.get("n", m.get("json")) for name, m in metadata.items()}
    assert numbers == {"22.05.png": "5", "22.06.png": "6", "1.left.jpg": "1", "1.right.jpg": "1", "2.jpg": "[3]"}
    assert not line


def test_what_img2dataset_leaves_is_read_once(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "00000.tar").write_bytes(tar_bytes({"000000000.jpg": b"0", "000000000.json": b'{"url": "u"}'}))
    pq.write_table(pa.table({"url": ["u"], "key": ["000000000"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    files, _, line = found(tmp_path)
    assert list(files) == ["00000.tar/000000000.jpg"] and "parquet" not in line


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def test_zip_archives_with_side_files(tmp_path):
    members = {f"d/{i}.jpg": bytes([i]) * 900 for i in range(3)} | {"d/1.txt": "one", "__MACOSX/d/._1.jpg": "x"}
    (tmp_path / "x.zip").write_bytes(zip_bytes(members | {"d/clip.mp4": "m"}))
    files, metadata, line = found(tmp_path)
    assert files == {f"x.zip/d/{i}.jpg": bytes([i]) * 900 for i in range(3)}
    assert metadata["x.zip/d/1.jpg"] == {"txt": "one"} and line == "not used: 1 .mp4 (no picture, in an archive)"
    (tmp_path / "x.zip").write_bytes(zip_bytes(members)[:-30])
    with pytest.raises(ImageError, match="x.zip: damaged or cut off"):
        found(tmp_path)
    assert found(tmp_path, skip_bad=True)[2] == "not used: 1 .zip (damaged or cut off)"


@pytest.mark.parametrize("pack, name", [(zip_bytes, "images.zip"), (tar_bytes, "images.tar")])
def test_rows_beside_archives_of_their_images(tmp_path, pack, name):
    # github.com/huggingface/datasets/issues/7337: metadata.jsonl beside images.zip
    (tmp_path / name).write_bytes(pack({"a.jpg": b"a", "sub/b.jpg": b"b", "c.jpg": b"c"}))
    rows = [{"file_name": "a.jpg", "n": 1}, {"file_name": "images/sub/b.jpg", "n": 2}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files, metadata, line = found(tmp_path)
    assert list(files.values()) == [b"a", b"b", b"c"] and not line
    assert [m.get("n") for m in metadata.values()] == ["1", "2", None]


# ---- Tables


@pytest.fixture
def pa():
    return pytest.importorskip("pyarrow")


def table(pa, n=200, **columns):
    cells = [{"bytes": b"%d" % i, "path": f"{i}.jpg"} for i in range(n)]
    return pa.table({"text": [f"t{i}" for i in range(n)], "image": cells, **columns})


@pytest.mark.parametrize("rows", [1000, 70])
def test_parquet_with_pictures_is_read_a_few_rows_at_a_time(tmp_path, pa, rows):
    import pyarrow.parquet as pq

    masks = [{"bytes": b"mask", "path": None}] * 200
    pq.write_table(table(pa, mask=masks, blob=[b"x"] * 200), tmp_path / "a.parquet", row_group_size=rows)
    images = find_images(tmp_path / "a.parquet")
    assert [image.read() for image in images] == [b"%d" % i for i in range(200)]
    assert [images[i].read() for i in (199, 3, 70, 2, 140)] == [b"199", b"3", b"70", b"2", b"140"]
    assert images[5].name == "a.parquet/5.jpg" and images[5].metadata == {"text": "t5"}
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(ImageError, match="b.parquet: damaged or cut off"):
        find_images(tmp_path / "b.parquet")
    files, _, line = found(tmp_path, skip_bad=True)
    assert len(files) == 200 and line == "not used: 1 .parquet (damaged or cut off)"


@pytest.mark.parametrize(
    "column", [[[{"bytes": b"0", "path": "x/0.jpg"}]], [b"0"], [{"bytes": None, "path": "/elsewhere/0.jpg"}], ["0.jpg"]]
)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather.arrow"])
def test_cells_that_hold_pictures_or_paths(tmp_path, pa, column, kind):
    import pyarrow.parquet as pq

    put(tmp_path, **{"0_jpg": "0"})
    types = {bytes: pa.binary(), str: pa.string()}
    cell = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    type_ = types.get(type(column[0]), pa.list_(cell) if isinstance(column[0], list) else cell)
    data = pa.table({"picture": pa.array(column, type_), "n": [1]})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(data, path)
    else:
        make = pa.ipc.new_file if kind.startswith("feather") else pa.ipc.new_stream
        with make(str(path), data.schema) as writer:
            writer.write_table(data)
    files, metadata, _ = found(path)
    assert list(files.values()) == [b"0"] and list(metadata.values()) == [{"n": "1"}]


def test_damaged_tables_are_named_and_end_no_program(tmp_path, pa):
    data, chance, path, refused = table(pa, 20), random.Random(0), tmp_path / "a.arrow", 0
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, data.schema) as writer:
        writer.write_table(data)
    for _ in range(60):
        damaged = bytearray(buffer.getvalue())
        for _ in range(3):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            for image in find_images(path):
                image.read()
        except ImageError as error:
            assert path.name in str(error)
            refused += 1
        path.unlink()
    assert refused > 5


def test_a_saved_data_set_is_read_without_its_caches(tmp_path, pa):
    data = table(pa, 3)
    for name in ("train/data-00000-of-00001.arrow", "train/cache-1a2b.arrow", "train/tmp1.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with pa.ipc.new_stream(str(tmp_path / name), data.schema) as writer:
            writer.write_table(data)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "train/state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_dict.json").write_text("{}")
    files, metadata, line = found(tmp_path)
    assert list(files) == [f"train/data-00000-of-00001.arrow/{i}.jpg" for i in range(3)]
    assert metadata["train/data-00000-of-00001.arrow/1.jpg"] == {"text": "t1"}
    assert line == "not used: 2 .arrow (a cache of `datasets`)"


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    put(tmp_path, a_parquet="PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImageError, match=r"a.parquet: is read with pyarrow: pip install 'world-distill\[data\]'"):
        find_images(tmp_path, skip_bad=True)  # nothing is wrong with the file
    (tmp_path / "a.tar").write_bytes(tar_bytes({"1.jpg": b"1"}))
    assert list(found(tmp_path)[0]) == ["a.tar/1.jpg"]  # img2dataset's table is not needed


# ---- Addresses


def test_files_behind_fsspec():
    memory = fsspec.filesystem("memory")
    for name, content in {
        "/reader/set/sub/a.jpg": b"a", "/reader/set/b.jpg": b"b", "/reader/set/b.txt": b"words", "/reader/x.tar":
        tar_bytes({"1.jpg": b"1"}), "/reader/rows.jsonl": b'{"image": "set/b.jpg"}\n{"image": "/elsewhere/a.jpg"}\n',
    }.items():  # fmt: skip
        memory.pipe(name, content)
    try:
        files, metadata, _ = found("memory://reader/set")
        assert files == {"b.jpg": b"b", "sub/a.jpg": b"a"} and metadata["b.jpg"] == {"txt": "words"}
        assert found("memory://reader/{x,x}.tar")[0] == {"x.tar/1.jpg": b"1"}
        assert list(found("memory://reader/rows.jsonl")[0].values()) == [b"b", b"a"]
        assert list(found("memory://reader/set/*.jpg")[0]) == ["b.jpg"]
        with pytest.raises(ImageError, match="memory://reader/none: no such file or folder"):
            find_images("memory://reader/none")
        with pytest.raises(ImageError, match="nosuch://x: cannot be listed .*nosuch"):
            find_images("nosuch://x")
    finally:
        memory.rm("/reader", recursive=True)
