"""Lists, decoders, clip sampling, the pre-training data set, augmentation, and the loader."""

import pickle
import random
import sys
import wave
from collections import Counter

import numpy as np
import pytest
import torch

from datasets import decoding
from datasets.build import EpochSampler, build_pretraining_loader
from datasets.decoding import VideoError, open_video, read_frames
from datasets.lists import ListError, read_list
from datasets.moving_shapes import write_dataset, write_video
from datasets.transforms import (
    HALF_MEAN,
    HALF_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PretrainTransform,
    multi_scale_crop_box,
    normalize,
    random_resized_crop_box,
    resize,
)
from datasets.video import TrainVideoDataset, clip_indices, collate
from tests.helpers.clips import BACK_ENDS, hide_frames, loader_args, open_av, whole_video
from tests.helpers.runs import assert_names, naming

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("shapes"), train=20, val=10, size=32, frames=20)


# --------------------------------------------------------------------------------------------------------- lists


def test_list_formats(tmp_path):
    listing = tmp_path / "list.csv"
    listing.write_text(
        "\ufeffa.mp4 3\n\n# a comment\nsub/b.mp4 120 4\nc.mp4,5\nd.mp4, 77, 6\nwith space (1).avi 7\n"
        "two, words.mp4 8\n/abs/e.mp4 0 -1\n  f.mp4\t9  \nrun 2 1.mp4 100 10\n",
        encoding="utf-8",
    )
    paths, labels = read_list(listing)
    names = ["a.mp4", "sub/b.mp4", "c.mp4", "d.mp4", "with space (1).avi", "two, words.mp4", "/abs/e.mp4", "f.mp4"]
    assert paths == [str(tmp_path / name) for name in [*names, "run 2 1.mp4"]]
    assert labels == [3, 4, 5, 6, 7, 8, -1, 9, 10]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a.mp4 1\n\nb.mp4\n", ["line 3", "'b.mp4'"]),
        ("# note\na.mp4 1\nb.mp4 one\n", ["line 3", "'one'"]),
        ("a.mp4 1.0\n", ["line 1", "'1.0'"]),
        ("path,label\na.mp4,1\n", ["line 1", "header"]),
        ("\n# nothing\n", []),
        (b"\xff\xfe\x00\x81", ["text"]),
    ],
)
def test_list_errors_name_file_and_line(tmp_path, text, words):
    listing = tmp_path / "list.csv"
    listing.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ListError) as error:
        read_list(listing)
    assert_names(error.value, listing, *words)


def test_list_missing_or_a_folder(tmp_path):
    with pytest.raises(ListError, match=naming(tmp_path, "folder")):
        read_list(tmp_path)
    with pytest.raises(ListError, match=naming(tmp_path / "nowhere.csv")):
        read_list(tmp_path / "nowhere.csv")


# ------------------------------------------------------------------------------------------------------ decoders


