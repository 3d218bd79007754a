"""Fuzzing: lists, videos, checkpoints, flags and annotations that are damaged, hostile or nonsense. Each is taken
sensibly or refused in one line that names it; nothing hangs, no code of a checkpoint runs, no input file is changed."""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import safetensors.torch
import torch

import engine_for_pretraining
import engine_for_tats
import run_class_finetuning
import run_mae_pretraining
import run_mae_vis
from datasets.decoding import VideoError, read_frames
from datasets.lists import ListError, read_list
from datasets.moving_shapes import render_clip, write_dataset, write_video
from datasets.transforms import spatial_crops
from datasets.video import EvalVideoDataset, TrainVideoDataset
from runtime.checkpoint import CheckpointError, check_moments, latest_checkpoint, load_checkpoint
from runtime.convert import encoder_weights, load_weights, model_weights
from tests.helpers.runs import assert_names, naming
from tools import check_videos, make_lists, make_subset, resize_videos
from tools.common import in_processes

LISTS, VIDEOS, REAL_VIDEOS, FILES, STATES, ANNOTATIONS = 500, 60, 30, 150, 60, 30  # random cases; others come on top
SECONDS = 20  # for one input, on a busy machine
SMALL = [
    "--input_size", "32", "--num_frames", "4", "--sampling_rate", "2", "--batch_size", "4", "--num_workers", "0",
    "--device", "cpu", "--warmup_epochs", "0", "--epochs", "1",
]  # fmt: skip
PRETRAIN = ["--model", "pretrain_videomae_tiny_patch8_64", "--decoder_depth", "1", *SMALL]
TATS_NOW = ["--mask_type", "tats", "--tats_start_epoch", "0", "--num_landmarks", "4"]
FINETUNE = ["--data_set", "custom", "--nb_classes", "10", "--model", "vit_tiny_patch8_64", "--test_num_segment", "1",
            "--test_num_crop", "1", *SMALL]  # fmt: skip


@pytest.fixture(autouse=True)
def no_hang():
    """What waits for ever, for a pipe's writer say, fails."""

    def ring(*_):
        pytest.fail("hangs")  # no Exception, which the product may take for a damaged file

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def about(case):
    """A failure says which case it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"the case: {case}")
        raise


def refusal(main, arguments, *words) -> str:
    """Runs a program and returns what it says on its end, "" where it ends well; argparse says its part on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([str(argument) for argument in arguments])
            return ""
        except SystemExit as stop:
            if stop.code in (None, 0, 1) or isinstance(stop.code, str):
                message = stop.code if isinstance(stop.code, str) else ""
            else:
                message = said.getvalue().strip().splitlines()[-1].replace(": error: ", "error: ", 1)
                message = message[message.index("error: ") :]
    if message:
        assert message.startswith("error: ") and message.count("\n") <= 1, message
        assert len(message) < 3000 or "invalid int value" in message, message  # argparse repeats the whole text
        assert not [word for word in words if str(word) not in message], (words, message)
    return message


