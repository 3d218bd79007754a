"""Files as cameras, broadcasts and broken downloads leave them. Training, --eval, check_videos and resize_videos agree
on their length and fate; the reference is a plain decode that continues after damage, as players and FFmpeg do."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import decoding
from datasets.decoding import VideoError, open_video, read_frames
from datasets.video import EvalVideoDataset, TrainVideoDataset, clip_indices
from tests.conftest import SHARED
from tests.helpers.clips import BACK_ENDS, hide_frames, open_av
from tests.helpers.runs import assert_names, naming
from tools import check_videos
from tools.common import VIDEO_SUFFIXES
from tools.resize_videos import resize_video

av = pytest.importorskip("av")
from tests.helpers.video_files import (  # noqa: E402
    MATRICES,
    encode,
    moving,
    noise,
    packets_of,
    rewrite,
    set_matrix,
    with_packet,
    write_cover,
    write_fields,
    write_hidden,
    write_two_sizes,
)

ROOT = Path(__file__).parents[2]
CASES = SHARED.parent / "cases"
FRAMES = 50
H264 = dict(bf=3, g=12)
X265 = {"g": 12, "preset": "ultrafast", "x265-params": "log-level=none:bframes=3"}
SOURCES = {  # name: encoder, options, format of a pixel
    "h264.mp4": ("libx264", H264, "yuv420p"),
    "h264.mkv": ("libx264", H264, "yuv420p"),
    "h264.ts": ("libx264", H264, "yuv420p"),
    "h264.m2ts": ("libx264", H264, "yuv420p"),
    "h264.mov": ("libx264", H264, "yuv444p"),
    "ten.mp4": ("libx264", H264, "yuv420p10le"),
    "open.ts": ("libx264", {**H264, "x264-params": "open-gop=1"}, "yuv420p"),
    "interlaced.mts": ("libx264", {**H264, "flags": "+ildct+ilme", "x264-params": "tff=1"}, "yuv420p"),
    "hevc.mp4": ("libx265", X265, "yuv420p"),
    "hevc.ts": ("libx265", X265, "yuv420p"),
    "vp8.webm": ("libvpx", dict(g=20), "yuv420p"),
    "vp9.webm": ("libvpx-vp9", {"g": 20, "cpu-used": 8}, "yuv420p"),
    "alpha.webm": ("libvpx-vp9", {"g": 20, "cpu-used": 8}, "yuva420p"),
    "av1.mp4": ("libsvtav1", dict(g=20, preset=12), "yuv420p"),
    "mpeg2.vob": ("mpeg2video", dict(g=12, bf=2, b="2M"), "yuv420p"),
    "mpeg2.mpg": ("mpeg2video", dict(g=12, bf=2, b="2M"), "yuv420p"),
    "xvid.avi": ("mpeg4", dict(g=12, b="900k"), "yuv420p"),
    "xvid_b.avi": ("mpeg4", dict(g=12, bf=2, b="900k"), "yuv420p"),
    "mjpeg.avi": ("mjpeg", {}, "yuvj420p"),
    "wmv.wmv": ("wmv2", dict(g=12, b="900k"), "yuv420p"),
    "wmv.asf": ("msmpeg4", dict(g=12, b="900k"), "yuv420p"),
    "flash.flv": ("flv", dict(g=12, b="900k"), "yuv420p"),
    "picture.gif": ("gif", {}, "rgb8"),
    "lossless.mkv": ("ffv1", {}, "yuv420p"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: path} of every kind; `expected` knows the lengths."""
    folder, clip = tmp_path_factory.mktemp("files"), moving(FRAMES, 96, 128)
    made = {}
    for name, (codec, options, pixels) in SOURCES.items():
        if codec in av.codec.codecs_available:
            made[name] = folder / name
            encode(made[name], clip, codec, options, pixels)

    def make(name, write, *arguments):
        made[name] = folder / name
        write(*arguments[:1], made[name], *arguments[1:])

    mp4, ts = made["h264.mp4"], made["h264.ts"]
    make("fields.h264", lambda _, path: write_fields(path), None)
    make("hidden.webm", write_hidden, made["vp8.webm"])
    make("cover.mp4", lambda _, path: write_cover(path), None)
    make("edit list.mp4", lambda *paths: hide_frames(*map(str, paths), 7), mp4)
    make("one.mp4", lambda *paths: rewrite(*paths, packets_of(mp4)[:1]), mp4)
    make("odd size.webm", lambda _, path: encode(path, clip[:, :95, :127], "libvpx-vp9", {"cpu-used": 8}), None)
    make("odd size.avi", lambda _, path: encode(path, clip[:, :95, :127], "mjpeg", {}, "yuvj444p"), None)
    packets = packets_of(made["h264.mkv"])
    same = [(data, 40 * (pts // 80), None, key) for data, pts, _, key in packets]
    make("times twice.mkv", rewrite, made["h264.mkv"], same)
    make("late.mkv", rewrite, mp4, packets_of(mp4)[5:])  # begins between two key frames
    data = ts.read_bytes()
    make("late.ts", lambda _, path: path.write_bytes(data[188 * 60 :]), None)
    data = made["open.ts"].read_bytes()
    make("late open.ts", lambda _, path: path.write_bytes(data[188 * 120 :]), None)
    make("dropped.mp4", with_packet, mp4, 14, lambda data: None)
    for name in ("h264.mp4", "h264.mkv", "ten.mp4", "xvid.avi", "xvid_b.avi", "mjpeg.avi", "vp8.webm"):
        make(f"zeros {name}", with_packet, made[name], 20, lambda data: bytes(len(data)))
        make(f"noise {name}", with_packet, made[name], 17, lambda data: noise(data))
        make(f"noise inside {name}", with_packet, made[name], 17, lambda data: noise(data, 0.4, 0.6))
    make("zeros key h264.mp4", with_packet, mp4, 12, lambda data: bytes(len(data)))
    for name in ("h264.ts", "mpeg2.mpg", "h264.mkv", "vp8.webm", "mjpeg.avi", "wmv.wmv", "flash.flv", "lossless.mkv"):
        data = made[name].read_bytes()
        make(f"cut {name}", lambda _, path, data=data: path.write_bytes(data[: len(data) * 5 // 8]), None)
        place = len(data) // 2
        torn = data[:place] + bytes(700) + data[place + 700 :]
        make(f"torn {name}", lambda _, path, torn=torn: path.write_bytes(torn), None)
    fast = folder / "at the head.mp4"
    with av.open(str(mp4)) as old, av.open(str(fast), "w", options=dict(movflags="faststart")) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    data = fast.read_bytes()
    make("half.mp4", lambda _, path: path.write_bytes(data[: len(data) // 2]), None)
    return made


KINDS = [
    *SOURCES, "fields.h264", "hidden.webm", "cover.mp4", "edit list.mp4", "one.mp4", "odd size.webm", "odd size.avi",
    "times twice.mkv", "late.mkv", "late.ts", "late open.ts", "dropped.mp4", "zeros key h264.mp4", "half.mp4",
    *(f"{kind} {name}" for kind in ("zeros", "noise", "noise inside")
      for name in ("h264.mp4", "h264.mkv", "ten.mp4", "xvid.avi", "xvid_b.avi", "mjpeg.avi", "vp8.webm")),
    *(f"{kind} {name}" for kind in ("cut", "torn") for name in (
        "h264.ts", "mpeg2.mpg", "h264.mkv", "vp8.webm", "mjpeg.avi", "wmv.wmv", "flash.flv", "lossless.mkv")),
]  # fmt: skip
# Frames that a player shows, where they can be counted by hand.
EXPECTED = {name: FRAMES for name in SOURCES} | {
    "fields.h264": 30, "hidden.webm": FRAMES, "cover.mp4": 30, "edit list.mp4": FRAMES - 7, "one.mp4": 1,
    "odd size.webm": FRAMES, "odd size.avi": FRAMES, "times twice.mkv": FRAMES, "late.mkv": FRAMES - 12,
    "dropped.mp4": FRAMES - 1, "zeros h264.mp4": FRAMES - 1, "noise h264.mp4": FRAMES - 1,
    "zeros mjpeg.avi": FRAMES - 1, "noise mjpeg.avi": FRAMES - 1, "noise xvid.avi": FRAMES - 1,
}  # fmt: skip


def given(files, name):
    if name not in files:
        pytest.skip(f"no encoder for {name}")
    return str(files[name])


def shown(path):
    """All frames, uint8 [n, H, W, 3], by feeding the decoder packet after packet; and how many it refused."""
    frames, refused = [], 0
    with open_av(path) as container:
        stream = next(stream for stream in container.streams.video if not stream.disposition & 1024)
        stream.thread_count = 1  # with several, frames that wait are lost at an error
        packets = [packet for packet in container.demux(stream) if packet.size]
        for packet in (*packets, None):
            try:
                new = stream.codec_context.decode(packet)
            except av.FFmpegError:
                refused += 1
                continue
            for frame in new:  # not what is so damaged that its size is made up
                if not (frames and frame.is_corrupt and frame.height != frames[0].height):
                    frames.append(frame)
    return [frame.to_ndarray(format="rgb24") for frame in frames], refused


def everything(path, decoder="auto"):
    return read_frames(str(path), range, decoder)


# ------------------------------------------------------------------------------------- one length and one fate (F1, F2)


@pytest.mark.parametrize("name", KINDS)
def test_all_agree_on_the_length(files, name, tmp_path):
    path = given(files, name)
    frames, refused = shown(path)
    assert len(frames) == EXPECTED.get(name, len(frames))
    clip = everything(path)
    assert len(clip) == len(frames)
    found = check_videos.check_video(path, "auto")
    assert (found["decoded"], found["decoder"]) == (len(frames), "pyav")
    assert (found["height"], found["width"]) == clip.shape[1:3]
    assert found["errors"] >= refused
    if "inside" not in name and name not in ("zeros vp8.webm", "noise vp8.webm", "noise h264.mkv", "zeros h264.mkv"):
        assert found["frames"] == len(frames)  # the damage shows in a packet's header
    resize_video(path, str(tmp_path / "new.mp4"), 48, 8, 20)
    assert len(shown(tmp_path / "new.mp4")[0]) == len(frames)
    (tmp_path / "list.csv").write_text(f"{path} 0\n")
    lengths, whole = set(), TrainVideoDataset(tmp_path / "list.csv", len(frames), 1, lambda clip, rng: clip)[0, 3]
    assert whole["failed"] == [] and torch.equal(whole["video"][0].permute(0, 2, 3, 1), clip)
    views = EvalVideoDataset(tmp_path / "list.csv", len(frames), 1, lambda frames: frames[None], 1)[0]
    assert views["failed"] == [] and torch.equal(views["video"][0].permute(0, 2, 3, 1), clip)
    for seed in range(20):  # whatever a clip meets: it ends inside the video

        def choose(length, rng=random.Random(seed)):  # noqa: B008
            lengths.add(length)
            return clip_indices(length, 8, 2, rng)

        assert read_frames(path, choose).shape == (8, *clip.shape[1:])
    assert max(lengths) <= found["frames"] and min(lengths) >= len(frames)


UNDAMAGED = [name for name in KINDS if not name.startswith(("zeros", "noise", "cut", "torn", "half"))]


@pytest.mark.parametrize("name", UNDAMAGED)
def test_no_clip_stands_still_and_all_are_exact(files, name):
    """Every frame of the source differs from its neighbours."""
    path = given(files, name)
    frames, _ = shown(path)
    assert all(not np.array_equal(a, b) for a, b in zip(frames, frames[1:], strict=False))
    rng = random.Random(1)
    for _ in range(10):
        indices = sorted(rng.sample(range(len(frames)), min(4, len(frames))))
        got = read_frames(path, lambda length, indices=indices: indices, "pyav").numpy()
        assert np.array_equal(got, [frames[i] for i in indices])
    for seed in range(20):  # as training draws
        rng, drawn = random.Random(seed), []

        def choose(length, rng=rng, drawn=drawn):
            drawn[:] = clip_indices(length, 4, 2, rng)
            return drawn

        got = read_frames(path, choose).numpy()
        assert max(drawn) < len(frames) and np.array_equal(got, [frames[i] for i in drawn])


@pytest.mark.parametrize("name", UNDAMAGED)
def test_decord_gives_what_pyav_gives(files, name):
    pytest.importorskip("decord")
    path = given(files, name)
    try:
        got = everything(path, "decord").numpy()
    except VideoError as error:
        assert name == "av1.mp4" and "decord" in str(error)  # its FFmpeg is older than AV1
        return
    frames = everything(path, "pyav").numpy()
    assert got.shape == frames.shape and np.abs(got.astype(int) - frames).max() <= 2
    for index in (0, len(frames) // 2):
        one = read_frames(path, lambda length, index=index: [index], "decord").numpy()
        assert np.abs(one[0].astype(int) - frames[index]).max() <= 2


def test_fields_are_counted_once(files):
    """Grey values as they were written: 40 + 5 n in the first field of frame n, two more in the second."""
    path = given(files, "fields.h264")
    assert len(packets_of(path)) == 60
    grey = everything(path).float().mean((2, 3))  # [30, 32]
    written = 40 + 5 * torch.arange(30.0)[:, None] + 2 * (torch.arange(32) % 2)
    assert (grey - (written - 16) * 255 / 219).abs().max() < 1.5


def test_decord_is_asked_only_where_pyav_cannot_read(files, monkeypatch):
    asked = []
    monkeypatch.setattr(decoding, "open_with_decord", asked.append)
    for name in ("fields.h264", "late.ts", "hidden.webm", "noise h264.mkv", "cut h264.ts"):
        everything(given(files, name))
    assert not asked


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((96, 128, 4), np.uint8), np.zeros((96, 128), np.uint8), np.zeros((96, 128, 3), np.float32),
        np.zeros((96, 128, 1), np.uint8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_what_a_back_end_returns_is_checked(files, frame, decoder, monkeypatch):
    monkeypatch.setattr(decoding.DECODERS[decoder], "fetch", lambda self, wanted, limit: dict.fromkeys(wanted, frame))
    with pytest.raises(VideoError, match=naming("h264.mp4", str(frame.dtype), str(frame.shape))):
        read_frames(given(files, "h264.mp4"), lambda length: [0, 1], decoder)


def test_a_change_of_size_is_refused_by_all(tmp_path):
    """Also by a clip that lies in one of the parts."""
    write_two_sizes(tmp_path / "two.webm")
    path = str(tmp_path / "two.webm")
    for decoder in ("auto", "pyav"):
        for indices in ([0, 1], [40, 41], [20, 30]):
            with pytest.raises(VideoError, match=naming("two.webm", "size")):
                read_frames(path, lambda length, indices=indices: indices, decoder)
    uses = [lambda: check_videos.check_video(path, "auto"), lambda: resize_video(path, f"{path}.mp4", 48, 8, 20)]
    for use in (*uses, lambda: list(decoding.PyAVReader(path).decode_all())):
        with pytest.raises(VideoError, match=naming("two.webm", "size")):
            use()


# -------------------------------------------------------------------------------------------------------- damage (F3)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith(("zeros", "noise", "cut", "torn", "half"))])
def test_reading_goes_on_behind_damage(files, name):
    path = given(files, name)
    if name.startswith(("zeros", "noise", "torn")):
        assert len(everything(path)) > FRAMES * 0.6
    assert check_videos.check_video(path, "pyav")["decoded"] > 20


def test_errors_are_counted_and_reported(files, tmp_path, capsys):
    names = ["h264.mp4", "zeros h264.mp4", "noise inside h264.mp4", "half.mp4", "zeros mjpeg.avi"]
    names += ["torn h264.ts", "dropped.mp4"]
    (tmp_path / "l.csv").write_text("".join(f"{files[name]} 0\n" for name in names))
    check_videos.main(["--list", str(tmp_path / "l.csv"), "--output", str(tmp_path), "--num_workers", "1"])
    head, *lines = (tmp_path / "l.report.csv").read_text().splitlines()
    assert "errors" in head.split(",")
    rows = [dict(zip(head.split(","), line.split(","), strict=True)) for line in lines]
    assert [row["status"] for row in rows] == ["ok"] * 7
    assert [row["decoded"] for row in rows[:3]] == ["50", "49", "50"] and rows[4]["decoded"] == "49"
    assert rows[0]["errors"] == "0" and rows[0]["reason"] == ""
    assert all(int(rows[i]["errors"]) > 0 for i in (1, 2, 4, 5, 6))
    assert "header" in rows[3]["reason"]
    assert_names(capsys.readouterr().out, 6, "damaged")


READ_ALL = """
import hashlib, json, sys
from datasets.decoding import VideoError, read_frames
from datasets.video import TrainVideoDataset
import random
found = {}
for number, path in enumerate(sys.argv[3:]):
    with open(sys.argv[1] + ".list", "w") as listing:
        listing.write(f"{path} 0\\n")
    data = TrainVideoDataset(sys.argv[1] + ".list", 6, 2, lambda clip, rng: clip, 2, sys.argv[2], max_retries=1)
    found[path] = []
    for seed in range(2):
        try:
            found[path].append(hashlib.sha256(data[0, seed]["video"].numpy().tobytes()).hexdigest())
        except VideoError as error:
            found[path].append(str(error).replace(sys.argv[1], ""))
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("decoder", ["auto"])
def test_two_runs_give_the_same_bytes(files, decoder, tmp_path):
    """In processes that fill fresh memory with different bytes, and that read the files in another order."""
    paths = [str(path) for name, path in files.items() if name not in UNDAMAGED]
    found = []
    for number, (fill, order) in enumerate([(0, paths), (85, random.Random(1).sample(paths, len(paths)))]):
        environment = os.environ | dict(MALLOC_PERTURB_=str(fill), OMP_NUM_THREADS="1")
        command = [sys.executable, "-c", READ_ALL, str(tmp_path / f"run{number}"), decoder, *order]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found.append(json.loads((tmp_path / f"run{number}").read_text()))
    assert not [path for path in paths if found[0][path] != found[1][path]]


def test_what_was_read_before_does_not_matter(files):
    """A length that a process has had to decode for is remembered, and changes no draw."""

    def draw(path, seed):
        rng, lengths = random.Random(seed), []

        def choose(length):
            lengths.append(length)
            return clip_indices(length, 4, 3, rng)

        return hashlib.sha256(read_frames(path, choose, "pyav").numpy().tobytes()).hexdigest(), lengths

    for name in ("noise vp8.webm", "fields.h264", "noise h264.mp4", "late.ts"):
        path = str(files[name])
        decoding.PyAVReader.decoded.clear()
        first = [draw(path, seed) for seed in range(6)]
        assert [draw(path, seed) for seed in reversed(range(6))] == first[::-1]


def test_a_clip_that_meets_an_unseen_end_is_drawn_again(files):
    """The header of a VP8 frame stands, its content is noise: only decoding finds a frame fewer."""
    path, lengths = str(files["noise inside xvid.avi"]), []
    with open_video(path, "pyav") as reader:
        reader.length += 30  # as if its headers had claimed them

        def choose(length):
            lengths.append(length)
            return [length - 2, length - 1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "by_times", lambda *_: None)
            got = reader.read(choose).numpy()
    frames, _ = shown(path)
    assert lengths == [len(frames) + 30, len(frames)] and np.array_equal(got, frames[-2:])


# ------------------------------------------------------------------------------------------------- cover pictures (F4)


def test_a_cover_picture_is_not_the_video(files, tmp_path):
    clip = everything(files["cover.mp4"])
    assert clip.shape == (30, 96, 128, 3) and len({frame.numpy().tobytes() for frame in clip}) == 30
    write_cover(tmp_path / "song.mp4", video=False)
    for decoder in ["auto", "pyav", *(["decord"] if decoding._imports("decord") else [])]:
        with pytest.raises(VideoError, match=naming("song.mp4", "cover")):
            read_frames(str(tmp_path / "song.mp4"), lambda length: [0], decoder)
    with pytest.raises(VideoError, match=naming("song.mp4", "cover")):
        check_videos.check_video(str(tmp_path / "song.mp4"), "auto")


# ----------------------------------------------------------------------------------------------------- large files (F7)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts", "vp9.webm", "xvid.avi", "mjpeg.avi", "hevc.mp4"])
def test_large_files_are_read_by_seeking(files, name, monkeypatch):
    """Packets sent to the decoder for one frame: not more at the end of the file than at its beginning."""
    path = given(files, name)
    frames, _ = shown(path)
    monkeypatch.setattr(decoding.PyAVReader, "max_kept", 1000)
    sent, counts = [0], []
    monkeypatch.setattr(decoding.PyAVReader, "plain", lambda self: pytest.fail("decoded from the start"))
    found_again = decoding.PyAVReader.found_again

    def count(self, first, last):
        sent[0] += last + 1 - first
        return found_again(self, first, last)

    monkeypatch.setattr(decoding.PyAVReader, "found_again", count)
    for index in (11, 49, 30, 48, 0):
        sent[0] = 0
        got = read_frames(path, lambda length, index=index: [index], "pyav").numpy()
        assert np.array_equal(got[0], frames[index])
        counts.append(sent[0])
    assert 0 < max(counts) <= 24  # 20 from key frame to key frame at most
    got = read_frames(path, lambda length: [3, 20, 47, 20], "pyav").numpy()
    assert np.array_equal(got, [frames[i] for i in (3, 20, 47, 20)])
    with open_video(path, "pyav") as reader:
        assert not any(isinstance(packet, av.Packet) for packet in reader.packets)


def test_large_files_that_seek_wrongly_are_decoded_from_the_start(files, monkeypatch):
    path = str(files["h264.ts"])
    frames, _ = shown(path)
    monkeypatch.setattr(decoding.PyAVReader, "max_kept", 1000)

    def lost(self, first, last):
        raise decoding.Doubt

    monkeypatch.setattr(decoding.PyAVReader, "found_again", lost)
    assert np.array_equal(read_frames(path, lambda length: [30, 4], "pyav").numpy(), [frames[30], frames[4]])


# -------------------------------------------------------------------------------------------------------- mirrors (F8)


def as_shown(image, matrix):
    """Pixel by pixel: x' = a x + c y, y' = b x + d y, moved into the picture (ISO 14496-12)."""
    a, b, c, d = matrix
    height, width = image.shape[:2]
    places = {(a * x + c * y, b * x + d * y): (y, x) for y in range(height) for x in range(width)}
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    size = (width, height) if a == 0 else (height, width)
    result = np.empty((*size, image.shape[2]), image.dtype)
    for (x, y), source in places.items():
        result[y - top, x - left] = image[source]
    return result


@pytest.mark.parametrize("decoder", BACK_ENDS)
@pytest.mark.parametrize("name", MATRICES)
def test_the_whole_display_matrix_is_applied(files, name, decoder, tmp_path):
    set_matrix(files["h264.mp4"], tmp_path / "x.mp4", MATRICES[name])
    frames, _ = shown(files["h264.mp4"])
    expected = as_shown(frames[3], MATRICES[name])
    got = read_frames(str(tmp_path / "x.mp4"), lambda length: [3], decoder)[0].numpy()
    assert got.shape == expected.shape and np.abs(got.astype(int) - expected).max() <= (2 if decoder == "decord" else 0)
    if decoder == "pyav":
        found = check_videos.check_video(str(tmp_path / "x.mp4"), "pyav")
        assert (found["height"], found["width"]) == expected.shape[:2]
        resize_video(str(tmp_path / "x.mp4"), str(tmp_path / "y.mp4"), 96, 8, 4)
        new = everything(tmp_path / "y.mp4")[3].numpy()
        assert (
            new.shape == expected.shape and np.abs(new.astype(int) - expected).mean() < 8
        )  # colours are coded at half size


def test_frames_go_back_to_the_decoder_at_once(files):
    """A frame asked for its side data waits for Python's garbage collection; what a damaged picture then lacks would
    come from another old picture in every run."""
    import gc

    gc.collect()
    gc.disable()
    try:
        everything(files["h264.mp4"])
        left = [thing for thing in gc.get_objects() if isinstance(thing, av.VideoFrame) and thing.width > 8]
        assert not left
    finally:
        gc.enable()


# ----------------------------------------------------------------------------------------------- back ends that fail


def test_pyav_without_metadata_errors(files, monkeypatch):
    """As from PyAV 19 on."""
    opened, real = [], av.open

    def open_19(file, mode=None, *, options=None):
        opened.append(file)
        return real(file)

    monkeypatch.setattr(av, "open", open_19)
    assert len(everything(files["h264.mp4"], "pyav")) == FRAMES and opened


@pytest.mark.parametrize("error", [TypeError("open() got 7\nlines"), AttributeError("no streams"), KeyError("x")])
@pytest.mark.parametrize("where", ["open", "read"])
def test_a_back_end_that_fails_unforeseen_is_one_line(files, error, where, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(*((av, "open") if where == "open" else (decoding.PyAVReader, "by_times")), fail)
    path = str(files["h264.mp4"])
    with pytest.raises(VideoError) as caught:
        read_frames(path, lambda length: [0], "pyav")
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert_names(message, f"av {av.__version__}", type(error).__name__)
    (tmp_path / "list.csv").write_text(f"{path} 0\n{path} 1\n")
    with pytest.raises(VideoError, match=naming("list.csv", 10, f"av {av.__version__}")):
        TrainVideoDataset(tmp_path / "list.csv", 4, 2, lambda clip, rng: clip, decoder="pyav")[0, 1]
    if decoding._imports("decord"):  # "auto" has another
        assert len(everything(path)) == FRAMES


def test_a_mistake_of_the_caller_is_not_the_back_ends(files):
    with pytest.raises(ZeroDivisionError):
        read_frames(str(files["h264.mp4"]), lambda length: [1 // 0])


# ----------------------------------------------------------------------------------------------- names and folders


def test_suffixes_that_are_videos():
    assert {".ts", ".mts", ".m2ts", ".vob", ".ogv", ".gif", ".asf", ".mp4", ".avi"} <= set(VIDEO_SUFFIXES)


def test_a_folder_of_frames_is_named_for_what_it_is(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/00001.jpg").touch()
    with pytest.raises(VideoError, match=naming(tmp_path / "frames", "folder", "ffmpeg -framerate")):
        read_frames(str(tmp_path / "frames"), range)
    with pytest.raises(VideoError, match=naming(tmp_path / "nowhere")):
        read_frames(str(tmp_path / "nowhere"), range)


# ----------------------------------------------------------------------------------------- files beside the checkout

# What `ffmpeg -i FILE -vframes 1 out.png` shows in the corners: top left, top right, bottom left, bottom right.
CORNERS = {
    "hflip.mp4": [[0, 255, 255], [36, 0, 73], [0, 255, 255], [253, 0, 0]],
    "transpose.mp4": [[36, 0, 73], [253, 0, 0], [0, 255, 255], [0, 255, 255]],
}


@pytest.fixture(scope="module")
def cases():
    if not CASES.is_dir():
        pytest.skip("the small inputs (../shared/cases) are not here")
    return CASES


@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_cases(cases, decoder):
    base, full = everything(cases / "base.mp4", "pyav").numpy(), everything(cases / "full.ts", decoder).numpy()
    assert len(base) == 100 and np.array_equal(full, shown(cases / "full.ts")[0])  # index 0 is the first frame
    assert np.abs(everything(cases / "cover_udta_first.mp4", decoder).numpy().astype(int) - base).max() <= 2
    hidden = everything(cases / "vp8_altref2.webm", decoder).numpy()
    assert len(hidden) == 100 and all((a != b).any() for a, b in zip(hidden, hidden[1:], strict=False))
    for name, matrix in (("hflip.mp4", "mirrored"), ("transpose.mp4", "transposed")):
        got = everything(cases / name, decoder)[0].numpy()
        assert np.abs(got.astype(int) - as_shown(base[0], MATRICES[matrix])).max() <= 2
        corners = [got[y, x].astype(int) for y in (2, -3) for x in (2, -3)]
        assert np.abs(np.array(corners) - CORNERS[name]).max() <= 4, corners
    for name, word in (("audio_cover.mp4", "cover"), ("reschange.webm", "size")):
        with pytest.raises(VideoError, match=naming(cases / name, word)):
            everything(cases / name, decoder)
