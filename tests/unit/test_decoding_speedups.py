"""PyAVReader.fetch: key frames, skipped frames and scaling, against a plain decode from the start; bench/data.py."""

import importlib
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets import decoding
from datasets.decoding import VideoError, open_video, read_frames, scaled_size
from datasets.packets import Doubt, header_reader, vop_kinds
from datasets.transforms import PretrainTransform
from datasets.video import TrainVideoDataset, clip_indices
from tests.helpers.clips import BACK_ENDS, encode, hide_frames, loader_args, moving, whole_video
from tests.helpers.runs import naming

av = pytest.importorskip("av")
FRAMES = 90
GOP = 20
# name: encoder, its options, whether decoding may start at more than one place (None: no survey), whether it skips
ENCODINGS = {
    "plain.mp4": ("libx264", dict(bf=0, g=GOP), True, False),
    "plain.avi": ("libx264", dict(bf=0, g=GOP), True, False),
    "pyramid.mp4": ("libx264", {"bf": 8, "g": GOP, "x264-params": "b-adapt=2:b-pyramid=normal:ref=5"}, True, True),
    "flat.mkv": ("libx264", {"bf": 3, "g": GOP, "x264-params": "b-pyramid=none"}, True, True),
    "slices.mov": ("libx264", {"g": GOP, "x264-params": "slices=3"}, True, True),
    "interlaced.mp4": ("libx264", {"g": GOP, "flags": "+ildct+ilme", "x264-params": "tff=1"}, True, True),
    "startcodes.ts": ("libx264", dict(bf=3, g=GOP), True, True),
    "open.mp4": ("libx264", {"bf": 3, "g": GOP, "x264-params": "open-gop=1"}, False, True),
    "refresh.mkv": ("libx264", {"bf": 3, "g": 2 * GOP, "x264-params": "intra-refresh=1"}, False, True),
    "reordered.avi": ("libx264", dict(bf=3, g=GOP), None, None),
    "xvid.avi": ("mpeg4", dict(g=12, b="900k"), True, False),
    "xvid_b.avi": ("mpeg4", dict(g=12, bf=2, b="900k"), None, None),
    "xvid_b.mp4": ("mpeg4", dict(g=12, bf=2, b="900k"), True, True),
    "xvid_b.mkv": ("mpeg4", dict(g=12, bf=2, b="900k"), True, True),
    "vp9.webm": ("libvpx-vp9", {"g": GOP, "lag-in-frames": 12, "auto-alt-ref": 1, "cpu-used": 8}, True, False),
    "vp8.webm": ("libvpx", {"g": GOP, "lag-in-frames": 12, "auto-alt-ref": 1, "cpu-used": 8}, True, False),
    "mpeg2.mkv": ("mpeg2video", dict(g=12, bf=2, b="2M"), None, None),
    "hevc.mp4": ("libx265", {"g": GOP, "preset": "ultrafast", "x265-params": "log-level=none"}, True, False),
}  # fmt: skip
FAST = [name for name, (_, _, several, _) in ENCODINGS.items() if several is not None]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """{name: (path, every frame by a plain decode)}"""
    folder, clip, found = tmp_path_factory.mktemp("encoded"), moving(FRAMES, 64, 96), {}
    for name, (codec, options, *_) in ENCODINGS.items():
        if codec in av.codec.codecs_available:
            encode(folder / name, clip, codec, options)
            found[name] = str(folder / name), whole_video(folder / name)
            assert len(found[name][1]) == FRAMES
    return found


def given(encoded, name):
    if name not in encoded:
        pytest.skip(f"no encoder for {name}")
    return encoded[name]


def kind_of(frame):
    return av.video.frame.PictureType(frame.pict_type).name


