"""Decoding only what a sampling needs gives the same frames, bit for bit, as decoding everything in order."""

import contextlib
import dataclasses
import functools
import threading

import av
import numpy as np
import pytest
from clips import index_frame, read_index, write_clip, write_sound

from llamavid_jax.media import reading, video
from llamavid_jax.media.index import Index
from llamavid_jax.media.reading import Span, plan_reading
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.timeline import Packet, timeline_of
from llamavid_jax.media.video import iter_frames, plan_video

COUNT = 150


@functools.cache
def frames():
    """Frames that show their index above a moving image, so that a wrong reference frame is noticed."""
    texture = np.random.default_rng(0).integers(0, 256, (32, 320, 3), np.uint8)
    return [np.concatenate([index_frame(i), texture[:, i : i + 160]]) for i in range(COUNT)]


def film(path, codec="libx264", options=None, **others):
    options = {"libx264": {"g": "12", "bf": "3", "x264-params": "scenecut=0"}}.get(codec, {}) | (options or {})
    return write_clip(path, frames(), codec=codec, options=options, **others)


def x264(text):
    return "libx264", {"x264-params": f"scenecut=0:{text}"}


H265 = "keyint=12:scenecut=0:log-level=none"
PARTS = {  # files in which decoding can start at several positions
    "H.264.mp4": ("libx264", {}),
    "H.264.mkv": ("libx264", {}),
    "H.264 without B-frames.mp4": ("libx264", {"bf": "0"}),
    "H.264 key frames alone.mp4": ("libx264", {"g": "1"}),
    "HEVC open.mp4": ("libx265", {"x265-params": H265}),
    "HEVC closed.mkv": ("libx265", {"x265-params": H265 + ":open-gop=0"}),
    "HEVC in layers.mp4": ("libx265", {"x265-params": H265 + ":temporal-layers=2:b-adapt=0:bframes=3"}),
    "VP9.webm": ("libvpx-vp9", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "12"}),
    "VP9.mp4": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "VP8.webm": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "12"}),
    "AV1.mkv": ("libsvtav1", {"g": "12", "preset": "10"}),
    "AV1.mp4": ("libsvtav1", {"g": "12", "preset": "10"}),
    "MPEG-4.mp4": ("mpeg4", {"g": "12", "bf": "2"}),
    "MPEG-4.mkv": ("mpeg4", {"g": "12", "bf": "2"}),
    "MPEG-2.mkv": ("mpeg2video", {"g": "12", "bf": "2"}),
    "Motion JPEG.mkv": ("mjpeg", {}),
}
ONE_PART = {  # files decoded from the start; frames that no other refers to are skipped
    "H.264 open.mp4": x264("keyint=12:open-gop=1:bframes=3"),
    "H.264 refreshed bit by bit.mkv": x264("keyint=12:intra-refresh=1"),
    "H.264 of one group.mp4": ("libx264", {"g": "1000"}),
    "H.264.ts": ("libx264", {}),
    "H.264.flv": ("libx264", {}),
    "MPEG-4.ts": ("mpeg4", {"g": "12", "bf": "2"}),
}
IN_ORDER = {
    "MPEG-2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "MPEG-4.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "H.264 interlaced.mp4": x264("keyint=12:tff=1:bframes=3"),
    "FFV1.mkv": ("ffv1", {}),
    "HEVC.ts": ("libx265", {"x265-params": H265}),
}


@pytest.fixture(params=[1, 60])
def small(monkeypatch, request):
    """Plans a clip like a long film, in parts of one or several groups of pictures."""
    monkeypatch.setattr(reading, "SHORT", 0)
    monkeypatch.setattr(reading, "PART", request.param)


@pytest.fixture
def resorted(monkeypatch):
    """Counts how often the reader fell back to decoding in order."""
    calls, original = [], video.decode_in_order
    monkeypatch.setattr(video, "decode_in_order", lambda *args: calls.append(1) or original(*args))
    return calls


def parts_of(sampling):
    return plan_reading(sampling.timeline, np.unique(sampling.frames))


def in_order(sampling):
    return dataclasses.replace(sampling, timeline=dataclasses.replace(sampling.timeline, index=None))


