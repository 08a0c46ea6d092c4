"""Sampling is checked on clips whose frames show their own index; bad files on every kind that users have sent."""

import gc
import os
import subprocess
import sys
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import index_frame, read_index, write_clip

from llamavid_jax.media.source import MediaError
from llamavid_jax.media.video import _measured_fps, frame_stride, iter_frames, read_video


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
        gc.collect(1)  # the young ones: frames are
        assert all(reference() is None for reference in seen)
        seen.append(weakref.ref(frame))
        return frame[::4, ::4].copy()

    assert read_video(path, fps=5, transform=shrink).frames.shape == (15, 8, 40, 3)
    assert len(seen) == 15


def test_a_frame_starts_no_threads_of_its_own(tmp_path):
    """A pool of every core for each frame that lives would reach a machine's limit with a few readers side by side."""
    path = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(100)])
    counts, idle = [], len(os.listdir("/proc/self/task"))
    read_video(path, fps=25, transform=lambda frame: (counts.append(len(os.listdir("/proc/self/task"))), frame)[1])
    assert len(counts) == 100 and max(counts) - idle <= os.cpu_count() + 2  # the decoder's


def test_streaming_and_progress_agree_with_reading_at_once(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(60)])
    seen = []
    video = read_video(path, fps=5, progress=lambda done, total: seen.append((done, total)))
    streamed = list(iter_frames(path, fps=5))
    np.testing.assert_array_equal(np.stack([frame for _, frame in streamed]), video.frames)
    assert [time for time, _ in streamed] == list(video.timestamps) == [done for done, _ in seen]
    assert {total for _, total in seen} == {2.4}


def test_an_error_of_the_callers_transform_is_not_taken_for_a_bad_file(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(0)])
    with pytest.raises(ZeroDivisionError):
        read_video(path, transform=lambda frame: frame // (1 // 0))


def test_frames_a_second_are_measured_where_the_file_does_not_say(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", [index_frame(i) for i in range(60)], Fraction(30000, 1001))
    with av.open(str(path)) as container:
        assert _measured_fps(path, path, container.streams.video[0]) == pytest.approx(30000 / 1001, rel=1e-3)


def test_the_package_does_not_load_the_video_library():
    code = "import sys, llamavid_jax.media.video; assert not {'av', 'jax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