def damaged(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """A file's bytes after one kind of damage."""
    b, n = bytearray(data), len(data)
    kinds = "cut zero ones flip flips header number shuffle delete repeat insert".split() + ["splice"] * bool(other)
    kind, at = rng.choice(kinds), rng.randrange(n)
    some = rng.choice((1, 7, 64, 512, n // 3))
    edge = rng.choice((0, max(n - 1500, 0)))  # where containers keep their tables
    if kind == "cut":
        return data[:at]
    if kind in ("zero", "ones"):
        b[at : at + some] = (b"\0" if kind == "zero" else b"\xff") * len(b[at : at + some])
    elif kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else rng.choice((10, 100, 1000))):
            b[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == "header":
        for _ in range(rng.choice((1, 3, 20))):
            b[edge + rng.randrange(min(1500, n - edge))] = rng.randrange(256)
    elif kind == "number":
        place = edge + rng.randrange(max(min(1500, n - edge) - 4, 1))
        b[place : place + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\x80\0\0\0", b"\0\0\0\1"))
    elif kind == "shuffle":
        size = rng.choice((16, 256, 4096))
        blocks = [data[i : i + size] for i in range(0, n, size)]
        rng.shuffle(blocks)
        return b"".join(blocks)
    elif kind == "delete":
        del b[at : at + some]
    elif kind == "repeat":
        b[at:at] = b[at : at + some]
    elif kind == "insert":
        b[at:at] = rng.randbytes(some)
    else:
        share = rng.random()
        return data[: int(share * n)] + other[int(share * len(other)) :]
    return bytes(b)


# --- lists -------------------------------------------------------------------------------------------------------

GOOD_LIST = (
    "a.mp4 3\nsub/b.mp4 120 4\nc.mp4,5\n# c\n\nd.mp4, 77, 6\nwith space (1).avi 7\n/abs/e.mp4 0 -1\n\u00e9.mp4\t9\n"
)
ODD_TEXTS = [
    b"\0", b"\xef\xbb\xbf", b"\r\n", b"\r", b"9" * 5000, "\u0663".encode(), b"-5", b"-0", b'"', b"'", b" ", b"\t",
    b"x" * 100_000, b"\xff", b"\xc0\x80", b"\x1b[2J", b"\x0b", b"\x0c", "\u2028".encode(), "\x85".encode(), b",,,",
    b"1 " * 3000, b" " * 20_000, b"," * 20_000, b"-" * 20_000, b" ,1" * 5000, b"1e5", b"0x1", b"+3", b"a b c", b"#",
    "\u00a0".encode(), "\u2212".encode(), "\ud800".encode("utf-8", "surrogatepass"), b"3000000000", b"-9999999999",
]  # fmt: skip


def check_list(path, num_classes=None):
    """Reads a list; it must be refused by its name in a short line, or give absolute paths and small labels."""
    start = time.monotonic()
    try:
        paths, labels = read_list(path, num_classes)
    except ListError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1200, message[:2000]
        return None
    finally:
        assert time.monotonic() - start < 5
    assert len(paths) == len(labels) > 0 and all(os.path.isabs(p) and "\0" not in p for p in paths)
    assert all(-1 <= label < (num_classes or 10**9) for label in labels)
    return paths, labels


def test_damaged_lists_are_read_or_refused(tmp_path):
    path, refused = tmp_path / "list.csv", 0
    for seed in range(LISTS):
        rng = random.Random(seed)
        content = bytearray(GOOD_LIST.encode())
        for _ in range(rng.choice((1, 1, 3, 10))):
            at = rng.randrange(len(content) + 1)
            kind = rng.randrange(5)
            if kind < 2:  # inserted, or in place of a byte
                content[at : at + kind] = rng.choice(ODD_TEXTS)
            elif kind == 2:
                content[at:at] = rng.randbytes(rng.choice((1, 4)))
            elif kind == 3:
                del content[at : at + rng.choice((1, 5))]
            else:
                content = content[:at] or bytearray(b"x")
        path.write_bytes(content)
        with about(f"seed {seed}"):
            refused += check_list(path, rng.choice((None, 10))) is None
            assert path.read_bytes() == content
    assert LISTS / 5 < refused < LISTS * 9 / 10  # some of both, else this test tests little


PLAIN_LINE = re.compile(r"(?P<path>.+?)(?:(?:\s*,\s*|\s+)-?[0-9]+)?(?:\s*,\s*|\s+)(?P<label>-?[0-9]+)")


def test_lines_are_taken_apart_as_the_obvious_expression_does(tmp_path):
    """Which is too slow for long lines, and has no limits."""
    path = tmp_path / "list.csv"
    rng = random.Random(0)
    for _ in range(1000):
        line = "".join(rng.choice("ab12- ,\t.") for _ in range(rng.randrange(1, 12))).strip()
        match = PLAIN_LINE.fullmatch(line)
        path.write_text(f"{line}\nz.mp4 0\n")
        with about(repr(line)):
            found = check_list(path)
            if match and (not match["path"].strip(" ,\t") or match["path"].endswith(",")):
                pass  # an empty column, commas for a path: may be refused
            elif match and -1 <= int(match["label"]) < 10**9:
                assert (found[0][0], found[1][0]) == (os.path.join(tmp_path, match["path"]), int(match["label"]))
            else:
                assert found is None or not line


@pytest.mark.parametrize("line", [" " * 200_000, " ,1" * 70_000, "1 " * 100_000, "-" * 200_000, "x " + "9" * 200_000])
def test_a_long_line_takes_no_time(line, tmp_path):
    """One regular expression needed minutes for 20,000 spaces."""
    (tmp_path / "list.csv").write_text(f"a{line}b 1\na{line}b\n")
    start = time.monotonic()
    with pytest.raises(ListError, match="line 2"):
        read_list(tmp_path / "list.csv")
    assert time.monotonic() - start < 2


def special_files(folder: Path) -> dict[str, Path]:
    """What may stand where a file is expected; a pipe without a writer would be waited for for ever."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "forbidden").write_text("a.mp4 1\n")
    (folder / "forbidden").chmod(0)
    names = ["pipe", "loop", "dangling", "folder", "empty", "forbidden" if os.getuid() else "absent", "absent/below"]
    found = {name: folder / name for name in [*names, "x" * 300]}
    return found | {name: Path(name) for name in ("/dev/null", "/dev/zero", "/proc/self/mem") if os.path.exists(name)}


def test_what_is_no_list_is_refused(tmp_path):
    for name, path in special_files(tmp_path).items():
        with about(name):
            assert check_list(path) is None
            assert refusal(run_mae_pretraining.main, ["--data_path", path, *PRETRAIN], path)
            assert refusal(make_subset.main, ["--list", path, "--output", tmp_path / "out.csv"], path)


@pytest.mark.parametrize(
    "text,words",
    [
        ("a.mp4 1\nb.mp4 -2\n", ["line 2", "'-2'"]),
        ("a.mp4 99999999999999999999\n", ["line 1", "'99999999999999999999'"]),  # no int64
        ("a.mp4 " + "9" * 5000, ["line 1", "9" * 50]),  # int() refuses it
        ("a.mp4 \u0663\n", ["line 1", "'\u0663'"]),
        ("a\0.mp4 1\n", ["line 1", "a\\x00.mp4 1"]),
        ("x" * 100_000, ["line 1", "label", "x" * 50]),
    ],
)
def test_list_errors_that_were_none(text, words, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ListError) as error:
        read_list(path)
    assert not [word for word in [str(path), *words] if word not in str(error.value)], error.value
    assert len(str(error.value)) < 1000


# --- videos ------------------------------------------------------------------------------------------------------

CODECS = {
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "h264.mkv": ("libx264", {"bf": "2", "g": "8"}),
    "h264.mp4": ("libx264", {"bf": "2", "g": "8"}),
    "mpeg4.mp4": ("mpeg4", {"g": "5"}),
    "mjpeg.mov": ("mjpeg", {}),
    "h264.flv": ("libx264", {}),
    "mpeg2.mpg": ("mpeg2video", {}),
}


def encode(path, codec, options, clip):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for image in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_sound(path, codec):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16_000, layout="mono")
        for _ in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Path:
    """A folder with one small clip in several containers and codecs."""
    folder = tmp_path_factory.mktemp("encoded")
    clip, _ = render_clip("translate_left", np.random.default_rng(0), 64, 24)
    write_video(folder / "shapes.mp4", clip)
    for name, (codec, options) in CODECS.items():
        encode(folder / name, codec, options, clip)
    return folder


def first_pixels(clip, rng):
    return clip[..., :16, :16].contiguous() if min(clip.shape[-2:]) >= 16 else clip.new_zeros(4, 3, 16, 16)


def read_somehow(path, seed, decoder, how):
    """In a process of its own: what reading a video came to. Raises AssertionError; VideoError where it is refused."""
    whole = os.path.isfile(path) and os.path.getsize(path) > 0
    before = hashlib.sha256(Path(path).read_bytes()).digest() if whole else b""
    rng = random.Random(seed)
    try:
        if how == "frames":
            limit = rng.choice((None, 32))
            frames = read_frames(path, lambda n: sorted(rng.randrange(n + 1) for _ in range(4)), decoder, limit)
            assert frames.dtype == torch.uint8 and frames.ndim == 4 and len(frames) == 4 and frames.shape[3] == 3
            return "read"
        Path(f"{path}.csv").write_text(f"{path} 1\n{path} 2\n")
        if how == "train":
            item = TrainVideoDataset(f"{path}.csv", 4, 2, first_pixels, 2, decoder, 3)[0, seed]
            assert item["video"].shape == (2, 4, 3, 16, 16) and item["video"].dtype == torch.uint8
            failed = item["failed"]
        else:
            crop = functools.partial(spatial_crops, size=16, short_side=16, num_crops=2)
            item = EvalVideoDataset(f"{path}.csv", 4, 2, crop, 2, decoder=decoder)[0]
            failed = item["failed"]
            if item["video"] is not None:
                assert item["video"].shape == (4, 4, 3, 16, 16) and item["video"].dtype == torch.uint8
        assert all(failure.startswith(f"{path}: ") and "\n" not in failure for failure in failed)
        return "read" if item["video"] is not None else "refused"
    except VideoError as error:
        assert "\n" not in str(error) and path in str(error), str(error)
        return "refused"
    finally:
        assert not before or hashlib.sha256(Path(path).read_bytes()).digest() == before


def check_videos_are_read_or_refused(sources, folder, seeds):
    """Damages a source for each seed and reads it with every decoder; a crash or a hang costs its process only."""
    items = []
    for seed in seeds:
        rng = random.Random(seed)
        source = rng.choice(sources)
        path = folder / f"{seed}{source.suffix}"
        path.write_bytes(damaged(source.read_bytes(), rng, rng.choice(sources).read_bytes()))
        how = ("frames", "train", "eval")[seed % 3]
        items += [(str(path), seed, decoder, how) for decoder in ("pyav", "decord", "auto")]
    outcomes = list(in_processes(read_somehow, items, 1, SECONDS))
    bad = [(items[index][1:], Path(items[index][0]).suffix, reason) for index, _, reason in outcomes if reason]
    assert len(outcomes) == len(items) and not bad, bad
    return [outcome for _, outcome, _ in outcomes]


def test_damaged_videos_are_read_or_refused(encoded, tmp_path):
    outcomes = check_videos_are_read_or_refused(sorted(encoded.iterdir()), tmp_path, range(VIDEOS))
    assert {"read", "refused"} == set(outcomes)


@pytest.mark.slow
def test_damaged_real_videos_are_read_or_refused(shared_data, tmp_path):
    clips = [p for p in sorted((shared_data / "clips").glob("*/*")) if p.stat().st_size < 400_000]
    sources = [p for p in clips if p.suffix in (".avi", ".mp4", ".webm")]
    check_videos_are_read_or_refused(sources, tmp_path, range(REAL_VIDEOS))


def test_what_is_no_video_is_refused(encoded, tmp_path):
    special = list(special_files(tmp_path).values())
    (tmp_path / "text.mp4").write_text("<html>404</html>\n" * 100)
    write_sound(tmp_path / "sound.wav", "pcm_s16le")
    write_sound(tmp_path / "sound only.mp4", "aac")
    (tmp_path / "wav.mp4").write_bytes((tmp_path / "sound.wav").read_bytes())
    (tmp_path / "zeros.mp4").write_bytes(bytes(10_000))
    (tmp_path / "header.mp4").write_bytes((encoded / "h264.mp4").read_bytes()[:48])
    (tmp_path / "list.mp4").write_text(f"file '{encoded / 'h264.mp4'}'\n")  # FFmpeg's concat, which names other files
    with av.open(str(tmp_path / "no frame.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height = stream.width = 64
        container.mux(stream.encode())
    others = [path for path in sorted(tmp_path.glob("*.*")) if path.suffix in (".mp4", ".wav")]
    uses = [(special, "frames"), (others, "frames"), (others, "eval")]  # the last writes a list beside the file
    decoders = ("pyav", "decord", "auto")
    items = [(str(path), 0, decoder, how) for paths, how in uses for path in paths for decoder in decoders]
    for index, outcome, reason in in_processes(read_somehow, items, 1, SECONDS):
        assert (outcome, reason) == ("refused", None), items[index]


def test_a_picture_is_a_video_of_one_frame(encoded, tmp_path):
    """PNG renamed to .mp4: what FFmpeg makes of it."""
    from PIL import Image

    Image.new("RGB", (32, 24)).save(tmp_path / "picture.png")
    path = shutil.move(tmp_path / "picture.png", tmp_path / "picture.mp4")
    ((_, outcome, reason),) = in_processes(read_somehow, [(str(path), 3, "auto", "eval")], 1, SECONDS)
    assert outcome in ("read", "refused") and reason is None


def without_decoder(data: bytes) -> bytes:
    """Matroska's name of the codec, made unknown."""
    assert b"V_MPEG4/ISO/AVC" in data
    return data.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/ABC")


@pytest.mark.parametrize("decoder", ["pyav", "auto"])
def test_a_codec_nobody_knows_is_refused(encoded, decoder, tmp_path):
    """It was an AttributeError."""
    (tmp_path / "x.mkv").write_bytes(without_decoder((encoded / "h264.mkv").read_bytes()))
    with pytest.raises(VideoError, match=naming("x.mkv", "codec")):
        read_frames(str(tmp_path / "x.mkv"), lambda n: [0], decoder)


@pytest.mark.parametrize("name", ["h264.mp4", "mjpeg.mov", "mpeg2.mpg"])  # the last two are opened a second time
@pytest.mark.parametrize("instead", ["nothing", "text", "folder", "sound", "empty"])
@pytest.mark.parametrize("decoder", ["pyav", "decord", "auto"])
def test_a_video_that_goes_while_it_is_read(encoded, name, instead, decoder, tmp_path):
    path = tmp_path / name
    shutil.copy(encoded / name, path)

    def choose(length):
        path.unlink()
        if instead == "text":
            path.write_text("no video" * 1000)
        elif instead == "folder":
            path.mkdir()
        elif instead == "empty":
            path.touch()
        elif instead == "sound":
            write_sound(tmp_path / "x.wav", "pcm_s16le")
            os.replace(tmp_path / "x.wav", path)
        return [0, length - 1]

    try:
        frames = read_frames(str(path), choose, decoder)
    except VideoError as error:
        assert str(error).startswith(f"{path}: ")
    except FileNotFoundError:
        pytest.fail("not a VideoError")
    else:
        assert frames.shape == (2, 64, 64, 3)


def test_a_video_that_vanishes_during_training_is_replaced_counted_and_named(tmp_path, monkeypatch, capsys):
    """Between two epochs, with a loader process, beside one that was cut off from the start."""
    folder = write_dataset(tmp_path / "shapes", train=10, val=10, size=32, frames=12)
    videos = sorted((folder / "videos").glob("train_*.mp4"))
    videos[0].write_bytes(videos[0].read_bytes()[:700])
    real = engine_for_pretraining.train_one_epoch

    def then_lose_one(*args, **kwargs):
        stats = real(*args, **kwargs)
        videos[1].unlink(missing_ok=True)
        return stats

    monkeypatch.setattr(engine_for_pretraining, "train_one_epoch", then_lose_one)
    run_mae_pretraining.main(
        [*PRETRAIN, "--data_path", str(folder / "train.csv"), "--mask_type", "random", "--batch_size", "10",
         "--num_workers", "1", "--epochs", "3", "--output_dir", str(tmp_path / "out"), "--no-pin_mem"]
    )  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "out/log.txt").read_text().splitlines()]
    counts = [record["train_unreadable_videos"] for record in log]
    assert counts[0] >= 1 and counts[1] >= 2 and counts[2] >= 2  # more where a replacement is a bad one, too
    assert all(math.isfinite(record["train_loss"]) for record in log)
    printed = capsys.readouterr().out
    assert printed.count(f"{videos[0]}: ") == 3 and printed.count(f"{videos[1]}: ") == 2


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("shapes"), train=10, val=10, size=32, frames=12)


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory) -> dict[str, Path]:
    """Folders of a finished run of TATS and of fine-tuning."""
    folder = tmp_path_factory.mktemp("runs")
    run_mae_pretraining.main(
        ["--data_path", f"{shapes}/train.csv", *PRETRAIN, *TATS_NOW, "--output_dir", f"{folder}/tats"]
    )
    run_class_finetuning.main(["--data_path", str(shapes), *FINETUNE, "--output_dir", f"{folder}/fine"])
    return {"tats": folder / "tats", "fine": folder / "fine"}


