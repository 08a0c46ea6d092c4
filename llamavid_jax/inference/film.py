"""How a session reads a video: the requested frames, fewer, nearby key frames, or the readable part of a file."""

import dataclasses
from collections.abc import Callable

import numpy as np

from llamavid_jax.media.timeline import Sampling, nearest_keys, sample_at_most

Notice = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What may be given up; each loss is reported.

    fast     the key frame nearest to each requested frame is taken instead
    partial  a damaged file is read as far as possible
    fit      a video that is too long for the model is sampled at a lower rate
    """

    fast: bool = False
    partial: bool = False
    fit: bool = False

    def plan(self, sampling: Sampling, fps: float | int, most: int, video: object, notice: Notice) -> Sampling:
        """The sampling that is read in place of `sampling` at `fps`; `most` frames fit the model."""
        if self.fit:
            asked = len(sampling)
            sampling, rate = sample_at_most(sampling.timeline, fps, most, video)
            if len(sampling) < asked:
                notice(f"{video} is sampled at {rate:.3g} frames a second, not {fps:g}: {len(sampling)} frames fit")
        return self._fast(sampling, video, notice) if self.fast else sampling

    def _fast(self, sampling: Sampling, video: object, notice: Notice) -> Sampling:
        keys = nearest_keys(sampling)
        if keys is None:
            notice(f"{video} does not say where its key frames are: the frames asked for are decoded")
            return sampling
        off = np.abs(keys.times - sampling.times)
        kept, shared = np.unique(keys.frames, return_counts=True)
        notice(
            f"{video}: key frames in place of the {len(sampling)} asked for, {off.mean():.1f} s away on average and "
            f"{off.max():.1f} s at most; {len(kept)} different ones, each for up to {shared.max()} of them"
        )
        return keys

    def damage(self, video: object, notice: Notice) -> Callable[[float], None] | None:
        """A function that reports the readable seconds of a damaged file; None if such a file is refused."""
        if not self.partial:
            return None
        return lambda seconds: notice(f"{video} is cut short or damaged: only its first {seconds:.1f} seconds are read")
