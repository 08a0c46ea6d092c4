"""Sampling, on clips whose frames show their own index; errors, on every kind of bad file that users have sent."""

import gc
import os
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import index_frame, read_index, write_clip
from PIL import Image

from llamavid_jax.media.source import VIDEO_ENDINGS, MediaError
from llamavid_jax.media.timeline import frame_stride
from llamavid_jax.media.video import iter_frames, plan_video, read_video


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
    assert video.sampling.rule == "stride" and video.sampling.frames.tolist() == expected
    assert [read_index(frame) for frame in video.frames] == expected
    np.testing.assert_allclose(video.timestamps, [float(i / rate) for i in expected], atol=1e-3)
    assert video.sampling.timeline.average_fps == pytest.approx(float(rate), rel=1e-6)


@pytest.mark.parametrize(("fps", "stride"), [(2, 12), (10, 2), (25, 1), (0.1, 250), (16.0, 2), (50 / 3, 2), (17, 1)])
def test_stride_of_other_rates(fps, stride):
    assert frame_stride(25.0, fps) == stride  # 25 / 2 = 12.5 -> 12, 25 / 10 = 2.5 -> 2


def test_too_slow_for_the_rate_names_the_file_its_rate_and_a_remedy(tmp_path):
    path = write_clip(tmp_path / "slow.mp4", [index_frame(i) for i in range(6)], Fraction(2, 5))
    with pytest.raises(MediaError, match=r"slow\.mp4 has 0\.4 frames a second.*fps 0\.4 or"):
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


EVEN = [40 * i for i in range(75)]  # milliseconds: 25 fps
BURST = [20 * i for i in range(50)] + [1000 * i for i in range(1, 6)]  # one second at 50 fps, then 1 fps


def indexed(path, times_ms, rate=25, **options):
    """A clip with frames at `times_ms` and `rate` in its header; `codec` as for write_clip."""
    return write_clip(path, [index_frame(i) for i in range(len(times_ms))], rate, times_ms=times_ms, **options)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mkv", "libx264"),  # with B-frames, which are stored out of order
        ("a.mp4", "libx264"),
        ("a.webm", "libvpx"),
        ("a.ts", "libx264"),
        ("a.flv", "flv1"),
        ("a.avi", "mpeg4"),
        ("a.asf", "wmv2"),
        ("a.nut", "libx264"),
        ("a.gif", "gif"),
        ("a.apng", "apng"),
    ],
)
def test_of_a_varying_rate_the_frame_shown_at_each_second_is_taken(tmp_path, name, codec):
    pix_fmt = {"gif": "rgb8", "apng": "rgb24"}.get(codec, "yuv420p")
    video = read_video(indexed(tmp_path / name, BURST, codec=codec, pix_fmt=pix_fmt))
    assert video.sampling.rule == "times"
    assert [read_index(frame) for frame in video.frames] == [0, 50, 51, 52, 53, 54]
    np.testing.assert_allclose(video.timestamps, range(6))


def test_a_slide_is_seen_as_long_as_it_is_shown(tmp_path):
    slides = indexed(tmp_path / "slides.mkv", [0, 4000, 8000, 12000, 16000])
    assert [read_index(frame) for frame in read_video(slides).frames] == [i // 4 for i in range(20)]
    assert [read_index(frame) for frame in read_video(slides, fps=0.25).frames] == list(range(5))


@pytest.mark.parametrize("rate", [1, 2, 5, 24, 50, 60, 1000, 90000])
@pytest.mark.parametrize("start", [0, 3000])
def test_a_wrong_rate_in_the_header_changes_no_frame(tmp_path, rate, start):
    video = read_video(indexed(tmp_path / "a.mkv", [start + time for time in EVEN], rate))
    assert video.sampling.rule == "times"
    assert [read_index(frame) for frame in video.frames] == [0, 25, 50]
    np.testing.assert_allclose(video.timestamps, [0, 1, 2])


def test_frames_without_content_are_no_frames_though_avi_counts_them(tmp_path):
    path = indexed(tmp_path / "a.avi", EVEN, 50)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > 140
    video = read_video(path)
    assert [read_index(frame) for frame in video.frames] == [0, 25, 50] and video.sampling.rule == "times"


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mkv", "libx264", None),
        ("a.webm", "libvpx", {"live": "1"}),
        ("a.mp4", "libx264", None),
        ("a.mp4", "libx264", FRAGMENTS),
        ("a.ts", "libx264", None),
        ("a.wmv", "wmv2", None),
    ],
)
def test_a_file_that_starts_late_is_whole(tmp_path, name, codec, container):
    times = [3000 + time for time in EVEN]
    video = read_video(indexed(tmp_path / name, times, codec=codec, container=container))
    assert [read_index(frame) for frame in video.frames] == [0, 25, 50] and video.sampling.rule == "stride"
    np.testing.assert_allclose(video.timestamps, [0, 1, 2], atol=2e-3)