@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_decoders_return_the_frames_asked_for(real_clips, decoder):
    by_folder = {path.parent.name: (path, frames) for path, frames in real_clips.items()}  # one per data set
    for path, frames in by_folder.values():
        n, rng = len(frames), random.Random(0)
        # each list on a fresh reader: a seek's errors show where nothing was decoded before it
        requests = [[0], [5], [n - 1], [n // 2, 3, 3, n - 1, 0], list(range(20, n - 1, 7)), rng.choices(range(n), k=8)]
        for indices in requests:
            with open_video(str(path), decoder) as reader:
                assert len(reader) == n, path
                got = reader.read(indices)
            assert got.dtype == torch.uint8 and got.shape == (len(indices), *frames.shape[1:])
            difference = np.abs(got.numpy().astype(int) - frames[indices])
            # decord brings FFmpeg 4, whose MPEG-4 decoder rounds a few pixels of UCF101 otherwise
            assert difference.max() <= (2 if decoder == "decord" else 0), (path, indices)
            assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_all_frames_in_one_decode_and_when_they_are_shown(real_clips, decoder):
    """Against a plain decode of a file per data set; times against those of its frames, within one frame's time."""
    by_folder = {path.parent.name: (path, frames) for path, frames in real_clips.items()}
    for path, frames in by_folder.values():
        with open_video(str(path), decoder) as reader:
            index = -1
            for index, image in reader.decode_all():
                if index % 16 == 0:  # each takes as long as its decode
                    assert np.abs(image().astype(int) - frames[index]).max() <= (2 if decoder == "decord" else 0), path
            assert index == len(frames) - 1
            times = [reader.time(index) for index in range(len(frames) + 1)]
        with open_av(path) as container:
            rate = float(container.streams.video[0].average_rate)
            known = [frame.time for frame in container.decode(video=0)]
        assert times[0] == 0 and min(np.diff(times)) > 0
        if None not in known and known == sorted(known):  # HMDB51's frames have no times of their own
            assert np.abs(np.array(times[:-1]) - (np.array(known) - known[0])).max() < 1 / rate, path
        assert times[-1] == pytest.approx(len(frames) / rate, abs=2 / rate)


@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_header_that_claims_a_frame_too_many(real_clips, decoder):
    """HMDB51's headers do; the frame is not counted, and who asks for it gets the last one."""
    for path, frames in real_clips.items():
        if path.parent.name == "hmdb51":
            with open_video(str(path), decoder) as reader:
                claimed = len(reader)
                got = reader.read([claimed - 1, claimed])
                assert claimed == len(frames)
                assert np.array_equal(got[0], frames[-1]) and np.array_equal(got[1], frames[-1])
                wanted = len(reader) + decoding.MAX_SHORTFALL
                with pytest.raises(VideoError, match=naming(path, wanted, len(reader) - 1)):
                    reader.read([wanted])


@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_truncated_files(real_clips, decoder, tmp_path):
    for path, frames in real_clips.items():
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if path.suffix == ".mp4":  # its index is at the end
            with pytest.raises(VideoError, match=naming(cut)):
                open_video(str(cut), decoder)
            continue
        with open_video(str(cut), decoder) as reader:
            assert len(reader) < 0.8 * len(frames)
            got = reader.read(range(0, len(reader), 4)).numpy()
            assert np.abs(got[:-1].astype(int) - frames[: len(reader) : 4][: len(got) - 1]).max() <= 2
            with pytest.raises(VideoError, match=naming(cut, len(frames) - 1)):
                reader.read([0, len(frames) - 1])


def remux(source, target, **options):
    """Copies a video's packets into another file."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def test_packets_that_an_edit_list_hides_are_not_counted(shapes, tmp_path):
    """A stream copy that does not start at a key frame (ffmpeg -ss -c copy) keeps packets that are never shown. decord
    counts them, and repeats the last frame in their place."""
    source, path = shapes / "videos/val_00000.mp4", tmp_path / "cut.mp4"
    frames = whole_video(source)
    hide_frames(source, path, 7)
    with open_video(str(path), "pyav") as cut:
        assert len(cut) == len(frames) - 7
        shown = cut.read([0, len(cut) - 1]).numpy()
    assert np.array_equal(shown[0], frames[7]) and np.array_equal(shown[1], frames[-1])


@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_a_damaged_half_is_left_out(shared_data, decoder, tmp_path):
    path = tmp_path / "fast_start.mp4"
    remux(shared_data / "clips/kinetics400/WUzgd7C1pWA.mp4", path, movflags="faststart")
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes(whole[:half] + random.Random(0).randbytes(len(whole) - half))
    with open_video(str(path), decoder) as reader:
        assert 100 < len(reader) < 200  # the index at its head says 327
        assert reader.read([0, 60]).shape == (2, 256, 340, 3)
        with pytest.raises(VideoError, match=naming("fast_start.mp4", 200)):
            reader.read([200])


@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_rotated_video_is_upright(shapes, decoder, tmp_path):
    data = bytearray((shapes / "videos/val_00000.mp4").read_bytes())
    matrix = (
        data.find(b"tkhd") + 44
    )  # ISO 14496-12: 9 numbers of 4 bytes, the first a cosine; this one turns by 90 degrees
    numbers = [0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30]
    data[matrix : matrix + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    (tmp_path / "rotated.mp4").write_bytes(data)
    upright = np.rot90(whole_video(shapes / "videos/val_00000.mp4")[3], -1)  # a quarter clockwise
    with open_video(str(tmp_path / "rotated.mp4"), decoder) as reader:
        assert np.array_equal(reader.read([3])[0], upright)


@pytest.mark.parametrize("decoder", BACK_ENDS)
def test_errors_name_path_and_reason(tmp_path, decoder):
    with pytest.raises(VideoError, match=naming("nowhere.mp4")):
        open_video(str(tmp_path / "nowhere.mp4"), decoder)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(VideoError, match=naming("text.mp4")):
        open_video(str(tmp_path / "text.mp4"), decoder)
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(VideoError, match=naming("sound.mp4")):
        open_video(str(tmp_path / "sound.mp4"), decoder)


def test_video_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "no frames")))
    assert type(error) is VideoError and str(error) == "a.mp4: no frames"


def test_reader_rejects_bad_indices(shapes):
    with open_video(str(shapes / "videos/val_00000.mp4")) as reader:
        for indices in ([], [0, -1]):
            with pytest.raises(ValueError, match=naming(indices)):
                reader.read(indices)


def test_decoder_choice(monkeypatch):
    monkeypatch.setattr(decoding, "_imports", lambda package: True)
    assert decoding.decoders_for("a.MP4") == decoding.decoders_for("a.avi") == ["pyav", "decord"]
    assert decoding.decoders_for("a.mp4", "pyav") == ["pyav"] and decoding.decoders_for("a.avi", "decord") == ["decord"]
    with pytest.raises(ValueError, match=naming("'cv3'", "auto", "decord", "pyav")):
        decoding.decoders_for("a.mp4", "cv3")
    monkeypatch.undo()
    decoding._imports.cache_clear()
    monkeypatch.setitem(sys.modules, "decord", None)  # import raises ImportError
    assert decoding.decoders_for("a.mp4") == ["pyav"]
    with pytest.raises(ImportError, match=naming("--decoder decord", "pip install decord")):
        decoding.decoders_for("a.mp4", "decord")
    monkeypatch.setitem(sys.modules, "av", None)
    decoding._imports.cache_clear()
    with pytest.raises(ImportError, match=naming("--decoder auto", "pip install", "av", "decord")):
        decoding.decoders_for("a.mp4")
    decoding._imports.cache_clear()


@pytest.mark.skipif(not decoding._imports("decord"), reason="no decord")
def test_auto_reads_with_the_other_decoder_what_the_first_refuses(shapes, tmp_path, monkeypatch):
    """The reason reported is the first back end's. decord cannot copy frames of 48 pixels' width."""
    path = str(shapes / "videos/val_00000.mp4")
    frames = read_frames(path, lambda length: [length - 1, 0])
    assert torch.equal(frames, read_frames(path, lambda length: [19, 0], "decord"))
    narrow = str(tmp_path / "narrow.mp4")
    write_video(narrow, np.full((4, 48, 48, 3), 100, np.uint8))
    with pytest.raises(VideoError, match=naming("narrow.mp4", "decord")):
        read_frames(narrow, lambda length: [0], "decord")

    def refuse(self, *args):
        raise VideoError(self.path, "PyAV will not")

    monkeypatch.setattr(decoding.PyAVReader, "read", refuse)
    assert torch.equal(frames, read_frames(path, lambda length: [length - 1, 0]))
    with pytest.raises(VideoError, match="narrow.mp4: PyAV will not"):
        read_frames(narrow, lambda length: [0])
    with pytest.raises(VideoError, match=naming("none.mp4")):
        read_frames(str(tmp_path / "none.mp4"), lambda length: [0])


# ------------------------------------------------------------------------------------------------- clip sampling


def test_clip_starts_are_uniform_over_all_that_fit():
    rng = random.Random(0)
    clips = [clip_indices(40, 4, 3, rng) for _ in range(31 * 200)]  # span 10: starts 0 .. 30
    assert all(clip == list(range(clip[0], clip[0] + 10, 3)) for clip in clips)
    counts = Counter(clip[0] for clip in clips)
    assert set(counts) == set(range(31))
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 30 + 5 * (2 * 30) ** 0.5


def test_short_videos_hold_the_last_frame():
    rng = random.Random(0)
    assert {tuple(clip_indices(10, 4, 3, rng)) for _ in range(50)} == {(0, 3, 6, 9)}  # fits exactly
    assert clip_indices(8, 4, 3, rng) == [0, 3, 6, 7]
    assert clip_indices(1, 3, 2, rng) == [0, 0, 0]


# -------------------------------------------------------------------------------------------------- the data set


def dataset_of(listing, **options):
    return TrainVideoDataset(listing, 4, 2, PretrainTransform(24, color_jitter=0.2), **options)


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a
    )


def test_item_depends_on_its_seed_alone(shapes):
    dataset = dataset_of(shapes / "train.csv", num_sample=3)
    item = dataset[3, 99]
    assert item["video"].shape == (3, 4, 3, 24, 24) and item["video"].dtype == torch.uint8
    assert item["video"].is_contiguous() and item["index"] == 3 and item["failed"] == []
    assert item["seed"].dtype == torch.int64 and len(set(item["seed"].tolist())) == 3 and (item["seed"] >= 0).all()
    random.seed(5)
    torch.manual_seed(5)
    dataset[4, 100]
    assert same(item, dataset[3, 99])
    other = dataset[3, 100]
    assert not torch.equal(item["video"], other["video"]) and not set(item["seed"].tolist()) & set(
        other["seed"].tolist()
    )
    assert not torch.equal(item["video"][0], item["video"][1])  # clips of a video have their own start and crop


def test_item_shows_consecutive_frames_of_its_video(shapes):
    """Without augmentation, a clip is found in the fully decoded video at the stride asked for."""
    dataset = TrainVideoDataset(shapes / "val.csv", 5, 3, lambda clip, rng: clip, num_sample=2)
    frames = whole_video(shapes / "videos/val_00006.mp4")
    for clip in dataset[6, 1]["video"]:
        clip = clip.permute(0, 2, 3, 1).numpy()
        assert any(np.array_equal(clip, frames[start : start + 13 : 3]) for start in range(8))


def test_unreadable_videos_are_replaced_counted_and_named(shapes, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    listing = tmp_path / "list.csv"
    listing.write_text(f"text.mp4 0\nmissing.mp4 0\n{shapes}/videos/val_00002.mp4 0\n")
    dataset = dataset_of(listing, max_retries=50)
    for seed in range(8):
        item = dataset[0, seed]
        assert item["index"] == 2 and len(item["failed"]) >= 1
        assert item["failed"][0].startswith(f"{tmp_path}/text.mp4: ")
        assert same(item, dataset[0, seed])
    assert {len(dataset[0, seed]["failed"]) for seed in range(20)} > {1, 2}  # the replacement may fail too
    assert dataset[2, 0]["failed"] == []
    batch = collate([dataset[2, 0], dataset[0, 1], dataset[1, 2]])
    assert batch["index"].tolist() == [2, 2, 2] and len(batch["failed"]) >= 2


def test_all_videos_unreadable(tmp_path):
    listing = tmp_path / "list.csv"
    listing.write_text("a.mp4 0\nb.mp4 0\n")
    with pytest.raises(VideoError) as error:
        dataset_of(listing, max_retries=4)[1, 0]
    assert_names(error.value, listing, 4, f"{tmp_path}/b.mp4")


# -------------------------------------------------------------------------------------------------- augmentation


def allowed_boxes(height, width, size):
    """Every box of the multi-scale crop, from its description."""
    base = min(height, width)
    lengths = []
    for percent in (100, 87.5, 75, 66):
        length = int(base * percent / 100)
        lengths.append(size if length - 3 < size < length + 3 and size <= base else length)
    boxes = set()
    for h, w in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)]:
        h, w = lengths[h], lengths[w]
        y, x = (height - h) // 4, (width - w) // 4
        corners = [(0, 0), (0, 4 * x), (4 * y, 0), (4 * y, 4 * x)]
        edges = [(0, 2 * x), (4 * y, 2 * x), (2 * y, 0), (2 * y, 4 * x)]
        quarters = [(y, x), (y, 3 * x), (3 * y, x), (3 * y, 3 * x)]
        boxes |= {(top, left, h, w) for top, left in [*corners, *edges, *quarters, (2 * y, 2 * x)]}
    return boxes


@pytest.mark.parametrize("height, width, size", [(240, 320, 224), (256, 340, 224), (340, 256, 222), (64, 64, 65)])
def test_multi_scale_crop_draws_exactly_the_allowed_boxes(height, width, size):
    rng = random.Random(0)
    drawn = {multi_scale_crop_box(height, width, size, rng) for _ in range(6000)}
    assert drawn == allowed_boxes(height, width, size)
    assert all(top >= 0 and left >= 0 and top + h <= height and left + w <= width for top, left, h, w in drawn)


def test_random_resized_crop_keeps_its_bounds():
    rng = random.Random(0)
    boxes = np.array([random_resized_crop_box(240, 320, rng) for _ in range(3000)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 240).all() and (left + w <= 320).all()
    area, ratio = h * w / (240 * 320), w / h
    assert (
        0.495 < area.min() < 0.52 and 0.9 < area.max() < 1.01 and 0.74 < ratio.min() < 0.8 and 1.3 < ratio.max() < 1.35
    )
    for start, length, limit in ((top, h, 240), (left, w, 320)):  # both borders are reached, by small boxes too
        small = length < limit
        assert start[small].min() == 0 and (start + length)[small].max() == limit
    assert random_resized_crop_box(10, 100, random.Random(0)) == (0, 43, 10, 13)  # nothing fits: the central box


@pytest.fixture(scope="module")
def clip():
    """A smooth random clip, uint8 [4, 3, 48, 60], in memory as a decoder gives it: frame, row, column, channel."""
    small = torch.randint(0, 256, (4, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = resize(small, (48, 60), "bicubic")
    return large.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("crop", ["multiscale", "random_resized"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_transform_is_the_same_for_all_frames(clip, crop, interpolation):
    transform = PretrainTransform(32, crop, interpolation, color_jitter=0.4)
    outputs = []
    for seed in range(6):
        together = transform(clip, random.Random(seed))
        assert together.shape == (4, 3, 32, 32) and together.dtype == torch.uint8 and together.is_contiguous()
        alone = torch.cat([transform(frame[None], random.Random(seed)) for frame in clip])
        assert torch.equal(together, alone)
        outputs.append(together)
    assert len({output.numpy().tobytes() for output in outputs}) == 6


def test_flip_mirrors_half_of_the_clips(clip):
    flips = 0
    for seed in range(200):
        # the flip is the last draw, so the crop is the same with and without
        plain = PretrainTransform(32, flip=False)(clip, random.Random(seed))
        output = PretrainTransform(32, flip=True)(clip, random.Random(seed))
        flips += torch.equal(output, plain.flip(-1))
        assert torch.equal(output, plain) or torch.equal(output, plain.flip(-1))
    assert 70 < flips < 130


def test_random_interpolation_uses_both(clip):
    outputs = {name: set() for name in ("bicubic", "bilinear", "random")}
    for name, output in outputs.items():
        for seed in range(40):
            box = PretrainTransform(32, interpolation=name, flip=False)(clip[:, :, :32, :40], random.Random(seed))
            output.add(box.numpy().tobytes())
    assert outputs["random"] & (outputs["bicubic"] - outputs["bilinear"])
    assert outputs["random"] & (outputs["bilinear"] - outputs["bicubic"])
    assert outputs["random"] <= outputs["bilinear"] | outputs["bicubic"]


def test_color_jitter_changes_brightness_within_its_range(clip):
    plain = PretrainTransform(32, flip=False)
    jitter = PretrainTransform(32, flip=False, color_jitter=0.3)
    ratios = []
    for seed in range(60):
        ratios.append(
            (jitter(clip, random.Random(seed)).float().mean() / plain(clip, random.Random(seed)).float().mean()).item()
        )
    assert 0.65 < min(ratios) < 0.8 and 1.15 < max(ratios) < 1.35  # clipping at 255 takes a little


def test_transform_rejects_unknown_choices():
    with pytest.raises(ValueError, match=naming("crop", "'centre'", "multiscale", "random_resized")):
        PretrainTransform(32, crop="centre")
    with pytest.raises(ValueError, match=naming("interpolation", "'nearest'", "bicubic")):
        PretrainTransform(32, interpolation="nearest")


@pytest.mark.parametrize("mean, std", [(IMAGENET_MEAN, IMAGENET_STD), (HALF_MEAN, HALF_STD)])
def test_normalize(mean, std):
    clips = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    for constants in ((mean, std), (torch.tensor(mean), torch.tensor(std))):
        pixels, normalized = normalize(clips, *constants)
        assert pixels.dtype == normalized.dtype == torch.float32
        expected = clips.numpy().transpose(0, 2, 1, 3, 4) / 255.0  # [B, 3, T, H, W]
        np.testing.assert_allclose(pixels, expected, atol=1e-6)
        for channel in range(3):
            scaled = (expected[:, channel] - mean[channel]) / std[channel]
            np.testing.assert_allclose(normalized[:, channel], scaled, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- the loader


def test_ranks_together_draw_the_batches_of_one_process():
    one = EpochSampler(23, seed=7)
    one.set_epoch(4)
    order = list(one)
    assert sorted(index for index, _ in order) == list(range(23)) and len(one) == 23
    for world_size in (2, 3):
        ranks = [EpochSampler(23, 7, rank, world_size) for rank in range(world_size)]
        for rank in ranks:
            rank.set_epoch(4)
        parts = [list(rank) for rank in ranks]
        assert {len(part) for part in parts} == {len(ranks[0])} == {23 // world_size}
        for step in range(len(ranks[0]) // 2):  # two videos a process and step
            together = [entry for part in parts for entry in part[2 * step : 2 * step + 2]]
            assert set(together) == set(order[2 * world_size * step : 2 * world_size * (step + 1)])


def test_sampler_seeds():
    def entries(seed, epoch, shuffle=True):
        sampler = EpochSampler(500, seed, shuffle=shuffle)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert entries(0, 0) == entries(0, 0)
    assert [index for index, _ in entries(0, 1)] != [index for index, _ in entries(0, 0)]
    assert [index for index, _ in entries(1, 0)] != [index for index, _ in entries(0, 0)]
    assert [index for index, _ in entries(0, 3, shuffle=False)] == list(range(500))
    assert dict(entries(0, 0)) == dict(entries(0, 0, shuffle=False))  # the seed follows the index, not the place
    seeds = [seed for run in ((0, 0), (0, 1), (1, 0)) for _, seed in entries(*run)]
    assert len(set(seeds)) == 1500 and all(0 <= seed < 2**63 for seed in seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds]).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 0.07  # 5 sigma


def test_batches_do_not_depend_on_the_number_of_workers(shapes):
    def batches(num_workers):
        loader = build_pretraining_loader(loader_args(shapes / "train.csv", num_workers=num_workers))
        assert len(loader) == 5
        epochs = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            epochs.append(list(loader))
        return epochs

    alone, workers = batches(0), batches(2)
    for epoch in range(2):
        assert len(alone[epoch]) == 5
        for a, b in zip(alone[epoch], workers[epoch], strict=True):
            assert a["video"].shape == (8, 4, 3, 24, 24) and a["seed"].shape == (8,) and a["index"].shape == (4,)
            assert a["index"].dtype == torch.int64 and same(a, b)
    assert not torch.equal(alone[0][0]["video"], alone[1][0]["video"])


def test_loader_errors(shapes):
    with pytest.raises(ValueError, match=naming("train.csv", 20, 6, 4, "--batch_size")):
        build_pretraining_loader(loader_args(shapes / "train.csv", batch_size=6), rank=1, world_size=4)


def test_failed_videos_reach_the_batch(shapes, tmp_path):
    good = "".join(f"{shapes}/videos/val_0000{i}.mp4 0\n" for i in range(7))
    (tmp_path / "list.csv").write_text("missing.mp4 0\n" + good)
    loader = build_pretraining_loader(loader_args(tmp_path / "list.csv", batch_size=8, num_workers=1))
    (batch,) = list(loader)
    assert batch["failed"] and all(failure.startswith(f"{tmp_path}/missing.mp4: ") for failure in batch["failed"])
    assert len(batch["index"]) == 8 and 0 not in batch["index"].tolist()
