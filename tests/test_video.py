"""Sampling is checked on clips whose frames show their own index; bad files on every kind that users have sent."""

import gc
import random
import subprocess
import sys
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import cut, index_frame, read_index, write_clip, write_sound
from PIL import Image

from llamavid_jax.data.media import MediaError
from llamavid_jax.data.video import _measured_fps, frame_stride, iter_frames, read_video


@pytest.mark.parametrize(
    ("rate", "stride"),
    [
        (Fraction(24000, 1001), 24),
        (Fraction(25), 25),
        (Fraction(30000, 1001), 30),
        (Fraction(5, 2), 2),
        (Fraction(1), 1),
    ],
)
def test_stride_is_rounded_to_even_and_frames_are_those_of_the_index(tmp_path, rate, stride):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(71)], rate)
    video = read_video(path)
    expected = list(range(0, 71, stride))
    assert video.stride == stride
    assert [read_index(frame) for frame in video.frames] == expected
    np.testing.assert_allclose(video.timestamps, [float(i / rate) for i in expected], atol=1e-3)
    assert video.average_fps == pytest.approx(float(rate), rel=1e-6)


@pytest.mark.parametrize(("fps", "stride"), [(2, 12), (10, 2), (25, 1), (0.1, 250), (16.0, 2), (50 / 3, 2), (17, 1)])
def test_stride_of_other_rates(fps, stride):
    assert frame_stride(25.0, fps) == stride  # 25 / 2 = 12.5 -> 12, 25 / 10 = 2.5 -> 2


def test_too_slow_for_the_rate_names_the_file_its_rate_and_the_option(tmp_path):
    path = write_clip(tmp_path / "slow.mp4", [index_frame(i) for i in range(6)], Fraction(2, 5))
    with pytest.raises(MediaError, match=r"slow\.mp4 has 0\.4 frames a second.*--fps 0\.4$"):
        read_video(path)
    assert [read_index(frame) for frame in read_video(path, fps=0.4).frames] == list(range(6))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.mkv", "libx264"),
        ("clip.mov", "mpeg4"),
        ("clip.avi", "mpeg4"),
        ("clip.ts", "libx264"),
        ("clip.mpg", "mpeg2video"),
        ("clip.webm", "libvpx-vp9"),
        ("clip.flv", "flv1"),
        ("clip.h264", "libx264"),
    ],
)
def test_every_container_gives_the_same_frames(tmp_path, name, codec):
    path = write_clip(tmp_path / name, [index_frame(i) for i in range(60)], codec=codec)
    video = read_video(path)
    assert [read_index(frame) for frame in video.frames] == [0, 25, 50]
    np.testing.assert_allclose(video.timestamps, [0, 1, 2], atol=1e-3)


def test_one_frame_is_never_too_few(tmp_path):
    video = read_video(write_clip(tmp_path / "one.mp4", [index_frame(7)]))
    assert video.frames.shape == (1, 32, 160, 3) and read_index(video.frames[0]) == 7


def test_variable_frame_rate_is_sampled_by_index_at_the_frames_own_times(tmp_path):
    times = [0, 40, 80, 500, 510, 900, 2000, 2040, 2080, 3000, 3040, 4000]  # milliseconds
    path = write_clip(tmp_path / "vfr.mkv", [index_frame(i) for i in range(12)], times_ms=times)
    with av.open(str(path)) as container:
        average = float(container.streams.video[0].average_rate)
    video = read_video(path, fps=average / 3)
    assert video.stride == 3
    assert [read_index(frame) for frame in video.frames] == [0, 3, 6, 9]
    np.testing.assert_allclose(video.timestamps, np.array(times[::3]) / 1000, atol=1e-3)


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrors", [(False, False), (True, False), (False, True)])
def test_rotation_and_mirroring_metadata_are_applied(tmp_path, degrees, mirrors):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:24, :32], picture[-24:, :32] = (255, 0, 0), (0, 0, 255)  # red top left, blue bottom left
    expected = np.rot90(picture, degrees // 90)  # both count counter-clockwise
    expected = expected[:, ::-1] if mirrors[0] else expected
    expected = expected[::-1] if mirrors[1] else expected
    frame = read_video(write_clip(tmp_path / "turned.mp4", [picture], rotation=(degrees, *mirrors))).frames[0]
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 8


def test_odd_sizes(tmp_path):
    frames = [np.full((47, 63, 3), 20 * i, np.uint8) for i in range(10)]
    video = read_video(write_clip(tmp_path / "odd.webm", frames, codec="libvpx-vp9"), fps=5)
    assert video.frames.shape == (2, 47, 63, 3)
    np.testing.assert_allclose(video.frames.mean((1, 2, 3)), [0, 100], atol=4)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.gif", "gif", "rgb8"),
        ("a.mkv", "ffv1", "gray16le"),
        ("a.mkv", "ffv1", "yuv444p10le"),
        ("a.mkv", "ffv1", "gbrp10le"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.mkv", "mjpeg", "yuvj422p"),
        ("a.mp4", "libx265", "yuv420p10le"),
        ("a.mp4", "libsvtav1", "yuv420p"),
    ],
)
def test_codecs_and_pixel_formats(tmp_path, name, codec, pix_fmt):
    frames = [np.kron(index_frame(i), np.ones((2, 1, 1), np.uint8)) for i in range(20)]
    video = read_video(write_clip(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt), fps=5)
    assert [read_index(frame[::2]) for frame in video.frames] == [0, 5, 10, 15]
    assert abs(video.frames.astype(int) - np.stack(frames[::5])).mean() < 4


