"""The sets that can be evaluated: how each is read, asked and scored."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamavid_jax.evaluation import (
    gqa,
    long_video,
    mmbench,
    scienceqa,
    seed,
    video_chatgpt,
    video_qa,
    vqa,
    yes_no,
)
from llamavid_jax.evaluation.items import Item, Row, Scores


@dataclasses.dataclass(frozen=True)
class Set:
    """One evaluation set.

    `read(folder, original)` returns Items, and Rows of further questions that are not asked but known to scoring.
    `score(rows, original)` returns Scores; if it `is_judged`, a judge is its third argument.  `max_new_tokens` and the
    `original_` fields are those of the original's scripts.
    """

    title: str
    read: Callable[[Path, bool], tuple[list[Item], list[Row]]]
    score: Callable[..., Scores]
    max_new_tokens: int = 128
    is_judged: bool = False
    original_samples: bool = (
        False  # as its video scripts: temperature 0.2, and the checkpoint's defaults for top-p and top-k
    )
    original_crops: bool = False  # images are cropped instead of padded to a square


_VIDEO: dict[str, Any] = {"max_new_tokens": 1024, "is_judged": True, "original_samples": True}
_LETTER: dict[str, Any] = {"max_new_tokens": 32}

SETS = {
    "gqa": Set("GQA", gqa.read, gqa.score),
    "vqav2": Set("VQAv2", vqa.read_vqav2, vqa.score_vqav2),
    "vizwiz": Set("VizWiz", vqa.read_vizwiz, vqa.score_vizwiz),
    "textvqa": Set("TextVQA", vqa.read_textvqa, vqa.score_textvqa),
    "pope": Set("POPE", yes_no.read_pope, yes_no.score_pope),
    "mme": Set("MME", yes_no.read_mme, yes_no.score_mme),
    "seed": Set("SEED-Bench", seed.read, seed.score),
    "scienceqa": Set("ScienceQA-IMG", scienceqa.read, scienceqa.score, max_new_tokens=1024, original_crops=True),
    "mmbench": Set("MMBench", mmbench.read, mmbench.score, 1024),
    "mmbench_cn": Set("MMBench-CN", functools.partial(mmbench.read, language="cn"), mmbench.score, 1024),
    "mmbench_rounds": Set(
        "MMBench, all rounds of the options", functools.partial(mmbench.read, rounds=True), mmbench.score, 1024
    ),
    "msvd": Set("MSVD-QA", video_qa.read_qa, video_qa.score, **_VIDEO),
    "msrvtt": Set("MSRVTT-QA", video_qa.read_qa, video_qa.score, **_VIDEO),
    "activitynet_qa": Set(
        "ActivityNet-QA",
        video_qa.read_activitynet,
        functools.partial(video_qa.score, is_activitynet=True),
        **_VIDEO,
    ),
    "video_chatgpt": Set("Video-ChatGPT", video_chatgpt.read, video_chatgpt.score, **_VIDEO),
    "mlvu": Set("MLVU", long_video.read_mlvu, functools.partial(long_video.score, average_of="task"), **_LETTER),
    "video_mme": Set("Video-MME", long_video.read_video_mme, long_video.score, **_LETTER),
    "video_mme_subtitles": Set(
        "Video-MME with subtitles",
        functools.partial(long_video.read_video_mme, subtitles=True),
        long_video.score,
        **_LETTER,
    ),
    "longvideobench": Set("LongVideoBench", long_video.read_longvideobench, long_video.score, **_LETTER),
    "longvideobench_subtitles": Set(
        "LongVideoBench with subtitles",
        functools.partial(long_video.read_longvideobench, subtitles=True),
        long_video.score,
        **_LETTER,
    ),
}
