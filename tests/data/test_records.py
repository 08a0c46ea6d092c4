"""Records of every form that LLaVA-format data comes in, sizes without decoding, and files that are broken."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from clips import cut, index_frame, write_clip
from PIL import Image
from safetensors.numpy import save_file

from llamavid_jax.data.record import DataError, Record
from llamavid_jax.data.records import JsonRows, count_frames, find_media, media_file, media_size, read_records
from llamavid_jax.media.features import iter_features, read_header
from llamavid_jax.media.source import MediaError

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]


def write(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def test_kinds_paths_and_names(tmp_path):
    rows = [
        {"id": "a", "image": "x/y.jpg", "conversations": TALK},
        {"id": 7, "video": "clip é.mp4", "conversations": TALK},
        {"video": "film.NPZ", "conversations": TALK},
        {"id": None, "features": "f", "conversations": TALK, "image": None},
        {"id": "t", "conversations": TALK, "image": None},
        {"id": "abs", "image": str(tmp_path / "z.png"), "conversations": TALK},
    ]
    media = tmp_path / "media"
    media.mkdir()
    records = read_records(write(tmp_path / "data.json", rows), media)
    assert [(r.id, r.kind, r.media) for r in records] == [
        ("a", "image", str(media / "x/y.jpg")),
        ("7", "video", str(media / "clip é.mp4")),
        ("2", "features", str(media / "film.NPZ")),
        ("3", "features", str(media / "f")),
        ("t", "text", None),
        ("abs", "image", str(tmp_path / "z.png")),
    ]
    assert read_records(tmp_path / "data.json")[0].media == str(tmp_path / "x/y.jpg")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_writing_of_a_list_gives_its_values(tmp_path, indent, mark, ascii_only):
    rows = [{"id": "é😀", "conversations": ["[", "]\\", '",'], "n": [1, {"a": []}]}, 3, "x, y", {"id": "last 語"}]
    path = tmp_path / "data.json"
    path.write_text(mark + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + " \r\n", encoding="utf-8")
    assert list(JsonRows(path)) == rows
    lines = tmp_path / "data.jsonl"
    text = "\n\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    for end in ("", "\n", "\r\n  \n"):
        lines.write_text(mark + text + end, encoding="utf-8", newline="")
        assert list(JsonRows(lines)) == rows


def test_a_link_is_read_by_its_own_name(tmp_path):
    """The link's name gives the format: Hugging Face's cache links NAME.jsonl to a file named by its hash."""
    (tmp_path / "5f3a").write_text('{"id": 1}\n{"id": 2}\n')
    (tmp_path / "chat.jsonl").symlink_to("5f3a")
    assert len(JsonRows(tmp_path / "chat.jsonl")) == 2


def test_records_go_to_other_processes_without_their_content(tmp_path):
    rows = [{"id": f"n{i}", "conversations": TALK} for i in range(500)]
    records = read_records(write(tmp_path / "data.json", rows))
    assert records[499].id == "n499"
    sent = pickle.dumps(records)
    assert len(sent) < 500 * 16 + 1000 < (tmp_path / "data.json").stat().st_size
    copy = pickle.loads(sent)
    assert len(copy) == 500 and copy[-1] == records[499] and copy[np.int64(3)].id == "n3"
    with pytest.raises(IndexError):
        copy[500]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.json", b"[]", "holds no records"),
        ("a.jsonl", b"\n \n", "holds no records"),
        ("a.json", b'{"id": 1}', "begins with .*or a .jsonl"),
        ("a.json", b'{"id": 1}\n{"id": 2}', "begins with .*or a .jsonl"),
        ("a.json", b'[{"id": 1}, {"id"', "not a readable list.*column"),
        ("a.json", b'[{"id": 1} {"id": 2}]', "Expecting ','"),
        ("a.json", b'[{"id": 1}', "Expecting ','"),
        ("a.json", b'[{"id": 1}]\n[{"id": 2}]', "Text after the list: line 2"),
        ("a.json", b'[{"id": "\xff"}]', "not a readable list.*utf-8"),
        ("a.json", b"[" * 100_000, "not a readable list"),
        ("a.json", b"\x80\x04]q\x00", "not a readable list"),
    ],
)
def test_a_file_that_is_no_data_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        read_records(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"the folder of the media, .*nowhere, does not exist"):
        read_records(write(tmp_path / "data.json", [{"conversations": TALK}]), tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no\.json does not exist"):
        read_records(tmp_path / "no.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "record 1 is 'text'"),
        (None, "record 1 is 'None'"),
        ({"id": "x"}, "'x': conversations is 'None'"),
        ({"id": "x", "conversations": []}, "'x': conversations is '\\[\\]'"),
        ({"id": "x", "conversations": "hi"}, "conversations is 'hi'"),
        ({"id": "x", "conversations": TALK, "image": "a.jpg", "video": "b.mp4"}, "image and video; give one"),
        ({"id": "x", "conversations": TALK, "image": ["a.jpg"]}, "path of one file"),
        ({"id": "x", "conversations": TALK, "image": " "}, "path of one file"),
        ({"id": "x", "conversations": TALK, "image": "a\n.jpg"}, "path of one file"),
        ({"id": "x", "conversations": TALK, "video": 3}, "path of one file"),
        ({"id": "x", "conversations": TALK, "video": "film.pth"}, r"film\.pth is a pickle.*numpy\.savez"),
    ],
)
def test_a_record_that_cannot_be_used_is_an_error_of_its_own(tmp_path, row, message):
    good = {"id": "good", "conversations": TALK}
    records = read_records(write(tmp_path / "data.json", [good, row, good]))
    assert records[0].id == records[2].id == "good"
    with pytest.raises(DataError, match=message):
        records[1]


def test_a_bad_line_is_an_error_of_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "x", "conversations": TALK}) + '\n{"id": \n')
    records = read_records(tmp_path / "a.jsonl")
    assert records[0].id == "x"
    with pytest.raises(DataError, match=r"record 1 of .*a\.jsonl is not readable JSON"):
        records[1]


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


def test_fallbacks_apply_only_where_the_named_file_is_missing(tmp_path):
    def found(name):
        return find_media(Record("r", TALK, str(tmp_path / name), "image"))

    moved, png = image(tmp_path / "vg/images/1.jpg"), image(tmp_path / "ocr_vqa/2.png")
    there = image(tmp_path / "vg/VG_100K_2/3.jpg")
    image(tmp_path / "vg/images/3.jpg")
    image(tmp_path / "coco/4.png")
    assert found("vg/VG_100K/1.jpg") == found("vg/VG_100K_2/1.jpg") == str(moved)
    assert found("ocr_vqa/2.jpg") == str(png)
    assert found("vg/VG_100K_2/3.jpg") == str(there)
    assert found("coco/4.jpg") == str(tmp_path / "coco/4.jpg")  # the fallback is for ocr_vqa only
    assert find_media(Record("r", TALK, str(tmp_path / "ocr_vqa/2.jpg"), "video")).endswith("2.jpg")


@pytest.mark.parametrize("name", ["missing.mp4", "", "a\0b", "x" * 300, "\ud800"])
def test_media_that_are_not_there(tmp_path, name):
    for kind in ("image", "video", "features"):
        with pytest.raises(MediaError), media_file(Record("r", TALK, str(tmp_path / name), kind)):
            pass


FEATS = np.random.default_rng(0).normal(size=(5, 10, 3)).astype(np.float16)  # CLS and 9 patches


def feature_file(path, feats=FEATS, inputs=None, key="feats"):
    if path.suffix == ".npz":
        np.savez(path, **{key: feats} | ({} if inputs is None else {"inputs": inputs}))
    elif path.suffix == ".npy":
        np.save(path, feats)
    else:
        save_file({key: feats}, path, metadata=None if inputs is None else {"inputs": inputs})
    return path


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
@pytest.mark.parametrize("key", ["feats", "features"])
def test_features_lose_cls_and_are_counted_by_their_header(tmp_path, suffix, key):
    text = None if suffix == ".npy" else "<image>a é" * 5
    path = feature_file(tmp_path / f"f{suffix}", inputs=text, key=key)
    assert read_header(path) == (5, 9, 3, text)
    np.testing.assert_array_equal(np.stack(list(iter_features(path))), FEATS[:, 1:])
    without = feature_file(tmp_path / f"g{suffix}", FEATS[:, 1:].astype(np.float32), key=key)
    frames = np.stack(list(iter_features(without)))
    assert read_header(without).inputs is None and frames.dtype == np.float32
    np.testing.assert_array_equal(frames, FEATS[:, 1:].astype(np.float32))
    record = Record("r", TALK, str(path), "features")
    assert media_size(record, 1) == 5
    assert media_size(Record("r", TALK, "shard/f", "features", path.read_bytes()), 1) == 5


def with_nan(frame):
    bad = FEATS.copy()
    bad[frame, 1, 1] = np.nan
    return bad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: feature_file(d / "a.npz", FEATS[0]), r"shape \[10, 3\]"),
        (lambda d: feature_file(d / "a.npy", FEATS[:0]), r"shape \[0, 10, 3\]"),
        (lambda d: feature_file(d / "a.npy", FEATS[:, :8]), "square number"),
        (lambda d: feature_file(d / "a.npy", FEATS.astype(np.float64)), "float64; float16 or float32"),
        (lambda d: feature_file(d / "a.safetensors", FEATS.astype(np.int8)), "I8; float16 or float32"),
        (lambda d: feature_file(d / "a.npz", key="other"), "holds other, but no array `feats`"),
        (lambda d: feature_file(d / "a.npz", inputs=np.array(["a", "b"])), "one text is needed"),
        (lambda d: feature_file(d / "a.npz", inputs=np.array(None)), "no file of features"),
        (lambda d: feature_file(d / "a.npy", np.asfortranarray(FEATS)), "by columns"),
        (lambda d: feature_file(d / "a.npy", np.array([None])), "object; float16"),
        (lambda d: cut(feature_file(d / "a.npy"), 0.7), "cut short"),
        (lambda d: cut(feature_file(d / "a.npz"), 0.7), "no file of features, or damaged"),
        (lambda d: cut(feature_file(d / "a.safetensors"), 0.7), "no file of features, or damaged"),
        (lambda d: cut(feature_file(d / "a.npy"), 0.1), "no file of features, or damaged"),
    ],
)
def test_features_that_cannot_be_used_say_so_in_their_header(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(MediaError, match=rf"{path.name}.*{message}"):
        read_header(path)


def test_features_with_bad_values_or_checksums_say_so_when_they_are_read(tmp_path):
    with pytest.raises(MediaError, match="frame 3 holds values that are not finite"):
        list(iter_features(feature_file(tmp_path / "nan.npz", with_nan(3))))
    path = feature_file(tmp_path / "flipped.npz")
    data = bytearray(path.read_bytes())
    data[zipfile.ZipFile(path).infolist()[0].header_offset + 200] ^= 1  # among the values
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"flipped\.npz.*CRC"):
        list(iter_features(path))


def test_a_pickle_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for protocol in (0, 2, 5):
        path = tmp_path / "f.npz"
        path.write_bytes(pickle.dumps({"feats": Bomb()}, protocol=protocol))
        with pytest.raises(MediaError):
            list(iter_features(path))
    np.save(tmp_path / "g.npy", np.array([Bomb()], object), allow_pickle=True)
    np.savez(tmp_path / "h.npz", feats=FEATS, inputs=np.array(Bomb(), object))
    for name in ("g.npy", "h.npz"):
        with pytest.raises(MediaError):
            list(iter_features(tmp_path / name))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.ts", "libx264")],
)
@pytest.mark.parametrize("count", [1, 25, 26, 61])
def test_a_video_is_counted_without_decoding_it(tmp_path, name, codec, count):
    path = write_clip(tmp_path / name, [index_frame(i) for i in range(count)], codec=codec)
    for fps, stride in ((1, 25), (5, 5), (25, 1)):
        assert count_frames(path, "video", fps) == -(-count // stride)
        assert media_size(Record("r", TALK, "x.mp4", "video", path.read_bytes()), fps) == -(-count // stride)


def test_a_recording_without_a_length_is_counted_by_its_packets(tmp_path):
    path = write_clip(
        tmp_path / "live.webm", [index_frame(i) for i in range(40)], 10, "libvpx-vp9", container={"live": "1"}
    )
    assert count_frames(path, "video", 1) == 4


def test_media_from_memory_are_named_as_in_the_data(tmp_path):
    record = Record("r7", TALK, "videos/x.mp4", "video", b"no video at all")
    with pytest.raises(MediaError, match=r"^videos/x\.mp4 is not a video"):
        media_size(record, 1)
    with pytest.raises(MediaError, match=r"^the video of record 'r7'"):
        media_size(Record("r7", TALK, None, "video", b"no video at all"), 1)
    assert media_size(Record("t", TALK, None, "text"), 1) == 0
    assert media_size(Record("i", TALK, "never opened", "image"), 1) == 1