def check_equal(path, fps=(0.7, 1, 3.3, 25)):
    for rate in fps:
        sampling = plan_video(path, rate)
        expected = list(iter_frames(path, in_order(sampling)))
        for decoders in (0, 3):
            found = list(iter_frames(path, sampling, decoders=decoders))
            assert [seconds for seconds, _ in found] == [seconds for seconds, _ in expected]
            np.testing.assert_array_equal([frame for _, frame in found], [frame for _, frame in expected])


@pytest.mark.parametrize("name", PARTS)
def test_parts(tmp_path, small, resorted, name):
    path = film(tmp_path / name, *PARTS[name], **{"pix_fmt": "yuvj420p"} if "JPEG" in name else {})
    parts = parts_of(plan_video(path, 1))
    assert sum(len(part.spans) for part in parts) >= 5
    check_equal(path)
    assert len(resorted) == 4  # only for the expected frames


@pytest.mark.parametrize("name", ONE_PART)
def test_one_part(tmp_path, small, resorted, name):
    path = film(tmp_path / name, *ONE_PART[name])
    (part,) = parts_of(plan_video(path, 1))
    assert part.spans == [Span(0, part.spans[0].stop)]
    check_equal(path)
    assert len(resorted) == 4


@pytest.mark.parametrize("name", IN_ORDER)
def test_in_order(tmp_path, small, name):
    path = film(tmp_path / name, *IN_ORDER[name])
    assert not parts_of(plan_video(path, 1))
    check_equal(path, fps=(1, 25))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv"])
def test_a_film_with_sound(tmp_path, small, resorted, name):
    path, files = tmp_path / name, [film(tmp_path / "mute.mp4"), write_sound(tmp_path / "sound.mp4", 6.0)]
    with contextlib.ExitStack() as stack:
        output, *inputs = (
            stack.enter_context(av.open(str(file), mode)) for file, mode in zip([path, *files], "wrr", strict=True)
        )
        copies = {source.streams[0]: output.add_stream_from_template(source.streams[0]) for source in inputs}
        packets = [packet for source in inputs for packet in source.demux() if packet.size]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            packet.stream = copies[packet.stream]
            output.mux(packet)
    assert parts_of(plan_video(path, 1))
    check_equal(path, fps=(1,))
    assert len(resorted) == 1  # only for the expected frames


def test_a_varying_rate(tmp_path, small):
    times = np.cumsum(np.random.default_rng(1).integers(1, 200, COUNT)).tolist()
    path = film(tmp_path / "a.mkv", times_ms=times)
    sampling = plan_video(path, 1)
    assert sampling.rule == "times" and parts_of(sampling)
    check_equal(path)


def test_slides_are_shown_several_times(tmp_path, small):
    path = film(tmp_path / "a.mkv", times_ms=[2500 * i for i in range(COUNT)])
    sampling = plan_video(path, 1)
    assert len(np.unique(sampling.frames)) < len(sampling) / 2 and parts_of(sampling)
    check_equal(path, fps=(1,))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("seconds", [3.0, -1.32])
def test_other_starts(tmp_path, small, name, seconds):
    """A late start, and a negative one; MP4 stores that as an edit list, which hides the frames before 0."""
    path = tmp_path / name
    with av.open(str(film(tmp_path / "whole.mp4"))) as whole, av.open(str(path), "w") as moved:
        copy = moved.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(whole.streams.video[0]):
            if packet.size:
                packet.pts += int(seconds / packet.time_base)
                packet.dts += int(seconds / packet.time_base)
                packet.stream = copy
                moved.mux(packet)
    sampling = plan_video(path, 1)
    assert parts_of(sampling)
    hidden = 33 if seconds < 0 and name == "a.mp4" else 0
    shown = [read_index(frame[:32]) for _, frame in iter_frames(path, sampling)]
    assert shown == list(range(hidden, COUNT, 25))
    check_equal(path)


@pytest.mark.parametrize("name", ["a.ts", "a.mkv"])
def test_joined_files_are_decoded_in_order(tmp_path, small, name):
    path = film(tmp_path / name)
    path.write_bytes(path.read_bytes() * 2)
    assert not parts_of(plan_video(path, 1))
    check_equal(path, fps=(1,))


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
        ("a.mkv", "libx264", {"live": "1"}),
        ("a.webm", "libvpx", {"live": "1"}),
    ],
)
def test_files_without_a_table_of_key_frames(tmp_path, small, name, codec, container):
    path = film(tmp_path / name, codec, {"g": "12"}, container=container)
    assert parts_of(plan_video(path, 1))
    check_equal(path, fps=(1, 25))


