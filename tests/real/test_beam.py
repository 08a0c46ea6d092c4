"""Shards through the real Apache Beam: the same files and samples as without it."""

import json

import pytest

from llamavid_jax.data.build_shards import LOCAL_BEAM, build
from llamavid_jax.data.shards import read_shards

pytestmark = pytest.mark.real

TURNS = [{"from": "human", "value": "Was ist „é“?"}, {"from": "gpt", "value": "Ein Buchstabe."}]


def test_beam_writes_the_same(tmp_path):
    (tmp_path / "set.json").write_text(json.dumps([{"id": str(i), "conversations": TURNS} for i in range(23)]))
    # two samples to a shard: from ten shards on, tfds confuses their order, and the last one is shorter
    manifests = [
        build(tmp_path / "set.json", tmp_path / name, beam=beam, shard_bytes=750)
        for name, beam in (("plain", None), ("beam", LOCAL_BEAM))
    ]
    assert len([name for name in manifests[1]["files"] if "train" in name]) == 12
    assert manifests[0]["files"].keys() == manifests[1]["files"].keys()
    assert list(read_shards(tmp_path / "beam")) == list(read_shards(tmp_path / "plain"))