@pytest.mark.parametrize("group", [10, 250])
def test_frames_before_0_have_no_time_in_matroska_and_are_not_sampled(tmp_path, group):
    """A cut without re-encoding keeps them only so that later frames can be decoded."""
    times, options = [time - 1880 for time in EVEN], {"preset": "ultrafast", "bf": "2", "g": str(group)}
    video = read_video(indexed(tmp_path / "a.mkv", times, container={"avoid_negative_ts": "disabled"}, options=options))
    assert [read_index(frame) for frame in video.frames] == [47, 72]
    assert len(video.sampling.timeline.times) == len(EVEN) - 47


def test_sound_that_is_longer_than_the_picture_adds_nothing(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        picture, sound = output.add_stream("libx264", rate=25), output.add_stream("aac", rate=16000)
        picture.width, picture.height, picture.pix_fmt = 160, 32, "yuv420p"
        for i in range(50):
            output.mux(picture.encode(av.VideoFrame.from_ndarray(index_frame(i), format="rgb24")))
        output.mux(picture.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 160_000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        output.mux(sound.encode(silence))
        output.mux(sound.encode())
    video = read_video(path)
    assert [read_index(frame) for frame in video.frames] == [0, 25]
    assert video.sampling.timeline.seconds == pytest.approx(2)


def test_a_subtitle_that_is_longer_than_the_picture_adds_nothing():
    video = read_video(Path(__file__).with_name("subtitle_of_50_minutes.mkv"))
    assert len(video.frames) == 10 and video.sampling.rule == "stride"
    assert video.sampling.timeline.seconds == pytest.approx(10)


def test_what_an_edit_list_hides_is_not_sampled(tmp_path):
    """As in a trimmed recording: 1.32 s of the stream are kept only so that later frames can be decoded."""
    path = tmp_path / "trimmed.mp4"
    with av.open(str(indexed(tmp_path / "whole.mp4", EVEN))) as whole, av.open(str(path), "w") as trimmed:
        copy = trimmed.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(whole.streams.video[0]):
            if packet.size:
                packet.pts -= int(1.32 / packet.time_base)
                packet.dts -= int(1.32 / packet.time_base)
                packet.stream = copy
                trimmed.mux(packet)
    assert [read_index(frame) for frame in read_video(path).frames] == [33, 58]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.ts", "libx264"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.mpg", "mpeg2video"),
        ("a.gif", "gif"),
        ("a.avi", "mjpeg"),
    ],
)
def test_files_that_are_joined_end_to_end_are_seen_one_after_the_other(tmp_path, name, codec):
    pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    joined = tmp_path / name
    for start in (0, 100):
        frames = [index_frame(start + i) for i in range(75)]
        part = write_clip(tmp_path / f"{start}{joined.suffix}", frames, codec=codec, pix_fmt=pix_fmt)
        joined.write_bytes((joined.read_bytes() if start else b"") + part.read_bytes())
    video = read_video(joined)
    assert [read_index(frame) for frame in video.frames] == [0, 25, 50, 100, 125, 150]
    np.testing.assert_allclose(video.timestamps, range(6), atol=2e-3)
    assert video.sampling.rule == "stride"


