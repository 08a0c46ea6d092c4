"""The original's pickled features are read, and nothing in a pickle is ever executed."""

import collections
import pickle
import subprocess
import sys

import numpy as np
import pytest

from llamavid_jax.media import feature_pickle
from llamavid_jax.media.features import describe, is_features, iter_features, read_header
from llamavid_jax.media.source import MediaError

FEATS = np.random.default_rng(0).standard_normal((6, 5, 4)).astype(np.float16)
TEXT = "<image>où?" * 6


def save(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("large", [16 << 20, 64])  # large arrays stay in the file, as those of an hour of video
def test_the_originals_form(protocol, large, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_pickle, "LARGE", large)
    text = "<image>" * 6
    path = save(tmp_path / "f.pkl", {"feats": FEATS, "inputs": text}, protocol)
    assert read_header(path) == (6, 4, 4, text) and describe(path) is None and is_features(path)
    np.testing.assert_array_equal(np.stack(list(iter_features(path))), FEATS[:, 1:])


def test_float32_without_text(tmp_path):
    path = save(tmp_path / "f.pkl", {"feats": FEATS.astype(np.float32)})
    assert read_header(path).inputs is None
    assert next(iter_features(path)).dtype == np.float32


def test_numpy_1_named_its_modules_otherwise(tmp_path):
    path = save(tmp_path / "f.pkl", {"feats": FEATS, "inputs": TEXT}, 3)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    np.testing.assert_array_equal(np.stack(list(iter_features(path))), FEATS[:, 1:])


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class State:
    def __init__(self, value):
        self.value = value


def attacks(ran: str):
    """Malicious values in place of the array or of the whole content, and the error for each."""
    code = f"open({ran!r}, 'w')"
    return {
        "system": (Call(__import__("os").system, f"touch {ran}"), r"names posix\.system"),
        "exec": (Call(exec, code), r"names builtins\.exec"),
        "eval": (Call(eval, code), r"names builtins\.eval"),
        "open": (Call(open, ran, "w"), r"names _?io\.open"),
        "getattr": (Call(getattr, "a", "upper"), r"names builtins\.getattr"),
        "subprocess": (Call(subprocess.Popen, ["touch", ran]), r"names subprocess\.Popen"),
        "inside numpy": (Call(np.load, ran), r"names numpy\.load"),
        "an object": (State(1), "names .*State"),
        "a class": (collections.OrderedDict, r"names collections\.OrderedDict"),
        "objects": (np.array([Call(exec, code)], object), r"names builtins\.exec"),
        "nested": ({"a": [{"b": (Call(exec, code),)}]}, r"names builtins\.exec"),
        "a set": ({1, 2}, "instruction EMPTY_SET"),
        "by columns": (np.asfortranarray(FEATS), "stored by columns"),
    }


@pytest.mark.parametrize("name", attacks(""))
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_attacks(name, protocol, tmp_path):
    """An error of one line names the file and the forbidden name; nothing has run."""
    value, message = attacks(str(tmp_path / "ran"))[name]
    if protocol == 2 and name in ("a set", "by columns", "objects"):
        message = "names"  # protocol 2 spells these names differently
    for whole in (value, {"feats": value, "inputs": TEXT}, {"feats": FEATS, "inputs": TEXT, "more": value}):
        path = save(tmp_path / "f.pkl", whole, protocol)
        with pytest.raises(MediaError, match=rf"f\.pkl .*{message if protocol > 2 else ''}") as caught:
            list(iter_features(path))
        assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


RAW = {
    "protocol 0": b"cos\nsystem\n(S'touch ran'\ntR.",
    "old instruction": b"(dp0\nS'feats'\np1\nI1\ns.",
    "bomb of lists": b"\x80\x04" + b"]" * 3 + b"(" + b"h\x00" * 10,
    "too many": b"\x80\x04" + b"N0" * (1 << 19),
    "itself": b"\x80\x04}\x94\x8c\x05feats\x94h\x00s.",
    "no end": b"\x80\x04}",
    "empty stack": b"\x80\x04.",
    "call of a number": b"\x80\x04K\x01)R.",
    "build of a number": b"\x80\x04K\x01)b.",
    "keys that never end": b"\x80\x04})N\x86\x94h\x00N\x86N\x86s.",
    "persistent": b"\x80\x04\x8c\x01aQ.",
    "extension": b"\x80\x04\x82\x01.",
    "a long line": b"\x80\x04c" + b"a" * 100_000,
    "a huge text": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"a" * 50,
    "huge bytes": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"a" * 50,
    "buffer": b"\x80\x05\x97.",
    "a list": pickle.dumps([1, 2]),
    "no array": pickle.dumps({"inputs": "a"}),
    "array of texts": pickle.dumps({"feats": np.array(["a"])}),
    "array of doubles": pickle.dumps({"feats": FEATS.astype(float)}),
    "big endian": pickle.dumps({"feats": FEATS.astype(">f2")}),
    "two axes": pickle.dumps({"feats": FEATS[0]}),
    "nothing in it": pickle.dumps({"feats": FEATS[:0]}),
    "text of bytes": pickle.dumps({"feats": FEATS, "inputs": b"a"}),
    "not finite": pickle.dumps({"feats": FEATS * np.float16(np.inf)}),
}


@pytest.mark.parametrize("name", RAW)
def test_hostile_bytes(name, tmp_path):
    path = tmp_path / "f.pkl"
    path.write_bytes(RAW[name])
    with pytest.raises(MediaError, match=r"f\.pkl") as caught:
        list(iter_features(path))
    assert len(str(caught.value)) < 1000


def test_an_array_of_fewer_bytes_than_its_shape(tmp_path):
    data = bytearray(pickle.dumps({"feats": FEATS}, 4))
    place = data.index(b"K\x06K\x05K\x04\x87")
    for shape in (b"K\x07K\x05K\x04\x87", b"K\x05K\x05K\x04\x87"):
        data[place : place + 7] = shape
        (tmp_path / "f.pkl").write_bytes(data)
        with pytest.raises(MediaError, match="does not have the bytes of its shape"):
            list(iter_features(tmp_path / "f.pkl"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_cut(share, tmp_path):
    data = pickle.dumps({"feats": FEATS, "inputs": TEXT}, 4)
    (tmp_path / "f.pkl").write_bytes(data[: int(share * len(data))])
    with pytest.raises(MediaError, match="no file of features, or damaged"):
        list(iter_features(tmp_path / "f.pkl"))


def test_a_film_is_never_whole_in_memory(tmp_path):
    """A file of 105 MB is read in 40 MB more than Python takes."""
    with (tmp_path / "f.pkl").open("wb") as file:
        pickle.dump({"feats": np.zeros((400, 257, 512), np.float16), "inputs": TEXT}, file)
    code = (
        "import sys; from llamavid_jax.media.features import iter_features, read_header\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "at = peak(); print(read_header(sys.argv[1])[:3], sum(1 for _ in iter_features(sys.argv[1])))\n"
        "print(peak() - at < 40_000)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f.pkl")], capture_output=True, text=True)
    assert done.stdout == "(400, 256, 512) 400\nTrue\n", done.stdout + done.stderr