def requests(n, count=25):
    """Sets of frame indices: single ones, the last, past the end, all, clips, views far apart, random ones."""
    rng = random.Random(0)
    fixed = [
        [0],
        [1],
        [n - 1],
        [n // 2],
        [n],
        [n - 2, n + 1],
        list(range(n)),
        list(range(5, n, 4)),
        [0, n - 1],
        [n - 1, 3, 3],
    ]
    return fixed + [rng.sample(range(n), rng.choice([1, 2, 3, 8, 16])) for _ in range(count)]


@pytest.mark.parametrize("name", ENCODINGS)
def test_frames_equal_those_of_a_plain_decode(encoded, name, monkeypatch):
    path, frames = given(encoded, name)
    several, skips = ENCODINGS[name][2:]
    with open_video(path, "pyav") as reader:
        assert len(reader) == FRAMES
        if several is None:
            assert reader.survey is None
        else:
            times, starts, skip = reader.survey
            assert len(times) == FRAMES and (len(starts) > 1, skip) == (several, skips)
            monkeypatch.setattr(reader, "decode", lambda *_: pytest.fail("the slow way was taken"))
        for indices in requests(FRAMES):
            got = reader.read(indices).numpy()
            assert np.array_equal(got, frames[np.minimum(indices, FRAMES - 1)]), indices
        with pytest.raises(VideoError, match=naming(FRAMES + 2, FRAMES - 1)):
            reader.read([3, FRAMES + 2])
    for indices in requests(FRAMES, 5):  # nothing decoded before: a codec's state does not help
        got = read_frames(path, lambda length, indices=indices: indices, "pyav").numpy()
        assert np.array_equal(got, frames[np.minimum(indices, FRAMES - 1)]), indices


def test_real_clips_equal_a_plain_decode(real_clips):  # noqa: F811
    for path, frames in real_clips.items():
        n = len(frames)
        with open_video(str(path), "pyav") as reader:
            assert (reader.survey is None) == (path.parent.name == "hmdb51")  # B-frames in AVI, packets without a frame
            for indices in requests(n, 2):
                assert np.array_equal(reader.read(indices).numpy(), frames[np.minimum(indices, n - 1)]), (path, indices)


def test_batches_equal_clips_of_a_plain_decode(real_clips, tmp_path):  # noqa: F811
    """Frames, crops and seeds are drawn in the order in which they always were."""
    (tmp_path / "list.csv").write_text("".join(f"{path} 0\n" for path in real_clips))
    transform = PretrainTransform(64, "random_resized", "random", color_jitter=0.3)
    dataset = TrainVideoDataset(tmp_path / "list.csv", 8, 3, transform, num_sample=2)
    for index, frames in enumerate(real_clips.values()):
        item, rng = dataset[index, 7], random.Random(7)
        indices = [clip_indices(len(frames), 8, 3, rng) for _ in range(2)]
        clips = [torch.from_numpy(frames[np.minimum(i, len(frames) - 1)]).permute(0, 3, 1, 2) for i in indices]
        assert torch.equal(item["video"], torch.stack([transform(clip, rng) for clip in clips]))
        assert item["seed"].tolist() == [rng.getrandbits(63) for _ in range(2)]


class Spy:
    """Stands in for a codec context and notes for every packet sent whether the codec was told to skip it."""

    def __init__(self, context):
        self.__dict__.update(context=context, sent=[], frames=0)

    def __getattr__(self, name):
        return getattr(self.context, name)

    def __setattr__(self, name, value):
        setattr(self.context, name, value)

    def decode(self, packet):
        if packet is not None:
            self.sent.append((packet.pts, self.context.skip_frame))
        frames = self.context.decode(packet)
        self.__dict__["frames"] += len(frames)
        return frames


@pytest.mark.parametrize("name", FAST)
def test_only_what_is_needed_is_decoded(encoded, name):
    path, frames = given(encoded, name)
    several, skips = ENCODINGS[name][2:]
    with av.open(path) as container:
        kinds = [(frame.pts, kind_of(frame)) for frame in container.decode(video=0)]
    with open_video(path, "pyav") as reader:
        spy = Spy(reader.stream.codec_context)
        reader.survey  # noqa: B018
        reader.stream = SimpleNamespace(codec_context=spy)
        assert np.array_equal(reader.read([2, 70]).numpy(), frames[[2, 70]])
        sent = dict(spy.sent)
        wanted = {kinds[2][0], kinds[70][0]}
        assert len(sent) == len(spy.sent) and wanted <= sent.keys()  # nothing twice
        assert {sent[time] for time in wanted} == {"DEFAULT"}
        assert {level for time, level in sent.items() if time not in wanted} == {"NONREF" if skips else "DEFAULT"}
        assert skips <= (spy.frames < len(sent))  # HEVC leaves out what is shown before the key frame it starts at
        if several:  # from the first key frame, and from the last one before frame 70
            key = max(i for i, (_, kind) in enumerate(kinds[:71]) if kind == "I")
            reordered = 8 if skips or name == "hevc.mp4" else 0
            assert key > 40 and len(sent) <= 3 + 71 - key + 2 * reordered
            assert not sent.keys() & {time for time, _ in kinds[3 + reordered : key - reordered]}


@pytest.mark.parametrize("name", ["pyramid.mp4", "plain.mp4", "vp9.webm"])
def test_what_comes_out_is_checked(encoded, name, monkeypatch):
    """A start that is none, as where a container marks the wrong frames: the frames are decoded from the beginning."""
    path, frames = given(encoded, name)
    runs, calls = decoding.PyAVReader.runs, []
    with open_video(path, "pyav") as reader:
        decode = reader.decode
        monkeypatch.setattr(reader, "decode", lambda *args: calls.append(args) or decode(*args))
        for drop in (slice(1, None), slice(0, -1)):  # no key frame; without the frame wanted
            monkeypatch.setattr(reader, "runs", lambda *args, drop=drop: [run[drop] for run in runs(reader, *args)])
            assert np.array_equal(reader.read([55, 57]).numpy(), frames[[55, 57]])
        assert len(calls) == 2


def test_wrong_times_are_noticed(encoded):
    """Times that are those of decoding: frames come out in another order than the packets say."""
    path, frames = given(encoded, "pyramid.mp4")
    with open_video(path, "pyav") as reader:
        times, starts, skip = reader.survey
        for place, packet in enumerate(reader.packets):
            packet.pts = times[place]
        del reader.survey
        assert reader.survey is None  # in order, yet the codec reorders
        reader.survey = times, starts, False
        assert np.array_equal(reader.read([30, 31, 50]).numpy(), frames[[30, 31, 50]])


@pytest.mark.parametrize("time", [None, "another's", "before the first"])
def test_times_that_do_not_tell_the_frames_apart(encoded, time):
    path, frames = encoded["pyramid.mp4"]
    with open_video(path, "pyav") as reader:
        first, other = (packet.pts for packet in (reader.packets[0], reader.packets[9]))
        reader.packets[10].pts = {None: None, "another's": other, "before the first": first - 1}[time]
        assert reader.survey is None
        assert np.array_equal(reader.read([30, 31, 50]).numpy(), frames[[30, 31, 50]])


def test_large_files_are_not_kept_in_memory(encoded, monkeypatch):
    path, frames = encoded["pyramid.mp4"]
    monkeypatch.setattr(decoding.PyAVReader, "max_kept", 1000)
    with open_video(path, "pyav") as reader:
        assert len(reader) == FRAMES and not any(isinstance(packet, av.Packet) for packet in reader.packets)
        monkeypatch.setattr(reader, "decode", lambda *_: pytest.fail("the slow way was taken"))
        assert np.array_equal(reader.read([7, 80]).numpy(), frames[[7, 80]])


@pytest.mark.parametrize("name", ["pyramid.mp4", "plain.mp4"])
def test_packets_that_an_edit_list_hides_are_decoded_but_not_counted(encoded, name, tmp_path, monkeypatch):
    source, frames = encoded[name]
    path = tmp_path / "cut.mp4"
    hide_frames(source, path, 7)
    shown = whole_video(path)
    assert np.array_equal(shown, frames[7:])
    with open_video(str(path), "pyav") as reader:
        assert reader.survey is not None and len(reader) == len(shown)
        monkeypatch.setattr(reader, "decode", lambda *_: pytest.fail("the slow way was taken"))
        for indices in requests(len(shown)):
            assert np.array_equal(reader.read(indices).numpy(), shown[np.minimum(indices, len(shown) - 1)]), indices


@pytest.mark.parametrize("name", ["xvid.avi", "xvid_b.mp4"])
def test_kinds_of_mpeg4_pictures(encoded, name):
    path, _ = given(encoded, name)
    with av.open(path) as container:
        kinds = {frame.pts: kind_of(frame) for frame in container.decode(video=0)}
    with open_video(path, "pyav") as reader:
        assert {packet.pts: vop_kinds(bytes(packet)) for packet in reader.packets} == kinds
        data = bytes(reader.packets[1])
    assert vop_kinds(data + data) == "PP"  # packed: one behind another
    read = header_reader("mpeg4", "avi", None)
    assert [read(part) for part in (data, b"\x7f", data + data, b"\x7f")] == [
        (1, False),
        (0, False),
        (1, False),
        (1, False),
    ]
    for part in (data[:7], bytes(40), data * 3):  # not coded; damaged; more than two
        with pytest.raises(Doubt):
            read(part)


def test_mpeg4_pictures_that_are_not_coded(encoded, tmp_path):
    """XviD writes such a packet for what did not change. The decoder shows no frame for it, and frames are counted."""
    source, frames = encoded["xvid.avi"]
    path = tmp_path / "not_coded.avi"
    with av.open(source) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            if number == 30:
                bits = "".join(f"{byte:08b}" for byte in bytes(packet)[4:8])
                coded = (
                    2 + bits[2:].index("0") + 2 + 5 + 1
                )  # kind, seconds, marker, 25ths of a second in 5 bits, marker
                bits = bits[:coded] + "0" + "0".ljust(8 - (coded + 1) % 8, "1")
                data = b"\0\0\1\xb6" + int(bits, 2).to_bytes(len(bits) // 8)
                pts, dts, packet = packet.pts, packet.dts, av.Packet(data)
                packet.pts, packet.dts = pts, dts
            packet.stream = stream
            new.mux(packet)
    shown = whole_video(path)
    assert len(shown) == FRAMES - 1 and np.array_equal(shown[:30], frames[:30])
    with open_video(str(path), "pyav") as reader:
        assert len(reader) == FRAMES - 1 and reader.survey is None
        for indices in requests(len(shown), 8):
            assert np.array_equal(reader.read(indices).numpy(), shown[np.minimum(indices, len(shown) - 1)]), indices


@pytest.mark.parametrize("name", [name for name in FAST if ENCODINGS[name][0] == "libx264"])
def test_only_idr_pictures_are_starts(encoded, name):
    """x264 begins a closed GOP with one: all key frames are; with open GOPs or gradual refresh only the first is."""
    path, _ = encoded[name]
    with av.open(path) as container:
        first = {frame.pts for frame in container.decode(video=0) if kind_of(frame) == "I"}
    with open_video(path, "pyav") as reader:
        starts = {reader.packets[i].pts for i in reader.survey[1]}
        keys = {packet.pts for packet in reader.packets if packet.is_keyframe}
    if name == "open.mp4":
        assert len(starts) == 1 and len(keys) > 3
    elif name == "refresh.mkv":
        assert len(starts) == 1
    else:
        assert starts == keys == first and len(starts) > 3


# ---------------------------------------------------------------------------------------------------- max_short_side


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))


