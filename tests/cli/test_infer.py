"""`infer.py` as users run it: real files, the shell, bad input."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from clips import index_frame, write_clip
from paths import ROOT
from PIL import Image

from llamavid_jax.commands import infer
from llamavid_jax.text.subtitles import Cue

CLIP = str(ROOT / "demo" / "space.mp4")
QUESTION = "what is in the video?"


@pytest.fixture
def picture(tmp_path) -> str:
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


@pytest.fixture
def ask(checkpoint, capsys):
    """Runs infer.py in this process; returns the exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = infer.main(["--model", checkpoint, "--dtype", "float32", "--max-new-tokens", "8", *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def video_answer(checkpoint) -> dict:
    """One question about the bundled video, in a separate process."""
    command = [sys.executable, "infer.py", "--model", checkpoint, "--dtype", "float32", "--max-new-tokens", "8"]
    command += ["--video", CLIP, "--question", QUESTION, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_json(video_answer):
    """One JSON object on stdout: 12 frames from a clip of 12 seconds, 2 tokens each."""
    assert (video_answer["frames"], video_answer["visual_tokens"], video_answer["new_tokens"]) == (12, 24, 8)
    assert video_answer["prompt_tokens"] > 24
    assert set(video_answer["seconds"]) == {"load", "encode", "generate"}
    times = list(range(12))
    assert video_answer["sampling"] == [{"video": CLIP, "rule": "stride", "frames": 12, "times": times}]


def test_evidence(ask, tmp_path):
    file = tmp_path / "looked.png"
    code, out, err = ask("--video", CLIP, "--question", QUESTION, "--json", "--evidence", str(file))
    frames = json.loads(out)["evidence"]
    assert code == 0 and str(file) in err and Image.open(file).height > 200
    assert len(frames) == 10 and {frame["second"] for frame in frames} <= set(map(float, range(12)))
    assert [frame["weight"] for frame in frames] == sorted((frame["weight"] for frame in frames), reverse=True)


@pytest.mark.parametrize(
    ("file", "said"), [("looked.jpg", "looked.jpg; give a FILE.png"), (f"{CLIP}/a.png", f"{CLIP} can")]
)
def test_evidence_that_cannot_be_drawn_is_said_first(ask, file, said):
    code, out, err = ask("--video", CLIP, "--question", QUESTION, "--evidence", file)
    assert (code, out) == (2, "") and said in err


def test_the_rate_is_the_checkpoints_own(checkpoint, capsys, tmp_path):
    """It comes from video_preprocessor_config.json unless --fps is given; `num_frames` in its place is refused."""
    shutil.copytree(checkpoint, tmp_path / "model")
    file, most = tmp_path / "model" / "video_preprocessor_config.json", ("--max-new-tokens", "1", "--json")
    command = ["--model", str(tmp_path / "model"), "--video", CLIP, "--question", QUESTION, *most]
    for values, more, frames in (({"fps": 2}, [], 25), ({"fps": 2}, ["--fps", "0.5"], 6), ({"num_frames": 5}, [], 0)):
        file.write_text(json.dumps(values))
        code = infer.main(command + more)
        out, err = capsys.readouterr()
        assert code == (0 if frames else 2) and (json.loads(out)["frames"] if out else 0) == frames, err
    assert "num_frames" in err and "--fps" in err


def test_a_video_of_a_varying_rate_says_how_it_was_sampled(ask, tmp_path):
    path = write_clip(tmp_path / "[bold].mkv", [index_frame(i) for i in range(3)], times_ms=[0, 4000, 8000])
    out = json.loads(ask("--video", str(path), "--question", QUESTION, "--json")[1])
    times = list(range(12))
    assert out["sampling"] == [{"video": str(path), "rule": "times", "frames": 12, "times": times}]


def test_a_subtitle_of_50_minutes_does_not_make_a_clip_of_10_seconds_too_long(ask):
    clip = ROOT / "tests" / "media" / "subtitle_of_50_minutes.mkv"
    assert json.loads(ask("--video", str(clip), "--question", QUESTION, "--json")[1])["frames"] == 10


def test_names_do_not_command_the_terminal(ask):
    code, out, err = ask("--video", "\x1b[2Jno\x07.mp4", "--question", QUESTION)
    assert (code, out) == (2, "") and "\\x1b[2Jno\\x07.mp4" in err and err.replace("\n", "").isprintable()


def test_a_download_is_deleted_when_the_process_is_told_to_end(checkpoint, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/clip.mp4"
        command = [sys.executable, "infer.py", "--model", checkpoint, "--video", url, "--question", QUESTION]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
        with server.accept()[0]:
            assert any(tmp_path.glob("llamavid-*/download"))
            process.terminate()
            assert process.wait(60) == 143
    assert not any(tmp_path.glob("llamavid-*"))


def test_answer_alone_on_stdout(ask, video_answer):
    code, out, _ = ask("--video", CLIP, "--question", QUESTION)
    assert (code, out) == (0, video_answer["answer"] + "\n")


def test_stream(ask, video_answer):
    code, out, _ = ask("--video", CLIP, "--question", QUESTION, "--stream")
    assert (code, out.strip()) == (0, video_answer["answer"])


def test_fps_sets_the_number_of_frames(ask):
    out = json.loads(ask("--video", CLIP, "--question", QUESTION, "--fps", "2.5", "--json")[1])
    assert (out["frames"], out["visual_tokens"]) == (30, 60)


def test_video_by_url(ask, video_answer):
    handler = partial(SimpleHTTPRequestHandler, directory=str(ROOT / "demo"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, out, _ = ask("--video", f"http://127.0.0.1:{server.server_port}/space.mp4", "--question", QUESTION)
        server.shutdown()
    assert (code, out) == (0, video_answer["answer"] + "\n")


def test_images_and_videos_together(ask, picture):
    out = json.loads(ask("--image", picture, "--image", picture, "--video", CLIP, "--question", "which?", "--json")[1])
    assert (out["frames"], out["visual_tokens"]) == (14, 28)


def test_text_only(ask):
    out = json.loads(ask("--question", "Who are you?", "--json")[1])
    assert (out["frames"], out["visual_tokens"]) == (0, 0)


def test_chat_encodes_the_video_once(ask, monkeypatch, video_answer):
    """Later prompts hold the earlier turns and the video, which is encoded once."""
    lines = iter(["and then?\n", "\n", "who?\n", ""])
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(lines))
    code, out, _ = ask("--video", CLIP, "--question", QUESTION, "--chat", "--json")
    turns = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(turns) == 3
    assert turns[0]["answer"] == video_answer["answer"]
    assert [turn["frames"] for turn in turns] == [12, 12, 12]
    assert turns[0]["prompt_tokens"] < turns[1]["prompt_tokens"] < turns[2]["prompt_tokens"]


def test_chat_goes_on_after_a_bad_line(ask, monkeypatch):
    lines = iter(["is <image> here?\n", "who?\n", ""])
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(lines))
    code, out, err = ask("--video", CLIP, "--question", QUESTION, "--chat", "--json")
    assert code == 2 and len(out.splitlines()) == 2 and "the question holds <image>" in err


def test_a_reader_that_leaves_is_no_error(checkpoint):
    """`infer.py | head -c 1`."""
    command = f"{sys.executable} infer.py --model {checkpoint} --dtype float32 --max-new-tokens 40 --question hi --chat"
    done = subprocess.run(
        f"(echo who; echo what; echo when) | {command} | head -c 1",
        cwd=ROOT, shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(done.stdout) == 1 and "Traceback" not in done.stderr


@pytest.mark.sharding
def test_mesh_gives_the_same_answer(ask, video_answer):
    code, out, _ = ask("--video", CLIP, "--question", QUESTION, "--mesh", "fsdp=2,tensor=4")
    assert (code, out) == (0, video_answer["answer"] + "\n")


BAD = {
    "the following arguments are required: --model": [],
    "there is no question; give --question TEXT": ["--model", "DIR"],
    "unrecognized arguments: --vido": ["--model", "DIR", "--vido", "a.mp4"],
    "argument --fps: invalid float value: 'fast'": ["--model", "DIR", "--question", "a", "--fps", "fast"],
    "--stream and --json exclude each other": ["--model", "DIR", "--question", "a", "--stream", "--json"],
    "argument --template: invalid choice: 'v9'": ["--model", "DIR", "--question", "a", "--template", "v9"],
    "nowhere/preprocessor_config.json does not exist": ["--model", "nowhere", "--question", "a"],
    "nothing.mp4 does not exist": ["--model", "DIR", "--question", "a", "--video", "nothing.mp4"],
    "nothing.png does not exist": ["--model", "DIR", "--question", "a", "--image", "nothing.png"],
    "is not a video that can be read": ["--model", "DIR", "--question", "a", "--video", "infer.py"],
    "is a still picture, not a video; give it with --image": ["--model", "DIR", "--question", "a", "--video", "PNG"],
    "is not a picture that Pillow can read": ["--model", "DIR", "--question", "a", "--image", "demo/space.mp4"],
    "too few to sample 60 a second; use fps 25 or, where it is fixed, ": [
        *["--model", "DIR", "--question", "a", "--video", "demo/space.mp4", "--fps", "60"]
    ],
    "--fps is 0.0; give a number above 0": ["--model", "DIR", "--question", "a", "--fps", "0"],
    "--fps is nan; give a number above 0": ["--model", "DIR", "--question", "a", "--fps", "nan"],
    "the question holds <image>": ["--model", "DIR", "--question", "see <image>", "--image", "PNG"],
    "stop is ['']": ["--model", "DIR", "--question", "a", "--stop", ""],
    "seed is 99999999999": ["--model", "DIR", "--question", "a", "--seed", "99999999999"],
    "there is no question": ["--model", "DIR", "--question", "   "],
    "the videos last 12 s, at 25 frames a second 600 visual tokens; this model has room for 548: use --fps": [
        *["--model", "DIR", "--question", "a", "--video", "demo/space.mp4", "--fps", "25", "--max-new-tokens", "1500"]
    ],
    "mesh part 'tensors=2' is not AXIS=SIZE": ["--model", "DIR", "--question", "a", "--mesh", "tensors=2"],
    "needs 16 devices; 8 are attached": ["--model", "DIR", "--question", "a", "--mesh", "tensor=16"],
    "temperature is -1.0; it must be 0 (greedy) or more": [
        *["--model", "DIR", "--question", "a", "--temperature", "-1"]
    ],
    "top_p is 2.0": ["--model", "DIR", "--question", "a", "--top-p", "2"],
    "max_new_tokens is 0": ["--model", "DIR", "--question", "a", "--max-new-tokens", "0"],
    "--tokens is 99; give the length of the prompt to compile, with --compile-only": [
        *["--model", "DIR", "--question", "a", "--tokens", "99"]
    ],
    "--tokens is -5; give the length": ["--model", "DIR", "--compile-only", "--topology", "v5e:1x1", "--tokens", "-5"],
    "--subtitles goes with one --video alone": ["--model", "DIR", "--question", "a", "--subtitles", "a.srt"],
    "a.safetensors holds features": ["--model", "DIR", "--question", "a", "--video", "a.safetensors", "--fit"],
    "--transcribe goes with one --video alone": ["--model", "DIR", "--question", "a", "--transcribe"],
    "--transcribe hears the sound in a file, and --video is f.npz; give a video file": [
        *["--model", "DIR", "--question", "a", "--video", "f.npz", "--transcribe", "tiny.en"]
    ],
    "--subtitles auto reads the track in a file, and --video is f.npz; give a video file": [
        *["--model", "DIR", "--question", "a", "--video", "f.npz", "--subtitles", "auto"]
    ],
    "--times goes with one --video alone; give that": ["--model", "DIR", "--question", "a", "--times"],
    "argument --times: invalid choice: 'hour'": ["--model", "DIR", "--question", "a", "--times", "hour"],
    "'nothing.srt' cannot be read": [
        *["--model", "DIR", "--question", "a", "--video", "demo/space.mp4", "--subtitles", "nothing.srt"]
    ],
    "max_new_tokens is -1": ["--model", "DIR", "--compile-only", "--topology", "v5e:1x1", "--max-new-tokens", "-1"],
    "127.0.0.1:9": ["--model", "DIR", "--question", "a", "--video", "http://127.0.0.1:9/a.mp4"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(checkpoint, picture, message, capsys):
    """Exit code 2 and one line that says what to do, nothing on stdout."""
    arguments = [{"DIR": checkpoint, "PNG": picture}.get(argument, argument) for argument in BAD[message]]
    assert infer.main(arguments) == 2
    out, err = capsys.readouterr()
    line = err.strip().splitlines()[-1]
    assert out == "" and line.startswith("infer.py: ") and message in line
    assert "Traceback" not in err


@pytest.mark.parametrize("option", ["--video", "--image"])
def test_a_file_that_cannot_be_used_is_known_before_the_weights_are_read(checkpoint, tmp_path, capsys, option):
    """Loading 7B takes minutes; here there are no weights to load."""
    (tmp_path / "sound.bin").write_bytes(b"no pixels")
    for path in Path(checkpoint).iterdir():
        if path.name != "weights":
            (tmp_path / path.name).symlink_to(path)
    assert infer.main(["--model", str(tmp_path), "--question", "a", option, str(tmp_path / "sound.bin")]) == 2
    assert "sound.bin is not a" in capsys.readouterr().err


def test_a_checkpoint_without_tokenizer(checkpoint, tmp_path, capsys):
    for path in Path(checkpoint).iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).symlink_to(path)
    assert infer.main(["--model", str(tmp_path), "--question", "a"]) == 2
    assert "holds no tokenizer; convert again with --tokenizer FOLDER" in capsys.readouterr().err


def test_a_question_that_is_no_text_is_said(ask, monkeypatch):
    """A question that is not UTF-8 is reported, whatever the terminal's encoding, and the chat continues."""
    lines = io.TextIOWrapper(io.BytesIO("où?\n".encode() + b"caf\xe9?\nwho?\n"), encoding="ascii")
    monkeypatch.setattr("sys.stdin", lines)
    code, out, err = ask("--chat", "--json")
    assert code == 2 and len(out.splitlines()) == 2
    assert err == "infer.py: the question on stdin is 'caf\\udce9?', which is not UTF-8; give it in UTF-8\n"


def test_a_chat_goes_on_beyond_the_positions(ask, monkeypatch, tmp_path):
    """The oldest turns are left out, which is reported once; every answer has its evidence image."""
    lines = iter([f"{number} " + "what " * 400 + "\n" for number in range(4)] + [""])
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(lines))
    code, out, err = ask("--video", CLIP, "--chat", "--json", "--evidence", str(tmp_path / "looked.png"))
    assert len(list(tmp_path.glob("looked*.png"))) == 4
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(answers) == 4 and 1500 < max(answer["prompt_tokens"] for answer in answers) <= 2040
    assert err.count("are left out") == 1 and all(answer["visual_tokens"] >= 24 for answer in answers)


def test_a_choice_of_words_that_greedy_decoding_does_not_make_is_told(capsys):
    given = ["--model", "demo/model", "--question", "a", "--top-p", "0.9"]
    infer.parse_arguments([*given, "--temperature", "0.5"])
    infer.parse_arguments([*given, "--like-original"])
    assert capsys.readouterr().err == ""
    infer.parse_arguments(given)
    assert "change nothing at temperature 0" in capsys.readouterr().err


def test_like_the_original(ask, monkeypatch, picture):
    """Defaults are the original's template, crop and sampling; only the newest question has visual tokens."""
    lines = iter(["and then?\n", ""])
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(lines))
    _, out, _ = ask("--image", picture, "--chat", "--question", "what?", "--like-original", "--json")
    assert [json.loads(line)["visual_tokens"] for line in out.splitlines()] == [2, 2]
    options = infer.parse_arguments(["--like-original", "--model", "demo/model", "--question", "a", "--top-p", "0.9"])
    assert (options.template, options.temperature, options.top_p) == ("llava_v1", 0.2, 0.9)
    assert infer.image_processor(options).image_aspect_ratio == "crop"
    options = infer.parse_arguments(["--model", "demo/model", "--question", "--like-original"[2:]])
    assert (options.template, options.temperature) == ("vicuna_v1", 0.0)
    assert infer.image_processor(options).image_aspect_ratio == "pad"


def test_subtitles(ask, tmp_path):
    """Subtitles add text tokens to the prompt and leave the number of visual tokens."""
    (tmp_path / "film.srt").write_text("1\n00:00:01,000 --> 00:00:04,000\nWho goes there?\n")
    with_words, without = (
        json.loads(ask("--video", CLIP, "--question", QUESTION, "--json", *more)[1])
        for more in (["--subtitles", str(tmp_path / "film.srt")], [])
    )
    assert with_words["visual_tokens"] == without["visual_tokens"] == 24
    assert with_words["prompt_tokens"] > without["prompt_tokens"] + 40  # "Below is a movie. ..."


def test_transcribe(ask, monkeypatch):
    """Transcribed speech takes the place of subtitles; a missing extra or a video without sound is reported."""
    asked = ["--video", CLIP, "--question", QUESTION, "--json"]
    heard = {"small": [Cue(4.0, "Who goes there?")], "tiny": []}
    monkeypatch.setattr(infer, "film_speech", lambda video, model: heard[model])
    found, silent, plain = (ask(*asked, *more) for more in (["--transcribe"], ["--transcribe", "tiny"], []))
    lengths = [json.loads(out)["prompt_tokens"] for _, out, _ in (found, silent, plain)]
    assert lengths[0] > lengths[1] > lengths[2] + 30 and found[2] == ""
    assert silent[2] == f"{CLIP}: nothing is said that tiny could hear\n"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    assert ask(*asked, "--transcribe")[::2] == (
        2, 'infer.py: faster_whisper is not installed; pip install "llamavid_jax[speech]"\n'
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=lambda *_, **__: None))
    assert f"{CLIP} holds no sound that is known; give what is said" in ask(*asked, "--transcribe")[2]


def test_times(ask):
    """Each frame has its time, "[0:00]" to "[0:11]"; with `minute`, only the first of each minute has."""
    asked = ["--video", CLIP, "--question", QUESTION, "--json"]
    frame, minute = (json.loads(ask(*asked, "--times", *of)[1]) for of in ([], ["minute"]))
    assert frame["visual_tokens"] == minute["visual_tokens"] == 24
    assert frame["prompt_tokens"] > minute["prompt_tokens"] + 11 * 4


@pytest.mark.parametrize(
    ("shell", "code", "says"),
    [
        ("--question hi >&-", 2, "infer.py: stdout is closed, and the answer goes there; leave it open"),
        ("--question hi --video nothing.mp4 2>&-", 2, ""),  # the error is not printed on stdout in place of the answer
        ("--chat <&-", 2, "infer.py: stdin is closed, and --chat reads its questions there"),
        ("--question hi <&- >&- 2>&-", 2, ""),
        ("--question caf$'\\xe9'", 2, "infer.py: --question is 'caf\\udce9', which is not UTF-8"),
        ("--question hi --video caf$'\\xe9'.mp4", 2, "infer.py: caf\\udce9.mp4 does not exist"),
        ("--question hi --video où.mp4", 2, "infer.py: o\\xf9.mp4 does not exist"),
        ("--question hi --video $'a\\e]0;b\\a\\e[2J.mp4'", 2, "infer.py: a\\x1b]0;b\\x07\\x1b[2J.mp4 does not exist"),
        ("--question hi --model '~/nothing'", 2, "infer.py: HOME/nothing/preprocessor_config.json does not exist"),
    ],
)
def test_streams(shell, code, says, tmp_path):
    """Closed streams, other encodings and escaped control characters, all checked before JAX is imported."""
    command = f"{sys.executable} infer.py --model demo/model {shell}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.startswith(says.replace("HOME", str(tmp_path))) and done.stderr.count("\n") == bool(says)


def test_the_question_in_another_locale(checkpoint):
    """The argument's bytes are read as UTF-8, although Python decodes them as ASCII in the C locale."""
    command = [sys.executable, "infer.py", "--model", checkpoint, "--question", "Où est l'été ?", "--json"]
    command += ["--max-new-tokens", "8", "--stop", "é"]
    usual, other = (
        subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | locale)
        for locale in ({"PYTHONUTF8": "1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"})
    )
    answers = [json.loads(done.stdout) | {"seconds": None} for done in (usual, other)]
    assert answers[0] == answers[1]


def test_ctrl_c_before_a_command_has_begun_is_no_traceback():
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's `&` ignores it
    code += "; import llamavid_jax.commands; signal.raise_signal(signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (130, -2) and done.stderr == ""
    done = subprocess.run([sys.executable, "-c", "import llamavid_jax.commands; 1 / 0"], cwd=ROOT, capture_output=True)
    assert done.returncode == 1 and b"ZeroDivisionError" in done.stderr


def test_a_full_disk_behind_stdout(ask, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        code, _, err = ask("--question", "hi", "--stream")
    assert code == 2
    assert err == "infer.py: stdout cannot be written (No space left on device); send it elsewhere\n"


def test_answers_do_not_reach_into_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    infer.write("a\x1b[2Jb\n\tc\n")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\tc\n"


def test_a_terminal_that_is_not_utf8(ask, monkeypatch):
    """The output is still valid JSON."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    code, _, err = ask("--question", "hi", "--json")
    out.seek(0)
    assert (code, err) == (0, "") and json.loads(out.read())["new_tokens"] == 8


def test_what_a_film_may_be_given_up_for(ask, tmp_path):
    """Only key frames, a lower rate, only the first part of a damaged file: each is reported on stderr."""
    film = write_clip(tmp_path / "film.mkv", [index_frame(i % 1024) for i in range(1050)])
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    about = ("--question", QUESTION, "--json", "--video")
    code, out, err = ask(*about, str(film), "--fast-sampling", "--fps", "0.5")
    assert code == 0 and json.loads(out)["sampling"][0]["rule"] == "key frames" and "key frames in place of" in err
    code, out, err = ask(*about, str(film), "--fps", "25")
    assert (code, out) == (2, "") and "--fit" in err
    code, out, err = ask(*about, str(film), "--fps", "25", "--fit")
    assert code == 0 and 500 < json.loads(out)["frames"] < 1024 and "frames a second, not 25" in err
    code, out, err = ask(*about, str(cut))
    assert (code, out) == (2, "") and "--partial" in err
    code, out, err = ask(*about, str(cut), "--partial")
    assert code == 0 and 15 < json.loads(out)["frames"] < 25 and "only its first" in err