def test_a_stream_that_begins_late_is_no_hindrance(tmp_path):
    """Audio that starts after ten seconds: the file may not announce its stream until then."""
    path = write_clip(tmp_path / "a.flv", [index_frame(i) for i in range(250)], codec="flv1")
    tag = bytes([8, 0, 0, 41, *(10_000).to_bytes(3, "big"), 0, 0, 0, 0, 0x2F, *bytes(40)])
    path.write_bytes(path.read_bytes() + tag + len(tag).to_bytes(4, "big"))
    with av.open(str(path)) as container:
        assert len(container.streams) == 1
    assert [read_index(frame) for frame in read_video(path).frames] == list(range(0, 250, 25))


def test_an_animated_webp_is_a_video(tmp_path):
    first, *others = [Image.fromarray(index_frame(i)) for i in range(20)]
    path = tmp_path / "a.webp"
    first.save(path, save_all=True, append_images=others, duration=[100] * 19 + [400], lossless=True)
    video = read_video(path, fps=5)
    assert [read_index(frame) for frame in video.frames] == [*range(0, 20, 2), 19, 19]
    np.testing.assert_allclose(video.timestamps, np.arange(12) / 5)


def test_a_frame_that_is_shown_for_long_is_converted_once(tmp_path):
    calls = []
    video = read_video(indexed(tmp_path / "a.mkv", [0, 4000]), transform=lambda frame: (calls.append(1), frame)[1])
    assert len(video.frames) == 8 and len(calls) == 2


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
    """A file with one H.264 stream for each name=width, the second one the default; `cover` is cover art."""
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
        gc.collect(1)  # the young generations, which hold the frames
        assert all(reference() is None for reference in seen)
        seen.append(weakref.ref(frame))
        return frame[::4, ::4].copy()

    assert read_video(path, fps=5, transform=shrink).frames.shape == (15, 8, 40, 3)
    assert len(seen) == 15


def test_a_frame_starts_no_threads_of_its_own(tmp_path):
    """With a thread pool of all cores for each live frame, a few concurrent readers would reach the machine's limit."""
    path = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(100)])
    counts, idle = [], len(os.listdir("/proc/self/task"))
    read_video(path, fps=25, transform=lambda frame: (counts.append(len(os.listdir("/proc/self/task"))), frame)[1])
    assert len(counts) == 100 and max(counts) - idle <= os.cpu_count() + 2  # the decoder's threads


def test_streaming_and_progress_agree_with_reading_at_once(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(60)])
    seen = []
    video = read_video(path, fps=5, progress=lambda sampling, done: seen.append((len(sampling), done)))
    streamed = list(iter_frames(path, plan_video(path, fps=5)))
    np.testing.assert_array_equal(np.stack([frame for _, frame in streamed]), video.frames)
    assert [time for time, _ in streamed] == list(video.timestamps)
    assert seen == [(12, done) for done in range(1, 13)]


def test_an_error_of_the_callers_transform_is_not_taken_for_a_bad_file(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(0)])
    with pytest.raises(ZeroDivisionError):
        read_video(path, transform=lambda frame: frame // (1 // 0))


def test_the_package_does_not_load_the_video_library():
    code = "import sys, llamavid_jax.media.video; assert not {'av', 'jax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("ending", "form", "codec"),
    [
        (".asf", ".asf", "wmv2"),
        (".f4v", ".mp4", "libx264"),
        (".3g2", ".3g2", "libx264"),
        (".m2v", ".m2v", "mpeg2video"),
        (".mpe", ".mpg", "mpeg2video"),
        (".mxf", ".mxf", "mpeg2video"),
        (".divx", ".avi", "mpeg4"),
        (".h264", ".h264", "libx264"),
        (".264", ".h264", "libx264"),
        (".hevc", ".hevc", "libx265"),
    ],
)
def test_rare_endings_that_commands_take_from_a_folder_can_be_read(tmp_path, ending, form, codec):
    path = write_clip(tmp_path / f"a{form}", [index_frame(i) for i in range(50)], codec=codec).rename(
        tmp_path / f"b{ending}"
    )
    assert ending in VIDEO_ENDINGS
    assert [read_index(frame) for frame in read_video(path).frames] == [0, 25]
