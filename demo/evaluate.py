"""Held-out accuracy of a trained demo model: the share of exact answers for every type of question.

    python -m demo.evaluate MODEL DATA_JSON [--limit N] [--batch N] [--json OUT]

Every question of every record is asked alone, greedily, in the template `vicuna_v1`; the record's `types` are theirs.
"""

import collections
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.commands.program import keep_programs
from llamavid_jax.data.records import JsonRows
from llamavid_jax.errors import InputError, Parser, command
from llamavid_jax.files import write_files
from llamavid_jax.inference.session import Session
from llamavid_jax.text.conversation import IMAGE

MAX_NEW_TOKENS = 8


def questions_of(record: dict) -> Iterator[tuple[str, str, str]]:
    """(type, question, answer) of every round of a record."""
    turns = [turn["value"].replace(IMAGE, "").strip() for turn in record["conversations"]]
    return zip(record["types"], turns[::2], turns[1::2], strict=True)


def answers(
    model, processor, records: list[dict], media: Path, batch: int
) -> Iterator[tuple[dict, str, str, str, str]]:
    """(record, type, question, truth, answer) of every question; the frames of a record are encoded once."""
    for start in range(0, len(records), batch):
        asked, rows = [], []
        for record in records[start : start + batch]:
            shown = {f"{kind}s": [media / record[kind]] for kind in ("image", "video") if kind in record}
            session = Session(model, processor.image_processor, **shown)
            for kind, question, truth in questions_of(record):
                asked.append((record, kind, question, truth))
                rows.append(session.inputs(question))
        ids, tokens = zip(*rows, strict=True)
        output = model.generate(ids, visual_tokens=tokens, max_new_tokens=MAX_NEW_TOKENS)
        for question, text in zip(asked, output.texts, strict=True):
            yield *question, text.strip()


@command()
def main(arguments: list[str] | None = None) -> int:
    """Prints accuracy by type; `--json` writes it to a file, with every wrong answer."""
    parser = Parser(prog="evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="checkpoint folder, such as runs/demo/stage3/model")
    parser.add_argument("data", type=Path, help="a *_test.json of demo/make_data.py")
    parser.add_argument("--limit", type=int, default=None, help="number of records; all by default")
    parser.add_argument("--batch", type=int, default=8, help="records answered together")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    keep_programs()
    records = list(JsonRows(options.data))[: options.limit]
    if not all("types" in record for record in records):
        raise InputError(f"{options.data} does not say of what type questions are; give a *_test.json of make_data")
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(options.model, dtype="float32")
    processor = LLaMAVIDLlavaProcessor.from_pretrained(options.model)
    right, wrong = collections.defaultdict(list), []
    for record, kind, question, truth, answer in answers(model, processor, records, options.data.parent, options.batch):
        right[kind].append(answer == truth)
        if answer != truth:
            wrong.append({"id": record["id"], "question": question, "truth": truth, "answer": answer})
    right["all"] = [value for values in right.values() for value in values]
    table = {kind: {"exact": sum(values) / len(values), "questions": len(values)} for kind, values in right.items()}
    for kind, row in table.items():
        print(f"{kind:8} {row['exact']:7.1%} of {row['questions']}")
    if options.json:
        written = json.dumps({"accuracy": table, "wrong": wrong}, indent=1) + "\n"
        write_files(options.json.parent, {options.json.name: written.encode()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