class Call:
    """Unpickling it calls function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Hook:
    """Unpickling it calls its __setstate__."""

    def __setstate__(self, state):
        Path(state).touch()

    def __getstate__(self):
        return self.target


def hostile_objects(marker: Path) -> dict[str, object]:
    """Objects that make the marker when a plain unpickler reads them."""
    code = f"open({str(marker)!r}, 'w')"
    hook = Hook()
    hook.target = str(marker)
    return {
        "os.system": Call(os.system, f"touch '{marker}'"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(marker), "w"),
        "method": Call(getattr, Path(marker), "touch"),
        "partial": Call(map, functools.partial(open, str(marker)), ["w"]),
        "setstate": hook,
        "in Namespace": argparse.Namespace(lr=1.0, hook=Call(os.system, f"touch '{marker}'")),
        "in a list in Namespace": argparse.Namespace(lr=[Call(os.mkdir, str(marker))]),
        "torch.load": Call(torch.load, str(marker)),
        "run_module": Call(__import__, "antigravity_of_no_one"),
    }


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


SAVES = {
    "zip": torch.save,
    "legacy": save_legacy,
    "pickle": lambda state, path: Path(path).write_bytes(pickle.dumps(state, 2)),
    "protocol 4": lambda state, path: Path(path).write_bytes(pickle.dumps(state, 4)),
    "safetensors": lambda state, path: Path(path).write_bytes(pickle.dumps(state, 2)),
}


@pytest.mark.parametrize("save", SAVES)
def test_no_code_of_a_checkpoint_runs(save, shapes, runs, tmp_path):
    marker = tmp_path / "ran"
    good = load_checkpoint(runs["tats"] / "checkpoint-0.pth")
    path = tmp_path / ("checkpoint-5.safetensors" if save == "safetensors" else "checkpoint-5.pth")
    for name, hostile in hostile_objects(marker).items():
        for state in (good | {"args": hostile}, {"model": good["model"], "extra": [{"deep": hostile}]}, hostile):
            with about(f"{name}: {type(state).__name__}"):
                SAVES[save](state, path)
                with pytest.raises(CheckpointError, match=naming(path)):
                    load_checkpoint(path)
                if path.suffix == ".pth":  # a run's
                    with pytest.raises(CheckpointError, match=naming(tmp_path, path.name)):
                        latest_checkpoint(tmp_path)
        flags = ["--data_path", shapes / "train.csv", *PRETRAIN, *TATS_NOW]
        assert refusal(run_mae_pretraining.main, [*flags, "--resume", path], path)
        assert refusal(run_mae_pretraining.main, [*flags, "--finetune", path], path)
        flags = ["--data_path", shapes, *FINETUNE, "--finetune", path]
        assert refusal(run_class_finetuning.main, flags, path)
        assert refusal(run_class_finetuning.main, ["--eval", *flags], path)
        assert refusal(run_mae_vis.main, ["--model_path", path, "--videos", "x.mp4"], path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "open", "setstate", "in Namespace",
                                  "in a list in Namespace"])  # fmt: skip
def test_the_attacks_work_on_a_plain_unpickler(name, tmp_path):
    marker = tmp_path / "ran"
    torch.save(hostile_objects(marker)[name], tmp_path / "x.pth")
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert marker.exists()


def test_damaged_files_are_loaded_or_refused(tmp_path):
    """Bytes of every format at random; a file that still loads is one whose tensors' values changed, or nothing."""
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=1.0)}
    sources = []
    for save in ("zip", "legacy", "pickle"):
        SAVES[save](state if save != "pickle" else {"a": [1.0, "x"]}, tmp_path / "x.pth")
        sources.append((".pth", (tmp_path / "x.pth").read_bytes()))
    safetensors.torch.save_file(state["model"], tmp_path / "x.safetensors")
    sources.append((".safetensors", (tmp_path / "x.safetensors").read_bytes()))
    refused = 0
    for seed in range(FILES):
        rng = random.Random(seed)
        (suffix, data), (_, other) = rng.choice(sources), rng.choice(sources)
        path = tmp_path / f"damaged{suffix}"
        content = damaged(data, rng, other)
        path.write_bytes(content)
        with about(f"seed {seed}, {suffix}"):
            try:
                load_checkpoint(path)
            except CheckpointError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error)
            assert path.read_bytes() == content
    assert FILES / 2 < refused < FILES