def test_rotation_and_transform(tmp_path, small):
    path = film(tmp_path / "a.mp4", rotation=(90, True, False))
    sampling = plan_video(path, 1)
    assert parts_of(sampling)
    shrink = lambda frame: frame[::2, ::2].copy()  # noqa: E731
    expected = [frame[::2, ::2] for _, frame in iter_frames(path, in_order(sampling))]
    found = [frame for _, frame in iter_frames(path, sampling, shrink, decoders=2)]
    np.testing.assert_array_equal(found, expected)


def test_an_index_that_is_wrong_costs_time_alone(tmp_path, small, resorted):
    """Each wrong index is noticed, and the frames from there on are decoded in the file's order."""
    path = film(tmp_path / "a.mp4")
    sampling = plan_video(path, 1)
    expected = [frame for _, frame in iter_frames(path, in_order(sampling))]
    index, count = sampling.timeline.index, len(resorted)
    number = int(index.numbers(sampling.timeline.pts[[75]])[0])
    swapped = index.pts.copy()
    swapped[[number, number - 1]] = swapped[[number - 1, number]]
    for wrong in (
        dataclasses.replace(index, entries=np.array([0, 25, 50, 75, 100, 125])),  # no key frames
        dataclasses.replace(index, pts=swapped),
        dataclasses.replace(index, pts=np.append(index.pts[1:], 10**9)),  # a missing packet
        dataclasses.replace(index, dts=index.dts + 10**6, pts=index.pts),  # harmless
    ):
        changed = dataclasses.replace(sampling, timeline=dataclasses.replace(sampling.timeline, index=wrong))
        for decoders in (0, 2):
            found = [frame for _, frame in iter_frames(path, changed, decoders=decoders)]
            np.testing.assert_array_equal(found, expected)
    assert len(resorted) - count == 6


