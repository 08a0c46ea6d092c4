"""LLaVA-format JSON or JSONL and its media folder -> ArrayRecord shards, which one sequential copy moves anywhere.

    python -m llamavid_jax.data.build_shards train.json shards/train --media media/

A sample is one record: id, kind, conversations, the media file's own bytes (JPEG, PNG, MP4, features; nothing is
decoded or encoded), its name, and the number of frames and the frame rate from its header (`shards.py` reads them).

1. The survey reads the header of every media file and writes a plan, a JSONL file, for each shard.
   Samples that are missing or unreadable are left out, never replaced, and named in the manifest; too many stop the
   build.  (What only decoding shows, such as a truncated image, the loader finds and skips.)
2. A tensorflow-datasets builder (`shard_builder.py`) writes the shards from the plans, in their order; with `--beam`,
   in parallel, by workers that see the media and OUT under the same paths.
3. `manifest.json` is written and the whole folder renamed: readers find a complete folder or none.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llamavid_jax import buckets
from llamavid_jax.copies import fetch
from llamavid_jax.data.beam import add_beam, beam_options
from llamavid_jax.data.examples import file_header
from llamavid_jax.data.record import Record, as_utf8
from llamavid_jax.data.records import media_file, read_records
from llamavid_jax.data.shards import FORMAT_VERSION, MANIFEST, MediaHeader, read_manifest
from llamavid_jax.errors import InputError, Parser, command, printable
from llamavid_jax.files import find, local
from llamavid_jax.media.images import check_picture
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.video import read_timeline
from llamavid_jax.text.subtitles import subtitle_text
from llamavid_jax.uploads import discard_unfinished, send_folder

SHARD_BYTES = 256 * 2**20  # a shard is in memory while it is written
MAX_SAMPLE_BYTES = 2**31 - 2**24  # a protocol buffer holds at most 2 GiB
SURVEY_THREADS = 8


def build(
    source: str | Path,
    out: str | Path,
    media: str | Path = "",
    max_broken: float = 0.01,
    beam: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the folder `out` and returns its manifest; if that folder is already complete, only returns it.

    `max_broken` is the fraction of samples that may be left out; `beam` holds the options of a Beam pipeline, None for
    no Beam.  Raises InputError, and then leaves no folder.
    """
    from llamavid_jax.data.shard_builder import write_shards  # takes half a second, and the extra `train`

    source, out = find(source), local(out).absolute()
    media = local(media) if media else source.parent
    discard_unfinished(out)
    fetch(out)
    if source.is_dir():
        raise InputError(f"{source} is a folder; give a .json or .jsonl file")
    options, records, sha256 = beam_options(beam), read_records(source, media), file_sha256(source)
    home = buckets.url(media) or os.path.realpath(media)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise InputError(f"{out} exists already and holds no complete shards; give another folder")
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        made_of = manifest["source"]
        if made_of.get("sha256") != sha256:
            raise InputError(f"{out} holds the shards of another {made_of['name']}; give another folder")
        if made_of.get("media") != home:
            raise InputError(
                f"{out} holds shards of the media in {made_of.get('media')}, not {home}; give another folder"
            )
        return manifest
    try:
        with working_folder(out) as folder:
            counts = survey(records, media, folder, max_broken, shard_bytes)
            written = write_shards(sorted(folder.glob("*.plan")), folder, options)
            manifest = {
                "format_version": FORMAT_VERSION,
                "source": {"name": source.name, "sha256": sha256, "media": home},
                **counts,
                "files": {file.name: file.stat().st_size for file in sorted(written.iterdir())},
            }
            (written / MANIFEST).write_text(json.dumps(manifest, indent=1))
            written.rename(out)
            send_folder(out, last=MANIFEST)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}); it was not made: run the same again") from None
    return manifest


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """The folder OUT.incomplete, locked against a second build and removed afterwards.

    What a killed build left in it is deleted first.
    """
    folder = out.with_name(out.name + ".incomplete")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is being written by another build; wait for it, or give another OUT") from None
        try:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def survey(records: Sequence, media: Path, folder: Path, max_broken: float, shard_bytes: int) -> dict[str, Any]:
    """Reads all media headers, writes `folder`/00000.plan, ...; returns the manifest's counts and skipped samples."""
    kinds: dict[str, Counter] = {}
    skipped, plans, filled = [], 0, 0
    with contextlib.ExitStack() as file, ThreadPoolExecutor(SURVEY_THREADS) as threads:
        for start in range(0, len(records), 1024):  # a million futures at once would be gigabytes
            block = range(start, min(start + 1024, len(records)))
            for sample in threads.map(lambda index: look_up(records, index, media), block):
                if "reason" in sample:
                    skipped.append(sample)
                    continue
                line = json.dumps(sample).encode() + b"\n"
                if not plans or filled + sample["bytes"] + len(line) > shard_bytes:
                    file.close()
                    plan = file.enter_context((folder / f"{plans:05d}.plan").open("wb"))
                    plans, filled = plans + 1, 0
                plan.write(line)
                filled += sample["bytes"] + len(line)
                counts = {"samples": 1, "frames": sample["example"]["frames"], "bytes": sample["bytes"]}
                kinds.setdefault(sample["example"]["kind"], Counter()).update(counts)
            if len(skipped) > max_broken * len(records):
                first = "; ".join(sample["reason"] for sample in skipped[:3])
                raise InputError(
                    f"{len(skipped)} of the first {block.stop} samples cannot be used, more than --max-broken "
                    f"{max_broken:g} of all {len(records)}; repair or remove them, or raise it.  The first: {first}"
                )
    if not plans:
        raise InputError("no sample can be used; give a JSON with at least one that can")
    totals = sum(kinds.values(), Counter())
    return {key: totals[key] for key in ("samples", "frames", "bytes")} | {"kinds": kinds, "skipped": skipped}


