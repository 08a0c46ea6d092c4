"""Sampling plans from packet times alone; clips of every kind are in test_video.py."""

import dataclasses

import numpy as np
import pytest

from llamavid_jax.media.index import Index
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.timeline import (
    Packet,
    count_samples,
    frame_stride,
    nearest_keys,
    sample,
    sample_at_most,
    timeline_of,
)

MS = 1e-3


def packets(times, duration=0, keys=(0,)):
    return [Packet(int(time), duration, place in keys) for place, time in enumerate(times)]


def even(count, fps, start=0):
    return [round(1000 * i / fps) + start for i in range(count)]


@pytest.mark.parametrize("own", [23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 59.94, 2.5])
@pytest.mark.parametrize("error", [0, 0.001, -0.001])
@pytest.mark.parametrize("count", [1, 2, 3, 500, 20_000])
def test_a_rate_that_is_kept_up_to_rounding_gives_the_originals_stride(own, error, count):
    plan = sample(timeline_of(packets(even(count, own)), MS, own * (1 + error)), 1)
    assert plan.rule == "stride"
    assert plan.frames.tolist() == list(range(0, count, round(own * (1 + error))))


@pytest.mark.parametrize("declared", [0.0, 1.0, 12.5, 24.0, 26.0, 50.0, 90_000.0])
def test_another_rate_than_the_declared_one_is_sampled_by_the_times(declared):
    plan = sample(timeline_of(packets(even(250, 25)), MS, declared), 1)
    assert plan.rule == "times" and plan.frames.tolist() == list(range(0, 250, 25))


def test_half_a_frame_of_jitter_is_no_varying_rate():
    jitter = np.random.default_rng(0).integers(-9, 10, 1000)
    assert sample(timeline_of(packets(even(1000, 25) + jitter + 10), MS, 25.0), 1).rule == "stride"
    pause = [*even(500, 25), *even(500, 25, start=500 * 40 + 400)]
    plan = sample(timeline_of(packets(pause), MS, 25.0), 1)
    assert plan.rule == "times" and plan.frames[-2:].tolist() == [965, 990]


@pytest.mark.parametrize("fps", [0.1, 1, 3, 7.5, 100])
def test_the_frame_at_each_time_is_the_last_one_that_began_before(fps):
    times = np.cumsum(np.random.default_rng(1).integers(1, 700, 200))
    plan = sample(timeline_of(packets(times), MS, 25.0), fps)
    own = (times - times[0]) / 1000
    for frame, time in zip(plan.frames, plan.times, strict=True):
        assert own[frame] < time + 1.1e-3 and (frame == 199 or own[frame + 1] > time + 0.9e-3)
    np.testing.assert_allclose(plan.times, np.arange(len(plan)) / fps)
    assert own[-1] - plan.times[-1] < 1 / fps


def test_uneven_slides_have_no_rate():
    plan = sample(timeline_of([Packet(time, 2500, True) for time in (0, 3000, 5000, 7500)], MS, 0.4), 1)
    assert plan.rule == "times" and plan.frames.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


def test_the_order_in_the_file_and_where_its_times_start_do_not_matter():
    stored = [0, 160, 80, 40, 120, 320, 240, 200, 280]
    for times in (stored, [time + 10**9 for time in stored]):
        timeline = timeline_of(packets(times), MS, 25.0)
        np.testing.assert_allclose(timeline.times, np.arange(9) / 25)
        assert timeline.average_fps == 25 and timeline.seconds == pytest.approx(0.36)


def test_what_cannot_be_decoded_is_not_the_first_frame():
    """A broadcast that starts between two key frames, and frames that refer to some before the first key frame."""
    timeline = timeline_of(packets([0, 40, 80, 240, 160, 200, 280], keys=(3,)), MS, 25.0, is_broadcast=True)
    assert timeline.pts.tolist() == [240, 280]


def test_times_that_begin_again_go_on():
    times = [*even(50, 25), *even(50, 25), *even(50, 25, start=400)]
    timeline = timeline_of(packets(times, keys=(0, 50, 100)), MS, 25.0)
    assert sample(timeline, 1).rule == "stride" and timeline.seconds == pytest.approx(6)
    np.testing.assert_allclose(timeline.times, np.arange(150) / 25)