def test_zip_files_with_members_gone_swapped_or_garbled(runs, tmp_path):
    whole = zipfile.ZipFile(runs["tats"] / "checkpoint-0.pth")
    members = {name: whole.read(name) for name in whole.namelist()}
    first, second = [name for name in members if "/data/" in name][:2]
    pickled = next(name for name in members if name.endswith("data.pkl"))
    changes = {
        "no pickle": {pickled: None},
        "no tensor": {first: None},
        "short tensor": {first: members[first][:-8]},
        "empty tensor": {first: b""},
        "pickle of zeros": {pickled: bytes(100)},
        "pickle cut": {pickled: members[pickled][: len(members[pickled]) // 2]},
        "pickle is a tensor": {pickled: members[first]},
        "odd version": {name: b"99999" for name in members if name.endswith("/version")},
        "byteorder": {name: b"middle" for name in members if name.endswith("/byteorder")},
    }
    for name, change in changes.items():
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
            for member, content in (members | change).items():
                if content is not None:
                    file.writestr(member, content)
        with about(name), contextlib.suppress(CheckpointError):
            state = load_checkpoint(tmp_path / "x.pth")
            assert name == "odd version" and isinstance(state, dict), name


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\xff\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"],
)
def test_headers_of_safetensors(header, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header)
    with pytest.raises(CheckpointError):
        model_weights(load_checkpoint(path), path)
    tensors = {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}
    text = json.dumps(tensors).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def odd_values(rng: random.Random, value):
    """What may stand in the place of an entry of a checkpoint."""
    odd = [None, [], {}, "text", -1, 2**70, 3.5, math.nan, True, torch.ones(2), torch.tensor(1), [{}], ["x"], (1, 2),
           {"x": torch.ones(1)}, {3: 4}, argparse.Namespace(x=1), {"state": {}, "param_groups": []}]  # fmt: skip
    if isinstance(value, torch.Tensor):
        same = torch.ones(value.shape)
        odd += [value.flatten()[:0], value.flatten(), same.to(torch.int64), same.to(torch.complex64), same.bool(),
                same * math.nan, same * math.inf, same.double() * 1e300, same.to_sparse(), value[None]]  # fmt: skip
    return rng.choice(odd)


def spoil(value, rng: random.Random, depth=0):
    """A copy with one entry, at any depth, gone or replaced. A tensor or a number is replaced itself."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        return value | {key: spoil(value[key], rng, depth + 1)}
    if isinstance(value, list | tuple) and 0 < len(value) < 100 and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return type(value)([*value[:place], spoil(value[place], rng, depth + 1), *value[place + 1 :]])
    return odd_values(rng, value)


class Trained(Exception):
    """A run got as far as training."""


@pytest.fixture
def stop_at_training(monkeypatch):
    """Ends runs after the first epoch; its loss has to be finite."""

    def once(real):
        def train(*args, **kwargs):
            assert math.isfinite(real(*args, **kwargs)["loss"])
            raise Trained

        return train

    for module in (engine_for_pretraining, engine_for_tats, run_class_finetuning):
        monkeypatch.setattr(module, "train_one_epoch", once(module.train_one_epoch))


def refusal_or_training(main, arguments, *words) -> str:
    try:
        return refusal(main, arguments, *words)
    except Trained:
        return ""


@pytest.mark.slow
def test_checkpoints_with_odd_entries_are_refused_or_resumed(shapes, runs, tmp_path, stop_at_training, monkeypatch):
    """Whole files with one entry gone or replaced at any depth, through --resume, --finetune, --eval and pictures."""
    states = {name: load_checkpoint(folder / "checkpoint-0.pth") for name, folder in runs.items()}
    monkeypatch.setattr(run_class_finetuning, "write_report", lambda *args: None)  # takes longer than all the rest
    pretrain = ["--data_path", shapes / "train.csv", *PRETRAIN, *TATS_NOW, "--epochs", 2]
    finetune = ["--data_path", shapes, *FINETUNE, "--epochs", 2]
    uses = [
        ("tats", run_mae_pretraining.main, [*pretrain, "--resume"]),
        ("tats", run_mae_pretraining.main, [*pretrain, "--resume"]),
        ("tats", run_mae_pretraining.main, [*pretrain, "--finetune"]),
        ("tats", run_class_finetuning.main, [*finetune, "--finetune"]),
        ("tats", run_mae_vis.main, ["--videos", "no.mp4", "--output_dir", tmp_path / "pictures", "--model_path"]),
        ("fine", run_class_finetuning.main, [*finetune, "--resume"]),
        ("fine", run_class_finetuning.main, [*finetune, "--resume"]),
        ("fine", run_class_finetuning.main, ["--data_path", shapes, "--device", "cpu", "--num_workers", 0, "--eval",
                                             "--finetune"]),
    ]  # fmt: skip
    refused = 0
    for seed in range(STATES):
        rng = random.Random(seed)
        name, main, arguments = rng.choice(uses)
        path = tmp_path / "odd.pth"
        torch.save(spoil(states[name], rng), path)
        before = path.read_bytes()
        with about(f"seed {seed}: {name} {arguments[-1]}"):
            refused += bool(refusal_or_training(main, [*arguments, path]))
        assert path.read_bytes() == before
    assert STATES / 5 < refused < STATES


RESUMED = ("model", "optimizer", "tats", "tats_optimizer", "scaler", "rng", "epoch", "args")


@pytest.mark.slow
def test_every_entry_of_every_kind(shapes, runs, tmp_path, stop_at_training):
    """Each entry a resume needs, replaced by what it is not: refused by the file's name, whatever it is."""
    good = load_checkpoint(runs["tats"] / "checkpoint-0.pth")
    flags = ["--data_path", shapes / "train.csv", *PRETRAIN, *TATS_NOW, "--epochs", 2, "--resume", tmp_path / "x.pth"]
    for key in RESUMED:
        for value in (None, 3.5, "text", torch.ones(2), [1, 2], [[]], {"x": 1}, argparse.Namespace(x=1)):
            if key == "args" and isinstance(value, dict | argparse.Namespace) or key == "scaler" and value == {"x": 1}:
                continue  # other flags; read with fp16 only
            if key == "rng" and value == [1, 2]:
                continue  # of two processes: a note, and fresh seeds
            with about(f"{key}: {value!r}"):
                torch.save(good | {key: value}, tmp_path / "x.pth")
                assert refusal_or_training(run_mae_pretraining.main, flags, tmp_path / "x.pth")


def first_of(weights: dict) -> str:
    return next(name for name, value in weights.items() if value.ndim == 2)


@pytest.mark.parametrize(
    "spoilt,words",
    [
        (lambda w: w * math.nan, ["1", "finite"]),
        (lambda w: w.double() * 1e300, ["1", "finite"]),
        (lambda w: w.long(), ["torch.int64"]),
        (lambda w: w.to(torch.complex64), ["torch.complex64"]),
        (lambda w: w.to_sparse(), ["torch.sparse_coo"]),
        (lambda w: w.to("meta"), ["meta"]),
        (lambda w: w.tolist(), ["list"]),
        (lambda w: w[:-1], ["(3, 3)", "(4, 3)"]),
    ],
)
def test_weights_of_another_kind(spoilt, words):
    layer = torch.nn.Linear(3, 4)
    before = layer.weight.detach().clone()
    weights = layer.state_dict()
    weights["weight"] = spoilt(weights["weight"] + 1)
    with pytest.raises(CheckpointError, match=naming("x.pth", "weight", *words)):
        load_weights(layer, weights, "x.pth")
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    "table", [torch.ones(4), torch.ones(2, 4, 3), torch.ones(1, 4, 3).long(), torch.ones(1).expand(1, 2**40, 192)]
)
def test_tables_that_are_no_positions(table):
    """The last would take 800 TB once it is computed with."""
    with pytest.raises(CheckpointError, match=naming("x.pth", "pos_embed")):
        encoder_weights({"model": {"encoder.pos_embed": table}}, "x.pth", ("model",))


