"""The frames that an answer rests on, as an image: `draw(session, question, answer).save("evidence.png")`."""

from pathlib import Path

import numpy as np
from PIL import Image

from llamavid_jax.errors import InputError
from llamavid_jax.inference.draw import draw_evidence
from llamavid_jax.inference.session import Answer, Session
from llamavid_jax.media.images import normalize

STRONGEST = 8  # frames that are shown


def draw(session: Session, question: str, answer: Answer) -> Image.Image:
    """Draws the frames with the most weight, where the question's context token looked in each, and a curve of all.

    Only these frames are read again.  Raises InputError for a conversation about anything but one video file.
    """
    visuals = session.visuals
    if len(visuals.videos) != 1 or visuals.images or not isinstance(visuals.videos[0], str | Path):
        raise InputError("evidence is drawn of one video file; give one --video and no --image")
    seconds, weights = zip(*((frame["second"], frame["weight"]) for frame in answer.evidence), strict=True)
    strongest = np.argsort(weights)[-STRONGEST:]
    places = [place for place in sorted(strongest.tolist()) if weights[place] > max(weights) / 10]
    processor = visuals.image_processor
    partial = (lambda _: None) if visuals.reading.partial else None  # the session has reported it
    frames = processor.video_frames(visuals.videos[0], [seconds[place] for place in places], partial)
    pixels = normalize(frames, processor.image_mean, processor.image_std)
    attention = session.model.context_attention(pixels, question)
    return draw_evidence(f"{question}  {answer.text}", seconds, weights, frames, attention, places)