def test_a_stream_that_changes_its_size_is_brought_to_its_first_size(tmp_path):
    small = write_clip(tmp_path / "small.ts", [np.full((48, 64, 3), 50, np.uint8)] * 25)
    large = write_clip(tmp_path / "large.ts", [np.full((96, 128, 3), 200, np.uint8)] * 25)
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    assert read_video(both).frames.shape == (2, 48, 64, 3)


def write_streams(path, **streams):
    """One H.264 stream for each colour=width, the second the default one, and a picture as cover art."""
    with av.open(str(path), "w") as output:
        for place, (name, width) in enumerate(streams.items()):
            stream = output.add_stream("mjpeg" if name == "cover" else "libx264", rate=25)
            stream.width, stream.height = width, 32
            stream.pix_fmt = "yuvj420p" if name == "cover" else "yuv420p"
            if name == "cover":
                stream.disposition = av.stream.Disposition.attached_pic
            elif place == 1:
                stream.disposition = av.stream.Disposition.default
        for number in range(30):
            for stream in output.streams.video:
                if number == 0 or stream.codec_context.name != "mjpeg":
                    pixels = np.full((32, stream.width, 3), stream.width % 256, np.uint8)
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in output.streams.video:
            output.mux(stream.encode())
    return path


def test_the_best_of_several_streams_is_read(tmp_path):
    path = write_streams(tmp_path / "two.mkv", extra=96, main=160)
    video = read_video(path)
    assert video.frames.shape == (2, 32, 160, 3) and abs(video.frames.mean() - 160) < 3


def test_cover_art_is_no_video_stream(tmp_path):
    path = write_streams(tmp_path / "cover.mp4", cover=320, main=160)
    with av.open(str(path)) as container:
        assert av.stream.Disposition.attached_pic in [s.disposition for s in container.streams.video]
    assert read_video(path).frames.shape == (2, 32, 160, 3)


def test_only_sampled_frames_are_converted_and_none_outlives_its_transform(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(75)])
    seen = []

    def shrink(frame):
        gc.collect()
        assert all(reference() is None for reference in seen)
        seen.append(weakref.ref(frame))
        return frame[::4, ::4].copy()

    assert read_video(path, fps=5, transform=shrink).frames.shape == (15, 8, 40, 3)
    assert len(seen) == 15


def test_streaming_and_progress_agree_with_reading_at_once(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(60)])
    seen = []
    video = read_video(path, fps=5, progress=lambda done, total: seen.append((done, total)))
    streamed = list(iter_frames(path, fps=5))
    np.testing.assert_array_equal(np.stack([frame for _, frame in streamed]), video.frames)
    assert [time for time, _ in streamed] == list(video.timestamps) == [done for done, _ in seen]
    assert {total for _, total in seen} == {2.4}


def test_max_frames(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(60)])
    assert len(read_video(path, max_frames=3).frames) == 3
    with pytest.raises(MediaError, match=r"clip\.mp4 gives more than 2 frames at 1 a second; use a smaller --fps"):
        read_video(path, max_frames=2)


def test_an_error_of_the_callers_transform_is_not_taken_for_a_bad_file(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(0)])
    with pytest.raises(ZeroDivisionError):
        read_video(path, transform=lambda frame: frame // (1 // 0))


def test_frames_a_second_are_measured_where_the_file_does_not_say(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", [index_frame(i) for i in range(60)], Fraction(30000, 1001))
    with av.open(str(path)) as container:
        assert _measured_fps(path, path, container.streams.video[0]) == pytest.approx(30000 / 1001, rel=1e-3)


def test_the_package_does_not_load_the_video_library():
    code = "import sys, llamavid_jax.data.video; assert not {'av', 'jax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    """A song with a picture."""
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


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_rates(tmp_path, fps):
    with pytest.raises(MediaError, match="use --fps 1"):
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