def spoiled(path, number, start, value):
    """The file with all bytes of one packet after `start` set to a value."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        position, length = packets[number].pos, packets[number].size
    content = bytearray(path.read_bytes())
    content[position + start : position + length] = bytes([value]) * (length - start)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("decoders", [0, 2])
def test_damage_in_what_is_decoded_is_told_and_elsewhere_not(tmp_path, small, decoders):
    """Frames 0, 25, 50 ... of groups of twelve: frame 25 needs packet 24, a key frame, and none needs packet 36."""
    seen = spoiled(film(tmp_path / "seen.mp4"), 24, 40, 255)
    with pytest.raises(MediaError, match=r"seen\.mp4 is cut short or damaged: 0\.9 of 6\.0 seconds can be read"):
        list(iter_frames(seen, plan_video(seen, 1), decoders=decoders))
    unseen = spoiled(film(tmp_path / "unseen.mp4"), 36, 40, 255)
    assert len(list(iter_frames(unseen, plan_video(unseen, 1), decoders=decoders))) == 6
    with pytest.raises(MediaError, match=r"1\.4 of 6\.0 seconds"):
        list(iter_frames(unseen, plan_video(unseen, 25), decoders=decoders))


@pytest.mark.parametrize(("codec", "number"), [("libx264", 36), ("libx264", 41), ("libx265", 36)])
def test_a_hole_is_told_wherever_it_is(tmp_path, small, codec, number):
    """Zeros where a download never came."""
    options = {"x265-params": H265 + ":open-gop=0"} if codec == "libx265" else {}
    path = spoiled(film(tmp_path / "a.mp4", codec, options), number, 0, 0)
    sampling = plan_video(path, 1)
    assert not parts_of(sampling)
    with pytest.raises(MediaError, match="is cut short or damaged"):
        list(iter_frames(path, sampling))


def test_a_size_that_changes_is_brought_to_the_first_one(tmp_path, small, resorted):
    """The frames after the change are scaled as within one part, whichever decoder reads them first."""
    path = tmp_path / "a.webm"
    halves = frames()[:75], [np.kron(frame, np.ones((2, 2, 1), np.uint8)) for frame in frames()[75:]]
    with av.open(str(path), "w") as output:
        stream, after = None, 0
        for half in halves:
            part = write_clip(tmp_path / f"{after}.webm", half, codec="libvpx-vp9", options={"g": "12"})
            with av.open(str(part)) as source:
                stream = stream or output.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + after, packet.pts + after
                        packet.stream = stream
                        output.mux(packet)
            after = 3000
    sampling = plan_video(path, 1)
    assert len(sampling) == 6 and parts_of(sampling)
    check_equal(path, fps=(1,))
    assert len(resorted) == 3 and next(iter_frames(path, sampling))[1].shape == (64, 160, 3)


def test_a_short_video_is_decoded_whole(tmp_path):
    path = film(tmp_path / "a.mp4")
    assert not parts_of(plan_video(path, 1)) and reading.SHORT > COUNT


def test_partial_reading_ends_at_the_damage(tmp_path, small):
    path, told = spoiled(film(tmp_path / "a.mp4"), 60, 40, 255), []
    sampling = plan_video(path, 5, told.append)
    frames = [read_index(frame[:32]) for _, frame in iter_frames(path, sampling, partial=told.append)]
    assert frames == list(range(0, 60, 5)) and told == [pytest.approx(2.3)]


def test_partial_reading_of_a_cut_file(tmp_path, small):
    path, told = film(tmp_path / "a.mkv"), []
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match="cut short"):
        plan_video(path, 5)
    sampling = plan_video(path, 5, told.append)
    frames = [read_index(frame[:32]) for _, frame in iter_frames(path, sampling, partial=told.append)]
    assert frames == list(range(0, 5 * len(frames), 5)) and 8 < len(frames) < 25
    assert told[0] == pytest.approx(len(frames) / 5, abs=0.5)


def test_threads_end_with_the_loop(tmp_path, small):
    path = film(tmp_path / "a.mp4")
    before = threading.active_count()
    frames = iter_frames(path, plan_video(path, 25), decoders=3)
    next(frames)
    assert threading.active_count() > before
    frames.close()
    assert threading.active_count() == before

    def fail(frame):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(iter_frames(path, plan_video(path, 25), fail, decoders=3))
    assert threading.active_count() == before


def test_decoders_are_few_where_frames_are_large(tmp_path, small, monkeypatch):
    path, asked = film(tmp_path / "a.mp4"), []
    original = video.side_by_side
    monkeypatch.setattr(video, "side_by_side", lambda *args: asked.append(args[2]) or original(*args))
    for area, threads in ((160 * 64, 64), (3840 * 2160, 2), (16384**2, 1)):
        sampling = plan_video(path, 1)
        index = dataclasses.replace(sampling.timeline.index, area=area)
        sampling = dataclasses.replace(sampling, timeline=dataclasses.replace(sampling.timeline, index=index))
        list(iter_frames(path, sampling, decoders=64))
        assert asked.pop() == min(threads, len(parts_of(sampling)))


def test_plan(monkeypatch):
    """Groups of four; each key frame is stored before two frames that are shown before it."""
    stored = [0, 1, 2, 3, 6, 4, 5, 7, 10, 8, 9, 11]
    packets = [Packet(40 * time, 40, place % 4 == 0) for place, time in enumerate(stored)]
    timeline = timeline_of(packets, 1e-3, 25.0)
    ticks = np.array(stored) * 40
    index = Index(ticks, ticks, np.array([0, 4, 8]), can_seek=True, has_nonref=True, area=1)
    timeline = dataclasses.replace(timeline, index=index)
    assert index.numbers(np.array([160, 240, 7])).tolist() == [5, 4, -1]

    def spans(*places):
        return [list(map(tuple, part.spans)) for part in plan_reading(timeline, np.array(places))]

    assert spans(1, 2, 11) == []  # short
    monkeypatch.setattr(reading, "SHORT", 0)
    assert spans(1, 2, 11) == [[(0, 3), (8, 12)]]
    assert spans(5) == [[(0, 7)]]  # needs frames stored before its group
    assert spans(5, 6, 9) == [[(0, 7), (4, 11)]]
