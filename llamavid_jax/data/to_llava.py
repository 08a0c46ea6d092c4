"""Data sets in other formats -> LLaVA-format records, in a .json list or a .jsonl by the name of the output.

    python -m llamavid_jax.data.to_llava webvid        results.csv    out.json [--media DIR]
    python -m llamavid_jax.data.to_llava video_chatgpt instruct.json  out.json  --media DIR
    python -m llamavid_jax.data.to_llava split_chat    in.json        out.json  --rounds 12

`webvid`: columns videoid, name (the caption) and page_dir -> one caption record a video, PAGE_DIR/VIDEOID.mp4.
`video_chatgpt`: a list of {q, a, video_id}, or the training file of Video-ChatGPT's own converter, a list of {id,
video: NAME.pkl, conversations} with `<video>` -> one record each; the video file is found by its stem.
`split_chat`: conversations of more than N rounds are cut into records of N rounds.  Every human turn repeats the visual
tokens of the image: 12 rounds of 257 and 6 of 577 just fit 4,096, the original's `maxround_12` and `maxround_6`.
Text alone, ready features, and videos with subtitles or times are never split: a movie is in its record only once.

With `--media`, only records whose file exists are written.  Skipped rows are counted and reported; an empty result is
an error.  The original: convert_webvid_to_llava.py, convert_video_chatgpt_to_llava.py, split_chat.py (whose main does
nothing).
"""

import collections
import csv
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamavid_jax import buckets, uploads
from llamavid_jax.data.record import DataError
from llamavid_jax.data.records import PICKLES, JsonRows
from llamavid_jax.errors import Parser, command
from llamavid_jax.files import find, local
from llamavid_jax.media import features
from llamavid_jax.media.source import VIDEO_ENDINGS
from llamavid_jax.text.conversation import IMAGE

REQUESTS = (
    "Describe this video in one sentence.",
    "What does the video show?",
    "Give a short caption for the video.",
    "Say briefly what happens in this clip.",
    "Sum up the content of the video in a few words.",
    "What can be seen in this clip?",
)
Skipped = collections.Counter[str]


def webvid(rows: Iterable[Mapping[str, str]], found: Mapping[str, str] | None, skipped: Skipped) -> Iterator[dict]:
    """CSV rows -> records.  `found`: stem -> path of the existing files; None for the data set's own paths."""
    for row in rows:
        name, caption = (row.get("videoid") or "").strip(), (row.get("name") or "").strip()
        if not name or not caption:
            skipped["without videoid or name"] += 1
            continue
        path = "/".join(part for part in ((row.get("page_dir") or "").strip(), name + ".mp4") if part)
        if found is not None:
            if name not in found:
                skipped["without a file"] += 1
                continue
            path = found[name]
        request = REQUESTS[zlib.crc32(name.encode()) % len(REQUESTS)]
        # the request comes before the video, as in the original: it is what the Q-Former reads
        yield {"id": name, "video": path, "conversations": _round(f"{request}\n{IMAGE}", caption)}


def video_chatgpt(rows: Iterable[Any], found: Mapping[str, str], skipped: Skipped) -> Iterator[dict]:
    """Questions and answers, or conversations -> records; ids are VIDEO_N, where N counts all rows."""
    for number, row in enumerate(rows):
        row = row if isinstance(row, Mapping) else {}
        keys = ("video",) if "conversations" in row else ("q", "a", "video_id")
        values = [row.get(key) for key in keys]
        turns = _talk(row["conversations"]) if "conversations" in row else None
        if not all(isinstance(value, str) and value.strip() for value in values) or turns == []:
            skipped["without q, a and video_id, or video and conversations"] += 1
            continue
        video = values[-1] if turns is None else os.path.splitext(os.path.basename(values[-1]))[0]
        if video not in found:
            skipped["without a file"] += 1
            continue
        turns = turns or _round(f"{IMAGE}\n{values[0]}", values[1])
        yield {"id": f"{video}_{number}", "video": found[video], "conversations": turns}


