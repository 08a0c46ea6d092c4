"""Files that are damaged, truncated or no videos: a MediaError that names the file and a remedy, never a crash."""

import io
import random

import av
import numpy as np
import pytest
from clips import cut, index_frame, read_index, write_clip, write_sound
from PIL import Image

from llamavid_jax.data.records import count_frames
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.video import plan_video, read_video

INDEX_FIRST = {"movflags": "faststart"}


def clip(folder, name, codec="libx264", **options):
    noise = np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), dtype=np.uint8)
    return write_clip(folder / name, list(noise), codec=codec, **options)


def damaged(path, start, length):
    data = bytearray(path.read_bytes())
    begin = int(len(data) * start)
    data[begin : begin + length] = bytes(length)
    path.write_bytes(data)
    return path


def replaced(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def text(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def picture(folder, name):
    Image.new("RGB", (64, 48)).save(folder / name)
    return folder / name


def cover_only(path):
    """A song with cover art."""
    with av.open(str(path), "w", format="mp4") as output:
        sound, cover = output.add_stream("aac", rate=16000), output.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(sound.encode(frame))
        output.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        output.mux(sound.encode())
        output.mux(cover.encode())
    return path


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
BAD_FILES = {
    "missing": lambda d: d / "nothing.mp4",
    "folder": lambda d: d,
    "name with NUL": lambda d: f"{d}/a\0b.mp4",
    "empty": lambda d: text(d, "empty.mp4", b""),
    "text": lambda d: text(d, "text.mp4", b"not a video\n" * 200),
    "random bytes": lambda d: text(d, "random.mp4", random.Random(0).randbytes(20000)),
    "zeros": lambda d: text(d, "zeros.mp4", bytes(20000)),
    "subtitles": lambda d: text(d, "words.srt", b"1\n00:00:00,000 --> 00:00:02,000\nhello\n\n"),
    "web page": lambda d: text(d, "page.mp4", b"<!DOCTYPE html><html><body>404</body></html>" * 9),
    "playlist": lambda d: text(d, "list.m3u8", PLAYLIST),
    "list of files": lambda d: text(d, "list.mp4", b"ffconcat version 1.0\nfile " + clip(d, "a.mp4").name.encode()),
    "still PNG": lambda d: picture(d, "photo.png"),
    "still JPEG as .mp4": lambda d: picture(d, "photo.jpg").rename(d / "photo.mp4"),
    "sound only": lambda d: write_sound(d / "sound.m4a"),
    "sound only as .mp4": lambda d: write_sound(d / "sound.mp4"),
    "index at the end, cut": lambda d: cut(clip(d, "clip.mp4"), 0.9),
    "index first, cut": lambda d: cut(clip(d, "clip.mp4", container=INDEX_FIRST), 0.5),
    "index first, cut late": lambda d: cut(clip(d, "clip.mp4", container=INDEX_FIRST), 0.85),
    "index first, only the index": lambda d: cut(clip(d, "clip.mp4", container=INDEX_FIRST), 0.012),
    "fragments, cut": lambda d: cut(clip(d, "clip.mp4", container={"movflags": "frag_keyframe+empty_moov"}), 0.5),
    "Matroska, cut": lambda d: cut(clip(d, "clip.mkv"), 0.5),
    "Matroska, only its head": lambda d: cut(clip(d, "clip.mkv"), 0.002),
    "WebM, cut": lambda d: cut(clip(d, "clip.webm", codec="libvpx-vp9"), 0.4),
    "AVI, cut": lambda d: cut(clip(d, "clip.avi", codec="mpeg4"), 0.5),
    "hole in the middle": lambda d: damaged(clip(d, "clip.mp4"), 0.4, 4000),
    "a few bytes in the middle, which the decoder patches up": lambda d: damaged(clip(d, "clip.mp4"), 0.4, 64),
    "unknown codec": lambda d: replaced(clip(d, "clip.mp4"), b"avc1", b"zzzz"),
    "unknown codec in Matroska": lambda d: replaced(clip(d, "clip.mkv"), b"V_MPEG4/ISO/AVC", b"V_NOBODY/KNO/WSI"),
    "wrong codec": lambda d: replaced(clip(d, "clip.mp4"), b"avc1", b"hvc1"),
    "hole at the start": lambda d: damaged(clip(d, "clip.mp4"), 0.001, 10**5),
    "no frame left": lambda d: damaged(clip(d, "clip.ts"), 0.004, 10**6),
    "only cover art": lambda d: cover_only(d / "song.m4a"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_with_a_remedy(tmp_path, kind, capfd):
    path = BAD_FILES[kind](tmp_path)
    with pytest.raises(MediaError) as caught:
        read_video(path)
    check_message(str(caught.value), str(path))
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    assert capfd.readouterr().err == ""  # no decoder log


def check_message(message, path):
    assert path in message or repr(path) in message
    remedy = message.rpartition("; ")[2]
    assert remedy.split()[0] in ("give", "copy", "check", "use", "convert")
    assert "\n" not in message


def test_a_cut_file_says_how_much_can_be_read(tmp_path):
    path = cut(clip(tmp_path, "clip.mkv"), 0.5)
    with pytest.raises(MediaError, match=r"1\.\d of 4\.0 seconds can be read"):
        read_video(path)


KINDS = [
    ("a.mp4", "libx264", INDEX_FIRST),
    ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    ("a.mkv", "libx264", None),
    ("a.webm", "libvpx", {"live": "1"}),
    ("a.avi", "mpeg4", None),
    ("a.flv", "flv1", None),
    ("a.wmv", "wmv2", None),
    ("a.ogv", "libvpx", None),
    ("a.gif", "gif", None),
    ("a.apng", "apng", None),
    ("a.nut", "libx264", None),
    ("a.mjpeg", "mjpeg", None),
    ("a.ivf", "libvpx", None),
]


@pytest.mark.parametrize(("name", "codec", "container"), KINDS)
def test_a_cut_end_is_told_before_anything_is_decoded(tmp_path, name, codec, container):
    pix_fmt = {"gif": "rgb8", "apng": "rgb24", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    path = clip(tmp_path, name, codec, pix_fmt=pix_fmt, container=container)
    assert len(plan_video(path)) == 4
    data, draws = path.read_bytes(), random.Random(3)
    for length in (len(data) // 2, *(draws.randrange(len(data) // 3, len(data) - 8) for _ in range(12))):
        path.write_bytes(data[:length])
        with pytest.raises(MediaError) as caught:
            plan_video(path)
        check_message(str(caught.value), str(path))


@pytest.mark.parametrize("end", [b"", b"--b\r\n", b"--b--\r\n"])
def test_pictures_of_a_camera(tmp_path, end):
    """Motion JPEG as sent over HTTP, each image after a boundary, with or without one after the last."""
    pictures = []
    for number in range(60):
        image = io.BytesIO()
        Image.fromarray(index_frame(number)).save(image, "jpeg")
        pictures.append(b"--b\r\nContent-type: image/jpeg\r\n\r\n" + image.getvalue() + b"\r\n")
    path = text(tmp_path, "camera.mjpeg", b"".join(pictures) + end)
    assert [read_index(frame) for frame in read_video(path, 25).frames] == list(range(60))
    path.write_bytes(b"".join(pictures)[:-100])
    with pytest.raises(MediaError, match=r"is cut short or damaged: 2.3 seconds can be read"):
        plan_video(path)


def test_an_encrypted_film_is_called_so(tmp_path):
    secret = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00" * 16, "encryption_kid": "01" * 16}
    path = clip(tmp_path, "a.mp4", container=secret)
    with pytest.raises(MediaError, match=r"a.mp4 is encrypted, and there is no key to it; give it decrypted"):
        plan_video(path)


@pytest.mark.parametrize(
    ("name", "codec", "copies"),
    [("a.mp4", "libx264", 2), ("a.flv", "flv1", 2), ("a.wmv", "wmv2", 2), ("a.mkv", "libx264", 3)],
)
def test_files_joined_end_to_end_that_cannot_be_read_to_the_end(tmp_path, name, codec, copies):
    path = clip(tmp_path, name, codec)
    path.write_bytes(path.read_bytes() * copies)
    with pytest.raises(MediaError, match=r"joined end to end.*; give them one by one"):
        plan_video(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.wmv", "a.gif"])
def test_what_stands_behind_the_end_is_no_damage(tmp_path, name):
    codec = {"avi": "mpeg4", "wmv": "wmv2", "gif": "gif"}.get(name[2:], "libx264")
    path = clip(tmp_path, name, codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p")
    path.write_bytes(path.read_bytes() + bytes(100))
    assert len(read_video(path).frames) == 4


def test_a_damaged_file_without_a_length_is_one_clear_line(tmp_path):
    path = cut(clip(tmp_path, "a.apng", "apng", pix_fmt="rgb24"), 0.6)
    for read in (plan_video, read_video, lambda path: count_frames(path, "video", 1)):
        with pytest.raises(MediaError, match="is cut short or damaged"):
            read(path)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_rates(tmp_path, fps):
    with pytest.raises(MediaError, match="use fps 1"):
        read_video(write_clip(tmp_path / "clip.mp4", [index_frame(0)]), fps=fps)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")])
def test_random_damage_gives_frames_or_a_media_error(tmp_path, name, codec):
    data = write_clip(tmp_path / name, [index_frame(i) for i in range(12)], codec=codec).read_bytes()
    draws, path, refused = random.Random(1), tmp_path / f"damaged-{name}", 0
    for _ in range(80):
        broken = bytearray(data)
        for _ in range(draws.choice((1, 4, 40))):
            broken[draws.randrange(len(broken))] = draws.randrange(256)
        path.write_bytes(broken[: draws.choice((len(broken), draws.randrange(1, len(broken))))])
        try:
            assert len(read_video(path, fps=5).frames) > 0
        except MediaError as error:
            refused += 1
            assert path.name in str(error)
    assert 20 < refused < 80