@pytest.mark.parametrize(
    "size, limit, expected",
    [
        ((720, 1280), 340, (340, 604)), ((1280, 720), 340, (604, 340)), ((240, 320), 256, (240, 320)),
        ((256, 341), 256, (256, 341)), ((257, 341), 256, (256, 340)), ((301, 301), 200, (200, 200)),
        ((480, 641), 239, (238, 318)), ((240, 320), None, (240, 320)),
    ],
)  # fmt: skip
def test_scaled_size(size, limit, expected):
    assert scaled_size(*size, limit) == expected


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "large.mp4"
    encode(path, moving(12, 160, 288), "libx264", dict(g=6, crf=5))
    return str(path), torch.from_numpy(whole_video(path))


@pytest.mark.parametrize("decoder", BACK_ENDS)
@pytest.mark.parametrize("limit, size", [(80, (80, 144)), (64, (64, 116)), (159, (158, 284))])
def test_larger_frames_are_scaled_down(large, decoder, limit, size):
    path, frames = large
    indices = [11, 0, 7, 7]
    got = read_frames(path, lambda length: indices, decoder, limit)
    assert got.dtype == torch.uint8 and got.shape == (4, *size, 3)

    def grey(clip):  # PyAV scales colours, which are coded at half size, before they are brought to full size
        return clip.float() @ torch.tensor([0.299, 0.587, 0.114])

    expected = torch.nn.functional.interpolate(grey(frames)[None], size, mode="bicubic", antialias=True)[0]
    for image, index in zip(got, indices, strict=True):
        qualities = [psnr(grey(image), other) for other in expected]
        assert qualities[index] > 30 and qualities[index] > 3 + max(qualities[:index] + qualities[index + 1 :])
        assert (image.float().mean((0, 1)) - frames[index].float().mean((0, 1))).abs().max() < 2