def test_another_clock_is_no_pause_in_a_broadcast_alone():
    times = [*even(50, 25), *even(50, 25, start=10**8)]
    assert timeline_of(packets(times), MS, 25.0, is_broadcast=True).seconds == pytest.approx(4)
    assert timeline_of(packets(times), MS, 25.0).seconds == pytest.approx(10**5 + 2)


@pytest.mark.parametrize(
    ("last", "seconds"),
    [
        ((3000, 3000, 3000, 1000), 10),
        ((40, 40, 40, 40), 12),  # by the header's rate: as long as the others
        ((3000, 3000, 3000, 10**9), 19),  # ten seconds at most
    ],
)
def test_the_last_frame_is_shown_as_long_as_its_packet_says_if_the_others_tell_the_truth(last, seconds):
    slides = [Packet(3000 * i, duration, True) for i, duration in enumerate(last)]
    assert timeline_of(slides, MS, 25.0).seconds == pytest.approx(seconds)


def test_a_stream_without_times_keeps_its_rate():
    plan = sample(timeline_of([Packet(None, 40, True)] * 60, MS, 25.0), 1)
    assert plan.rule == "stride" and plan.frames.tolist() == [0, 25, 50]


@pytest.mark.parametrize("times", [even(250, 25), [0, 40, 5000], [0]])
@pytest.mark.parametrize("fps", [0.3, 1, 5, 25])
def test_the_numbers_of_a_timeline_are_enough_to_count(times, fps):
    timeline = timeline_of(packets(times), MS, 25.0)
    assert count_samples(len(times), timeline.average_fps, timeline.seconds, fps) == len(sample(timeline, fps))


def test_a_plan_for_some_of_its_samples():
    plan = sample(timeline_of(packets([0, 40, 5000]), MS, 25.0), 1).only([0, 2, 5])
    assert plan.frames.tolist() == [0, 1, 2] and plan.times.tolist() == [0, 2, 5]


def test_damaged_times_do_not_ask_for_all_memory():
    with pytest.raises(MediaError, match=r"a\.mkv lasts 4503599627\d+ seconds.*; use a lower fps"):
        sample(timeline_of(packets([0, 40, 80, 2**52]), MS, 25.0), 1, "a.mkv")


def test_too_low_a_rate_is_refused():
    with pytest.raises(
        MediaError, match=r"use fps 0\.4 or, where it is fixed, write the video with more: ffmpeg -i IN -r 1 OUT$"
    ):
        frame_stride(0.4, 1)


@pytest.mark.parametrize("times", [even(1000, 25), even(1000, 29.97), np.cumsum(np.arange(1, 1000) % 70)])
@pytest.mark.parametrize("most", [1, 2, 7, 39, 40, 41, 999, 5000])
def test_the_highest_rate_that_fits(times, most):
    timeline = timeline_of(packets(times), MS, 25.0)
    for fps in (1, 25):
        plan, rate = sample_at_most(timeline, fps, most)
        assert len(plan) <= most and rate <= fps
        assert (rate == fps) == (len(sample(timeline, fps)) <= most)
        np.testing.assert_array_equal(sample(timeline, rate).frames, plan.frames)
        if rate < fps:
            steps = -(-len(timeline.times) // len(plan))
            assert len(plan) > most - max(2, most / steps)  # no fewer frames than necessary


def test_the_key_frame_nearest_to_each_time():
    timeline = timeline_of(packets(even(100, 10)), MS, 10.0)
    assert nearest_keys(sample(timeline, 1)) is None
    keys = np.array([0, 12, 35, 38, 90])
    index = Index(timeline.pts, timeline.pts, keys, can_seek=True, has_nonref=True, area=1)
    timeline = dataclasses.replace(timeline, index=index)
    plan = nearest_keys(sample(timeline, 1))
    assert plan.rule == "key frames" and plan.frames.tolist() == [0, 12, 12, 35, 38, 38, 38, 90, 90, 90]
    np.testing.assert_allclose(plan.times, plan.frames / 10)
    hidden = dataclasses.replace(timeline, pts=timeline.pts[20:], times=timeline.times[20:] - 2)  # by an edit list
    assert nearest_keys(sample(hidden, 1)).frames.tolist() == [15, 15, 18, 18, 18, 70, 70, 70]
    sequential = dataclasses.replace(timeline, index=dataclasses.replace(index, can_seek=False))
    assert nearest_keys(sample(sequential, 1)) is None