def test_huggingface_weights_with_a_part_gone():
    weights = {"videomae.encoder.layer.0.attention.attention.query.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match=naming("x.pth", "Hugging Face")):
        model_weights(weights, "x.pth")


@pytest.mark.parametrize("name,value", [
    ("exp_avg", torch.ones(7)), ("exp_avg", torch.full((4, 3), math.nan)), ("exp_avg_sq", "x"), ("exp_avg_sq", None),
    ("step", torch.ones(2)), ("step", torch.tensor(math.inf)),
])  # fmt: skip
def test_moments_that_would_spoil_the_next_step(name, value):
    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    check_moments(optimizer, "x.pth")
    optimizer.state[layer.weight][name] = value
    with pytest.raises(CheckpointError, match=naming("x.pth", "optimizer", name)):
        check_moments(optimizer, "x.pth")
    del optimizer.state[layer.weight][name]
    with pytest.raises(CheckpointError, match=naming("x.pth", "optimizer", *optimizer.state[layer.weight])):
        check_moments(optimizer, "x.pth")
    optimizer.state[layer.weight] = [1]
    with pytest.raises(CheckpointError, match=naming("x.pth", "optimizer", "list")):
        check_moments(optimizer, "x.pth")


@pytest.mark.parametrize("script", ["tats", "fine"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "pipe", "text", "epoch", "args", "hostile"])
def test_a_damaged_newest_checkpoint_is_passed_over(script, damage, shapes, runs, tmp_path, capsys, stop_at_training):
    shutil.copy(runs[script] / "checkpoint-0.pth", tmp_path)
    whole = (tmp_path / "checkpoint-0.pth").read_bytes()
    newest = tmp_path / "checkpoint-1.pth"
    state = load_checkpoint(tmp_path / "checkpoint-0.pth")
    if damage in ("epoch", "args"):
        torch.save(state | {damage: "x"}, newest)
    elif damage == "hostile":
        torch.save(state | {"args": Call(os.mkdir, str(tmp_path / "ran"))}, newest)
    elif damage == "pipe":
        os.mkfifo(newest)
    else:
        newest.write_bytes({"cut": whole[:-500], "zeros": bytes(5000), "empty": b"", "text": b"no checkpoint"}[damage])
    main, flags = {
        "tats": (run_mae_pretraining.main, ["--data_path", f"{shapes}/train.csv", *PRETRAIN, *TATS_NOW]),
        "fine": (run_class_finetuning.main, ["--data_path", str(shapes), *FINETUNE]),
    }[script]
    with pytest.raises(Trained):
        main([*flags, "--epochs", "3", "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert_names(printed, "warning: ", newest)
    assert_names(printed, "resumed", tmp_path / "checkpoint-0.pth")
    assert (tmp_path / "checkpoint-0.pth").read_bytes() == whole and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "flags",
    [["--model_key", ""], ["--model_key", "|"], ["--model_key", "optimizer"], ["--model_prefix", "nowhere."],
     ["--model_key", "args|epoch"]],
)  # fmt: skip
def test_keys_and_prefixes_that_hold_no_weights(flags, shapes, runs, tmp_path):
    path = runs["tats"] / "checkpoint-0.pth"
    arguments = ["--data_path", shapes, *FINETUNE, *flags, "--finetune", path]
    assert refusal(run_class_finetuning.main, arguments, path)
    assert refusal(run_class_finetuning.main, ["--eval", *arguments], path)


def test_what_is_no_checkpoint_file_is_refused(shapes, tmp_path):
    for name, path in special_files(tmp_path).items():
        with about(name):
            assert refusal(run_mae_pretraining.main,
                           ["--data_path", shapes / "train.csv", *PRETRAIN, "--resume", path], path)  # fmt: skip
            assert refusal(run_class_finetuning.main, ["--data_path", shapes, *FINETUNE, "--finetune", path], path)
            if name != "x" * 300:
                link = tmp_path / f"{name.strip('/').replace('/', '_')}.safetensors"
                link.symlink_to(path)
                with pytest.raises(CheckpointError, match=re.escape(str(link))):
                    model_weights(load_checkpoint(link), link)


# --- flags -------------------------------------------------------------------------------------------------------

ODD_NUMBERS = ["-1", "0", "nan", "inf", "-inf", "1e308", "1e-320", str(10**30), "x", "", "1.5.2", "0x10", "9" * 5000]


def numeric_flags(parser):
    for action in parser._actions:
        if action.type in (int, float):
            count = action.nargs if isinstance(action.nargs, int) else 2 if action.nargs == "+" else 1
            yield action.option_strings[0], count


def scripts(shapes):
    return {
        "tats": (run_mae_pretraining, ["--data_path", shapes / "train.csv", *PRETRAIN, *TATS_NOW]),
        "fine": (run_class_finetuning, ["--data_path", shapes, *FINETUNE, "--batch_size", 10]),
    }


@pytest.mark.slow  # a run for each of hundreds of numbers
@pytest.mark.parametrize("script", ["tats", "fine"])
def test_odd_numbers_are_refused_or_trained_with(script, shapes, stop_at_training):
    """Every numeric flag, each value: refused by the flag's name, or an epoch of finite loss."""
    module, usual = scripts(shapes)[script]
    for flag, count in numeric_flags(module.get_parser()):
        for value in ODD_NUMBERS:
            given = [f"{flag}={value}"] if count == 1 else [flag, *[value] * count]
            with about(" ".join(given)[:100]):
                message = refusal_or_training(module.main, [*usual, *given], flag.strip("-"))
                if flag not in ("--world_size", "--local_rank"):  # the launcher decides
                    wrong = value in ("nan", "inf", "-inf", "1e308", str(10**30), "x", "", "1.5.2", "0x10", "9" * 5000)
                    assert message or not wrong


@pytest.mark.parametrize(
    "script,given",
    [
        ("tats", ["--seed", 2**64]),
        ("tats", ["--seed", -(2**63)]),
        ("tats", ["--batch_size", 10**9]),
        ("tats", ["--opt_betas", 0.9, 0.99, 0.999]),
        ("tats", ["--opt_betas", "nan", 0.9]),
        ("tats", ["--tats_eps", 0]),  # 0 / 0 in the first step
        ("tats", ["--max_short_side", 1]),
        ("tats", ["--start_epoch", 1]),  # there was nothing to do, and that was a success
        ("tats", ["--decoder_depth", 100_000]),
        ("tats", ["--tats_blocks", 100_000]),
        ("tats", ["--ppo_epochs", 100_000]),
        ("tats", ["--num_workers", 100_000]),
        ("tats", ["--input_size", 1_000_000]),
        ("tats", ["--num_frames", 1_000_000]),
        ("tats", ["--weight_decay_end", -1]),
        ("tats", ["--momentum", 1]),
        ("tats", ["--clip_grad", "inf"]),
        ("tats", ["--log_dir", "LIST"]),
        ("tats", ["--output_dir", "LIST"]),
        ("tats", ["--opt", ""]),
        ("tats", ["--model", ""]),
        ("tats", ["--data_path", ""]),
        ("fine", ["--test_num_segment", 100_000]),
        ("fine", ["--test_num_crop", 100_000]),
        ("fine", ["--nb_classes", 1_000_000]),
        ("fine", ["--short_side_size", 1_000_000]),
        ("fine", ["--crop_pct", 1e-320]),
        ("fine", ["--crop_scale", 0.5, 0.1]),
        ("fine", ["--cutmix_minmax", "nan", "nan"]),
        ("fine", ["--aa", "rand-m1e400"]),
        ("fine", ["--aa", "\0"]),
        ("fine", ["--eval_data_path", "LIST/x"]),
    ],
)
def test_nonsense_is_refused(script, given, shapes, tmp_path, stop_at_training):
    module, usual = scripts(shapes)[script]
    listed = {"LIST": shapes / "train.csv", "LIST/x": shapes / "train.csv" / "x"}
    given = [listed.get(value, value) for value in given]
    word = given[1] if given[0] in ("--eval_data_path", "--data_path") else given[0].strip("-")
    assert refusal(module.main, [*usual, *given], word)


def test_weights_that_are_not_finite_get_into_no_checkpoint(shapes, tmp_path, monkeypatch):
    """A run with such weights ended well, since its loss was not finite and so did not count."""

    def diverge(module, real):
        def train(backend, *args, **kwargs):
            stats = real(backend, *args, **kwargs)
            next(backend.unwrapped.parameters()).data.fill_(math.nan)
            return stats

        monkeypatch.setattr(module, "train_one_epoch", train)

    diverge(engine_for_pretraining, engine_for_pretraining.train_one_epoch)
    diverge(run_class_finetuning, run_class_finetuning.train_one_epoch)
    for script, flags in (
        ("tats", ["--mask_type", "tube"]),
        ("fine", []),
        ("fine", ["--disable_eval_during_finetuning"]),
    ):
        module, usual = scripts(shapes)[script]
        folder = tmp_path / script
        assert refusal(module.main, [*usual, *flags, "--output_dir", folder], "finite", "--lr")
        assert not list(folder.glob("*.pth"))


# --- tools -------------------------------------------------------------------------------------------------------

ANNOTATED = {
    "UCF101": {
        "classInd.txt": "1 A\n2 B\n",
        "trainlist01.txt": "A/a.avi 1\nB/b.avi 2\n",
        "testlist01.txt": "A/c.avi\n",
    },
    "HMDB51": {"run_test_split1.txt": "a.avi 1\nb.avi 2\n", "sit_test_split1.txt": "c.avi 1\n"},
    "SSV2": {
        "labels.json": '{"A": "0", "B": "1"}',
        "train.json": '[{"id": "1", "template": "[A]"}, {"id": "2", "template": "B"}]',
        "validation.json": '[{"id": "3", "template": "B"}]',
    },
    "Kinetics-400": {
        "train.csv": 'label,youtube_id,time_start,time_end,split\n"a b",x,1,11,train\nc,y,2,12,train\n',
        "val.csv": "label,youtube_id,time_start,time_end,split\nc,z,3,13,val\n",
    },
    "Diving48": {
        "Diving48_vocab.json": '[["Back", "Free"], ["Inward", "Pike"]]',
        "Diving48_V2_train.json": '[{"vid_name": "a", "label": 1}, {"vid_name": "b", "label": 0}]',
        "Diving48_V2_test.json": '[{"vid_name": "c", "label": 1, "start_frame": 0, "end_frame": 9}]',
    },
    "EPIC-100-verb": {
        "EPIC_100_verb_classes.csv": "id,key,instances\n0,take,\"['get', 'take']\"\n1,put,['put']\n",
        "EPIC_100_train.csv": "narration_id,verb_class\na,1\nb,0\n",
    },
}


def write_annotations(folder: Path, files: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_damaged_annotations_are_read_or_refused(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a.avi", "b.avi", "c.avi", "1.webm", "2.webm", "3.webm", "x.mp4", "y.mp4", "z.mp4"):
        (videos / name).touch()
    refused = 0
    for data_set, files in ANNOTATED.items():
        usual = ["--data_set", data_set, "--annotations", tmp_path / "annotations", "--videos", videos, "--output",
                 tmp_path / "out", "--missing", "keep"]  # fmt: skip
        write_annotations(tmp_path / "annotations", files)
        assert not refusal(make_lists.main, usual)
        for seed in range(ANNOTATIONS):
            rng = random.Random(seed)
            name = rng.choice(list(files))
            content = bytearray(damaged(files[name].encode(), rng))
            at = rng.randrange(len(content) + 1)
            content[at:at] = rng.choice([b"", *ODD_TEXTS])
            write_annotations(tmp_path / "annotations", files | {name: bytes(content)})
            with about(f"{data_set}, seed {seed}"):
                refused += bool(refusal(make_lists.main, usual))
    assert ANNOTATIONS < refused < len(ANNOTATED) * ANNOTATIONS


@pytest.mark.parametrize(
    "data_set,name,content",
    [
        ("SSV2", "train.json", "[" * 200_000),
        ("SSV2", "labels.json", '{"A": ' + "1" * 5000 + "}"),
        ("SSV2", "labels.json", '{"A": "' + "1" * 5000 + '"}'),
        ("SSV2", "labels.json", '{"A": "\u0661"}'),
        ("SSV2", "train.json", '[{"id": "1", "template": null}]'),
        ("SSV2", "train.json", '[{"id": {"x": 1}, "template": "A"}]'),
        ("SSV2", "train.json", "[null, 3]"),
        ("UCF101", "classInd.txt", "9" * 5000 + " A\n"),
        ("UCF101", "trainlist01.txt", "A/a.avi " + "9" * 5000 + "\n"),
        ("Kinetics-400", "train.csv", "label,youtube_id,time_start,time_end\n" + "x" * 200_000 + ",y,1,2\n"),
        ("Kinetics-400", "train.csv", 'label,youtube_id,time_start,time_end\n"c,y,1,2\n'),
        ("Kinetics-400", "train.csv", "label,youtube_id,time_start,time_end\nc,y\0,1,2\n"),
        ("HMDB51", "run_test_split1.txt", "a\0.avi 1\n"),
        ("Diving48", "Diving48_V2_train.json", "[null, 3]"),
        ("Diving48", "Diving48_V2_train.json", '[{"vid_name": "a", "label": true}]'),
        ("EPIC-100-verb", "EPIC_100_train.csv", "narration_id,verb_class\na\n"),
        ("UCF101", "classInd.txt", None),
    ],
)
def test_annotations_that_were_a_traceback_or_waited_for(data_set, name, content, tmp_path):
    """None: a pipe."""
    files = ANNOTATED[data_set] | {name: content or ""}
    write_annotations(tmp_path / "annotations", files)
    if content is None:
        (tmp_path / "annotations" / name).unlink()
        os.mkfifo(tmp_path / "annotations" / name)
    usual = ["--data_set", data_set, "--annotations", tmp_path / "annotations", "--videos", tmp_path, "--output",
             tmp_path / "out", "--missing", "keep"]  # fmt: skip
    assert refusal(make_lists.main, usual)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("train*.csv"))


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e308", "x", ""])
@pytest.mark.parametrize(
    "tool,flag",
    [(check_videos, "--timeout"), (check_videos, "--num_workers"), (resize_videos, "--timeout"),
     (resize_videos, "--num_workers"), (resize_videos, "--gop"), (resize_videos, "--crf"),
     (resize_videos, "--short_side"), (make_subset, "--fraction"), (make_subset, "--count")],
)  # fmt: skip
def test_odd_numbers_of_the_tools(tool, flag, value, shapes, tmp_path):
    if (flag, value) == ("--crf", "0"):
        return  # lossless
    output = tmp_path / ("out.csv" if tool is make_subset else "out")
    arguments = ["--list", shapes / "train.csv", "--output", output, f"{flag}={value}"]
    assert refusal(tool.main, arguments, flag.strip("-"))


def test_damaged_lists_through_the_tools(shapes, tmp_path):
    good = (shapes / "train.csv").read_bytes()
    for seed in range(30):
        rng = random.Random(seed)
        path = tmp_path / "list.csv"
        content = damaged(good, rng)
        path.write_bytes(content)
        with about(f"seed {seed}"):
            refusal(make_subset.main, ["--list", path, "--output", tmp_path / "subset.csv", "--fraction", "0.5"])
            for tool in (check_videos, resize_videos):
                if seed % 15 == 0:
                    refusal(tool.main, ["--list", path, "--output", tmp_path / "checked", "--num_workers", 1])
            assert path.read_bytes() == content
    assert (shapes / "train.csv").read_bytes() == good


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"[]", b"{}"])
def test_settings_of_another_program_are_not_overwritten(content, shapes, tmp_path):
    (tmp_path / "settings.json").write_bytes(content)
    message = refusal(resize_videos.main, ["--list", shapes / "train.csv", "--output", tmp_path])
    assert "settings.json" in message and (tmp_path / "settings.json").read_bytes() == content
