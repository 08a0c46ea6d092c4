"""The file of answers: cut off at any byte, used by two processes, from another run, in several parts."""

import json

import pytest

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.store import gather, open_store, part_name

HEADER = {"set": "gqa", "like_original": False, "settings": {}, "model": {}, "data": {"questions": 4}, "shard": [0, 1]}


def row(name: str, index: int, **more) -> dict:
    return {"id": name, "index": index, "text": "é\n", "reference": {}, **more}


def test_cut_off_at_any_byte(tmp_path):
    """Complete rows stay, the question of the cut row is asked again, and no row comes twice."""
    path = tmp_path / "answers.jsonl"
    with open_store(path, HEADER, [row("rest", 9)]) as store:
        for number in range(3):
            store.write([row(str(number), number)])
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with open_store(path, HEADER, [row("rest", 9)]) as store:
            lost = [str(number) for number in range(3) if str(number) not in store.done]
            assert len(lost) == 3 - max(0, whole[:size].count(b"\n") - 2)
            store.write([row(name, int(name)) for name in lost])
        names = [json.loads(line).get("id") for line in path.read_bytes().splitlines()]
        assert names[0] is None and sorted(names[1:]) == ["0", "1", "2", "rest"], size


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open_store(path, HEADER, []), pytest.raises(InputError, match="in use"), open_store(path, HEADER, []):
        pass


@pytest.mark.parametrize(
    "content, said",
    [(b'{"id": 1}\n', "does not begin with the header"), (b"[1]\n", "header"), (b"nonsense\n", "cannot be read")],
)
def test_other_files(tmp_path, content, said):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said), open_store(path, HEADER, []):
        pass
    assert path.read_bytes() == content


def test_parts_in_the_order_of_the_set(tmp_path):
    for part, numbers in ((0, (3, 0)), (1, (1, 2))):
        path = tmp_path / part_name((part, 2))
        with open_store(path, {**HEADER, "shard": [part, 2]}, []) as store:
            store.write([row(str(number), number) for number in numbers])
    header, rows = gather(tmp_path)
    assert [one["index"] for one in rows] == [0, 1, 2, 3] and header["set"] == "gqa"
    other = {**HEADER, "set": "pope", "shard": [2, 3]}
    with pytest.raises(InputError, match="another set"), open_store(tmp_path / part_name((2, 3)), other, []):
        pass
    assert gather(tmp_path) == (header, rows)
    (tmp_path / part_name((2, 3))).write_text(json.dumps({"header": other}) + "\n")
    with pytest.raises(InputError, match="another set"):
        gather(tmp_path)


def test_annotations_that_another_part_does_not_know(tmp_path):
    """Shards without them are reported as outdated until resumed; no other process rewrites their rows."""
    paths = [tmp_path / part_name((part, 2)) for part in (0, 1)]

    def go_on(part: int, reference: dict, rest: list) -> tuple[list, list[str]]:
        header = {**HEADER, "shard": [part, 2]}
        with open_store(paths[part], header, rest, references={"0": reference, "1": reference}) as store:
            store.write([row(str(part), part)] if str(part) not in store.done else [])
            return list(store.outdated), sorted(store.done)

    assert go_on(0, {}, [row("rest", 9, text=None)]) == ([], ["0", "rest"])
    assert go_on(1, {}, [row("rest", 9, text=None)]) == ([], ["0", "1", "rest"])
    assert go_on(0, {"answer": "a"}, [row("more", 9, text=None)]) == ([paths[1]], ["0", "1", "more"])
    assert go_on(1, {"answer": "a"}, [row("more", 9, text=None)]) == ([], ["0", "1", "more"])
    assert [one["reference"] for one in gather(tmp_path)[1]] == [{"answer": "a"}] * 2 + [{}]


def test_nothing_there(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="holds no answers"):
            gather(folder)
