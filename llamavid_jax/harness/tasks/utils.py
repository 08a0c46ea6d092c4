"""What the task files beside this one call: the set's questions as `llamavid-evaluate` asks and judges them.

The judge is the model MODEL_VERSION at OPENAI_API_URL with OPENAI_API_KEY, as for lmms-eval's own judged tasks; without
an address the offline one, whose figures are not the paper's.
"""

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.evaluation.answers import clean
from llamavid_jax.evaluation.judge import MODEL, ModelJudge, OfflineJudge
from llamavid_jax.evaluation.video_qa import case, numbered_video


def visual(doc: dict[str, Any]) -> list[str]:
    return [str(numbered_video(Path("video"), doc["video_id"]))]


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return doc["question"]


def results(doc: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Not numbers where the judge failed, which are counted nowhere."""
    row = {"text": clean(answers[0]), "reference": {"question": doc["question"], "answer": doc["answer"]}}
    (verdict,) = judge().verdicts([case(row, original=False, is_activitynet=False)])
    if verdict is None or verdict.yes is None:
        return {"accuracy": math.nan, "score": math.nan}
    return {"accuracy": 100.0 * verdict.yes, "score": float(verdict.score)}


def mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


@functools.cache
def judge() -> ModelJudge | OfflineJudge:
    address = os.environ.get("OPENAI_API_URL", "").removesuffix("/chat/completions")
    if not address:
        return OfflineJudge()
    return ModelJudge(address, os.environ.get("OPENAI_API_KEY", ""), os.environ.get("MODEL_VERSION", MODEL))