@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_smaller_frames_stay_as_they_are(large, decoder):
    path, frames = large
    for limit in (None, 160, 400):
        assert torch.equal(read_frames(path, lambda length: [3, 9], decoder, limit), frames[[3, 9]])


def test_scaled_frames_where_there_is_no_survey(large, tmp_path, monkeypatch):
    path, _ = large
    fast = read_frames(path, lambda length: [3, 9], "pyav", 80)
    with open_video(path, "pyav") as reader:  # by the decoder, not afterwards
        assert reader.fetch([3, 9], 80)[9].shape == reader.decode([3, 9], 80)[9].shape == (80, 144, 3)
    monkeypatch.setattr(decoding.PyAVReader, "max_kept", 0)
    assert torch.equal(read_frames(path, lambda length: [3, 9], "pyav", 80), fast)


def test_loader_hands_scaled_frames_to_the_transform(large, tmp_path, monkeypatch):
    from datasets import build

    (tmp_path / "list.csv").write_text(f"{large[0]} 0\n" * 4)
    for limit, height in ((80, 80), (0, 160)):
        sizes = set()

        def crop(self, clip, rng, sizes=sizes):
            sizes.add(tuple(clip.shape[-2:]))
            return clip[..., :24, :24].contiguous()

        monkeypatch.setattr(PretrainTransform, "__call__", crop)
        list(build.build_pretraining_loader(loader_args(tmp_path / "list.csv", max_short_side=limit)))
        assert sizes == {(height, height * 288 // 160)}


# ------------------------------------------------------------------------------------------------------------- bench


@pytest.mark.skipif(not decoding._imports("decord"), reason="the reference needs decord")
def test_bench_of_loading(monkeypatch, capsys):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "bench")
    monkeypatch.chdir(root)
    command = "bench/data.py --size 64 --files 2 --frames 40 --rounds 1 --workers 0 --clips 8"
    monkeypatch.setattr(sys, "argv", command.split())
    importlib.import_module("data").main()
    output = capsys.readouterr().out
    speeds = dict(re.findall(r"^(\S.*?)  +\d+\.\d \((\d+\.\d\d)x\)$", output, re.MULTILINE))
    assert speeds.pop("classic") == "1.00" and all(float(ratio) > 0 for ratio in speeds.values())
    shares = re.findall(r"^(ours.*?)((?:  +\d+\.\d\d){5})$", output, re.MULTILINE)
    assert [name for name, _ in shares] == [name for name in speeds if name != "classic, resized"] and len(shares) == 4
    for _, numbers in shares:
        *parts, total = map(float, numbers.split())
        assert abs(sum(parts) - total) < 0.05 and min(parts) > 0