def look_up(records: Sequence, index: int, media: Path) -> dict[str, Any]:
    """One sample's line of a plan; for a sample that cannot be used, its index, id and reason."""
    name = ""
    try:
        record = records[index]
        name = record.id
        example = {"id": name, "kind": record.kind, "conversations": json.dumps(record.conversations), "media": ""}
        example["times"] = record.times or ""
        if record.kind == "text":
            return {"path": "", "bytes": 0, "example": example | _example_header(MediaHeader(0))}
        with media_file(record) as path:
            size = path.stat().st_size
            if size > MAX_SAMPLE_BYTES:
                raise MediaError(f"{path} has {size} bytes, a record holds {MAX_SAMPLE_BYTES}; cut or compress it")
            example["media"] = as_utf8(os.path.relpath(record.media, media))
            header = read_header(record, path)
            if record.subtitles is not None:
                header = header._replace(inputs=subtitle_text(record.subtitles))
            return {"path": str(path), "bytes": size, "example": example | _example_header(header)}
    except InputError as error:
        return {"index": index, "id": name, "reason": str(error)}


def _example_header(header: MediaHeader) -> dict[str, Any]:
    fields = header._asdict()
    del fields["times"]  # of frames that are sampled later
    return fields | {"inputs": json.dumps(header.inputs)}


def read_header(record: Record, path: Path) -> MediaHeader:
    """The header of the media file at `path`, read without decoding.  Raises MediaError."""
    if record.kind == "features":
        return file_header(path)
    if record.kind == "video":
        timeline = read_timeline(path)
        return MediaHeader(
            len(timeline.times), timeline.average_fps, seconds=0.0 if timeline.average_fps else timeline.seconds
        )
    check_picture(path)
    return MediaHeader(1)


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="build_shards", description=__doc__)
    parser.add_argument("source", metavar="JSON", help="samples in LLaVA's format, .json or .jsonl")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--media", default="", metavar="DIR", help="folder of the media (the JSON's own)")
    parser.add_argument("--max-broken", type=float, default=0.01, help="fraction that may be left out (0.01)")
    add_beam(parser, "write")
    options = parser.parse_args(arguments)
    state = "was complete already" if (find(options.out) / MANIFEST).is_file() else "is complete"
    manifest = build(options.source, options.out, options.media, options.max_broken, options.beam)
    kinds = ", ".join(f"{counts['samples']} {kind}" for kind, counts in sorted(manifest["kinds"].items()))
    print(f"{options.out} {state}: {manifest['samples']} samples ({kinds}), {len(manifest['skipped'])} skipped")
    for sample in manifest["skipped"][:10]:
        print(printable(f"  skipped {sample['id'] or sample['index']}: {sample['reason']}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