def _talk(turns: Any) -> list[dict[str, str]]:
    """The turns with `<image>` for `<video>`, added to the first if none has it; [] if they are not a conversation."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("value"), str) for turn in turns
    ):
        return []
    talk = [{**turn, "value": turn["value"].replace("<video>", IMAGE)} for turn in turns]
    if talk and not any(IMAGE in turn["value"] for turn in talk):
        talk[0]["value"] = f"{IMAGE}\n{talk[0]['value']}"
    return talk


def split_chat(rows: Iterable[Any], rounds: int, skipped: Skipped) -> Iterator[dict]:
    """Records -> records of at most `rounds` rounds, with `<image>` in the first turn of each and unique ids."""
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            skipped["that are no objects"] += 1
            continue
        turns = _whole_rounds(row)
        pieces = [turns[at : at + 2 * rounds] for at in range(0, len(turns), 2 * rounds)]
        name = str(number if row.get("id") is None else row["id"])
        if len(pieces) < 2:
            yield {**row, "id": _unique(name, seen)}
            continue
        shown = False  # whether an earlier piece had the visual
        for index, piece in enumerate(pieces):
            first = piece[0]
            if shown and IMAGE not in first["value"]:
                first = {**first, "value": f"{IMAGE}\n{first['value']}"}
            shown = shown or any(IMAGE in turn["value"] for turn in piece)
            kept = row if shown else {key: row[key] for key in row if key not in ("image", "video")}  # text so far
            yield {**kept, "id": _unique(f"{name}_{index}", seen), "conversations": [first, *piece[1:]]}


def _whole_rounds(row: Mapping[str, Any]) -> list[Any]:
    """The turns of a record that can be split: human, gpt, human, gpt, ...; [] if it must not be split."""
    media = row.get("image") or row.get("video")
    turns = row.get("conversations")
    if not isinstance(media, str) or media.lower().endswith((*features.SUFFIXES, *PICKLES)):
        return []
    if row.get("subtitles") or row.get("times"):
        return []
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("value"), str) for turn in turns
    ):
        return []
    turns = turns[1:] if turns and turns[0].get("from") != "human" else turns  # as in training
    turns = turns[: len(turns) // 2 * 2]  # a question without an answer trains nothing
    alternate = [turn.get("from") for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    return turns if alternate else []


def _unique(name: str, seen: set[str]) -> str:
    while name in seen:
        name += "_"
    seen.add(name)
    return name


def _round(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def find_videos(folder: str | Path) -> dict[str, str]:
    """Stem -> path relative to `folder` of all videos in it; of several, the first by VIDEO_ENDINGS and name."""
    folder = local(folder)
    if buckets.kind(folder) != "directory":
        raise DataError(f"{folder} is not a folder; give --media the folder of the videos")
    paths = buckets.files_below(folder)
    videos = {}
    for suffix in VIDEO_ENDINGS:
        for path in sorted(path for path in paths if path.lower().endswith(suffix)):
            videos.setdefault(os.path.basename(path)[: -len(suffix)], path)
    return videos


def read_csv(path: str | Path) -> Iterator[dict[str, str]]:
    """Rows by column name.  Raises DataError for a file without the columns videoid and name."""
    try:
        with find(path).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"videoid", "name"} <= set(rows.fieldnames or ()):
                raise DataError(f"{path} has the columns {rows.fieldnames}; videoid and name are needed")
            yield from rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV ({error}); download it again") from None


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]], skipped: Skipped) -> int:
    """Writes a .jsonl or a .json list aside, then renames it; returns the count.  Raises DataError, also for 0."""
    path, count = local(path), 0
    lines = path.suffix == ".jsonl"
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path} is to be written, but ends in neither .json nor .jsonl; name it so")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            aside = Path(folder) / path.name
            with aside.open("w", encoding="utf-8") as file:
                file.write("" if lines else "[")
                for record in records:
                    file.write(("" if count == 0 else "\n" if lines else ",\n") + json.dumps(record))
                    count += 1
                file.write("\n" if lines else "]\n")
            if not count:
                raise DataError(f"{path} would hold no record: {_left_out(skipped) or 'the source is empty'}")
            os.replace(aside, path)
            uploads.send(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); give another place") from None
    return count


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="llamavid_jax.data.to_llava", description="Convert data sets to LLaVA format.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("webvid", "WebVid's CSV -> caption records"),
        ("video_chatgpt", "Video-ChatGPT's questions and answers -> records"),
        ("split_chat", "cut long conversations by rounds"),
    ):
        command = commands.add_parser(name, help=help_text, allow_abbrev=False)
        command.add_argument("source")
        command.add_argument("output", help=".json or .jsonl")
        if name == "split_chat":
            command.add_argument("--rounds", type=int, required=True, metavar="N", help="most rounds of a record")
        else:
            command.add_argument(
                "--media", required=name == "video_chatgpt", metavar="DIR", help="folder of the videos"
            )
    skipped: Skipped = collections.Counter()
    options = parser.parse_args(arguments)
    if options.command == "split_chat":
        if options.rounds < 1:
            raise DataError(f"--rounds is {options.rounds}; give 1 or more")
        records = split_chat(JsonRows(options.source), options.rounds, skipped)
    else:
        found = None if options.media is None else find_videos(options.media)
        if options.command == "webvid":
            records = webvid(read_csv(options.source), found, skipped)
        else:
            records = video_chatgpt(JsonRows(options.source), found, skipped)
    count = write_records(options.output, records, skipped)
    print(f"{options.output}: {count:,} records")
    if skipped:
        print(f"left out: {_left_out(skipped)}")
    return 0


def _left_out(skipped: Skipped) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in skipped.items())


if __name__ == "__main__":
    sys.exit(main())
