"""The embedded data set: files, determinism, true masks, and a label that only motion shows."""

import itertools
import json
import os
from collections import Counter

import numpy as np
import pytest

from datasets import moving_shapes
from datasets.decoding import open_video
from datasets.lists import read_list
from datasets.moving_shapes import (
    KINDS,
    OUTLINES,
    Look,
    draw_shape,
    draw_texture,
    path_of,
    render_clip,
    write_dataset,
)
from tests.helpers.runs import assert_names, naming

pytest.importorskip("av")
SIZE, FRAMES = 48, 16
SETTINGS = dict(train=30, val=10, size=SIZE, frames=FRAMES)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("shapes"), **SETTINGS, seed=1, workers=2)


@pytest.fixture(scope="module")
def rendered():
    """40 clips of every kind: clips uint8 [400, T, S, S, 3], masks bool [400, T, S, S], labels [400]."""
    labels = np.arange(400) % len(KINDS)
    pairs = [render_clip(KINDS[k], np.random.default_rng([9, i]), SIZE, FRAMES) for i, k in enumerate(labels)]
    return np.stack([clip for clip, _ in pairs]), np.stack([mask for _, mask in pairs]), labels


def decode(path):
    with open_video(str(path), "pyav") as reader:
        return reader.read(range(len(reader))).numpy()


def grow(mask, pixels):
    """bool [T, S, S]: True within so many pixels of a True one, on the torus."""
    for axis in (1, 2):
        mask = np.any([np.roll(mask, shift, axis) for shift in range(-pixels, pixels + 1)], axis=0)
    return mask


def mask_of(video_path):
    return np.load(video_path.replace("videos", "masks").replace(".mp4", ".npz"))["mask"]


# --------------------------------------------------------------------------------------------------------- files


def test_files_and_balanced_labels(written):
    assert (written / "classes.txt").read_text().split() == list(KINDS) and len(KINDS) >= 8
    few = written / "translations"
    assert (few / "classes.txt").read_text().split() == [kind for kind in KINDS if kind.startswith("translate")]
    for split in ("train", "val"):
        paths, labels = read_list(written / f"{split}.csv")
        found, their_labels = read_list(few / f"{split}.csv")
        assert [(os.path.normpath(path), label) for path, label in zip(found, their_labels, strict=True)] == [
            (path, label) for path, label in zip(paths, labels, strict=True) if label < 4
        ]
    for split, count in (("train", 30), ("val", 10)):
        paths, labels = read_list(written / f"{split}.csv")
        assert len(set(paths)) == count and Counter(labels) == {k: count // 10 for k in range(10)}
        assert not (written / f"{split}.csv").read_text().startswith("/")
        for path in paths:
            mask = mask_of(path)
            assert mask.dtype == bool and mask.shape == (FRAMES, SIZE, SIZE)
            assert decode(path).shape == (FRAMES, SIZE, SIZE, 3)


def test_same_seed_same_bytes_on_any_number_of_workers(written, tmp_path):
    write_dataset(tmp_path / "again", **SETTINGS, seed=1, workers=1)
    write_dataset(tmp_path / "other", **SETTINGS, seed=2, workers=1)
    files = sorted(path.relative_to(written) for path in written.rglob("*.*"))
    assert len(files) == 2 * 40 + 4 + 3  # translations/ has three
    for file in files:
        assert (written / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    clips = [file for file in files if file.suffix in (".mp4", ".npz")]
    assert all((written / file).read_bytes() != (tmp_path / "other" / file).read_bytes() for file in clips)


def test_finished_data_set_is_left_alone(written, capsys):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    write_dataset(written, **SETTINGS, seed=1)
    assert_names(capsys.readouterr().out, written, "nothing")
    assert before == {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    for change in (dict(seed=3), dict(size=50), dict(val=20)):
        with pytest.raises(ValueError, match=r"settings \((seed|size|val)\)"):
            write_dataset(written, **SETTINGS | dict(seed=1) | change)


def test_a_folder_of_version_1_is_refused(written, tmp_path):
    settings = json.loads((written / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"version": 1}))
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*version 1"):
        write_dataset(tmp_path, **SETTINGS, seed=1)


@pytest.mark.parametrize(
    "look",
    [dict(shape_size=[0.3, 0.2]), dict(shape_size=[0, 0.2]), dict(shape_size=[0.2, 0.5]), dict(background_wave=[2, 1]),
     dict(shape_wave=[0, 1]),
     dict(num_shapes=0), dict(distractors=-1), dict(camera=-0.1), dict(camera=float("nan"))],
)  # fmt: skip
def test_a_look_that_makes_no_clip_is_refused(look, tmp_path):
    (name,) = look
    with pytest.raises(ValueError, match=f"--{name}"):
        write_dataset(tmp_path / "x", **SETTINGS, **look)
    assert not (tmp_path / "x").exists()


def test_foreign_folder_and_senseless_settings(tmp_path):
    (tmp_path / "train.csv").write_text("mine.mp4 0\n")
    with pytest.raises(ValueError, match=naming(tmp_path)):
        write_dataset(tmp_path, **SETTINGS)
    assert (tmp_path / "train.csv").read_text() == "mine.mp4 0\n"
    for change in (dict(size=31), dict(val=9), dict(frames=1)):
        with pytest.raises(ValueError, match=naming("size", 16, "frames", 2, len(KINDS))):
            write_dataset(tmp_path / "new", **SETTINGS | change)


def test_interrupted_writing_is_taken_up_again(written, tmp_path, monkeypatch):
    write_clip = moving_shapes.write_clip

    def fail_at_five(output, split, index, *rest):
        if index == 5:
            raise KeyboardInterrupt
        return write_clip(output, split, index, *rest)

    monkeypatch.setattr(moving_shapes, "write_clip", fail_at_five)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "x", **SETTINGS, seed=1, workers=1)
    monkeypatch.undo()
    assert not (tmp_path / "x/settings.json").exists()
    write_dataset(tmp_path / "x", **SETTINGS, seed=1, workers=1)
    assert (tmp_path / "x/train.csv").read_bytes() == (written / "train.csv").read_bytes()
    assert json.loads((tmp_path / "x/settings.json").read_text())["seed"] == 1


# --------------------------------------------------------------------------------------------------- true motion


def test_decoded_frames_change_inside_the_masks_only(written):
    for path in read_list(written / "train.csv")[0]:
        frames, mask = decode(path).astype(float), mask_of(path)
        change = np.square(frames[2:] - frames[:-2]).mean(-1)  # [T - 2, S, S]
        moving = mask[2:] | mask[:-2]
        assert change[moving].mean() > 20 * change[~moving].mean(), path
        assert change[mask[2:] & mask[:-2]].mean() > 15**2  # not at the rim alone


def test_background_is_still_and_masks_are_where_shapes_are(rendered):
    clips, masks, _ = rendered
    for clip, mask in zip(clips[:60], masks[:60], strict=True):
        near = grow(mask, 2)  # the anti-aliased rims lie within
        background = np.ma.masked_array(clip, np.repeat(near[..., None], 3, -1))
        assert (background.max(0) == background.min(0)).all()
        seen = background.max(0)  # colour of each background pixel, from the frames in which nothing covers it
        contrast = np.abs(clip - seen.astype(float)).mean(-1)[mask].compressed()
        assert contrast.size == 0 or np.median(contrast) > 25  # levels: a person sees the shapes
    area = masks.mean((1, 2, 3))
    assert 0.02 < area.min() and area.max() < 0.3


def test_the_shape_is_textured_and_the_background_smooth(rendered):
    """Patches of 1/8 of the side: inside a shape none is flat, outside all vary little."""
    clips, masks, _ = rendered
    patch = SIZE // 8
    cut = lambda x: x.reshape(-1, 8, patch, 8, patch, *x.shape[3:]).swapaxes(2, 3)  # noqa: E731  [n, 8, 8, p, p, ...]
    variation = cut(clips[:100, 0].astype(float)).std((3, 4)).mean(-1)  # grey levels
    covered = cut(masks[:100, 0]).mean((3, 4))
    inside, outside = variation[covered == 1], variation[cut(grow(masks[:100, 0], 1)).mean((3, 4)) == 0]
    assert len(inside) > 100 and np.percentile(inside, 5) > 12
    assert np.percentile(outside, 95) < 20 and np.median(outside) < np.median(inside) / 2


def render(seed=0, kind="translate_right", size=SIZE, frames=FRAMES, **look):
    return render_clip(kind, np.random.default_rng(seed), size, frames, Look(**look))


def test_shape_size_is_a_radius_in_sides():
    """A disc of radius r sides covers pi r^2 of the frame."""
    for size in (32, 64):
        areas = [render(seed, size=size, frames=2, shape_size=(0.1, 0.1))[1].mean() for seed in range(200)]
        discs = [
            area for seed, area in enumerate(areas)
            if draw_shape_of(seed, size)["outline"] == "disc"
        ]  # fmt: skip
        assert len(discs) > 20 and np.allclose(discs, np.pi * 0.01, rtol=0.2)


def draw_shape_of(seed, size):
    """The shape that render draws with this seed."""
    rng = np.random.default_rng(seed)
    mean = rng.uniform(0.3, 0.7, 3)
    draw_texture(rng, size, mean, Look.background_wave)
    return draw_shape(rng, size, mean, Look(shape_size=(0.1, 0.1)))


def test_more_shapes_cover_more_and_distractors_are_not_in_the_mask():
    one, three = (np.mean([render(seed, num_shapes=n)[1].mean() for seed in range(30)]) for n in (1, 3))
    assert 2 * one < three < 3 * one  # they may overlap
    for seed in range(5):
        (clip, mask), (other, other_mask) = render(seed), render(seed, distractors=3)
        inside = ~grow(~mask, 1)
        assert np.array_equal(mask, other_mask) and np.array_equal(clip[inside], other[inside])  # in front
        assert (np.ptp(other.astype(int), axis=0).max(-1) > 20).sum() > (np.ptp(clip.astype(int), 0).max(-1) > 20).sum()


def test_the_camera_pans_background_and_shapes_alike():
    """Two sides in 16 frames; a shape that stays where it is in the world moves in the frame."""
    pan = render(3, "spin_clockwise", camera=1 / 16)[1]
    still = render(3, "spin_clockwise")[1]
    assert pan.any(0).sum() > 2 * still.any(0).sum()
    for seed in range(5):
        (clip, mask), (still, still_mask) = render(seed, camera=1 / 16), render(seed)
        free = ~(grow(mask, 2) | grow(still_mask, 2)).any(0)
        changes = [np.ptp(x[:, free].astype(int), 0).mean() for x in (clip, still)]
        assert free.any() and changes[0] > 10 and changes[1] == 0


def test_background_wave_is_in_sides():
    """A background of one wavelength of 4 sides varies less in a patch than one of 1/4 of a side."""
    smooth, fine = (np.std(render(1, frames=2, background_wave=(w, w))[0][0, :6, :6], (0, 1)).mean() for w in (4, 0.25))
    assert 3 * smooth < fine


def test_shape_wave_is_in_sides():
    """The same for what a shape shows: the spread of its colours in small blocks inside it."""
    spreads = []
    for wave in (1.0, 0.125):
        clip, mask = render(1, frames=2, shape_wave=(wave, wave), shape_size=(0.4, 0.4))
        blocks = [
            (y, x) for y in range(0, SIZE - 6, 6) for x in range(0, SIZE - 6, 6) if mask[0, y : y + 6, x : x + 6].all()
        ]
        spreads.append(np.mean([np.std(clip[0, y : y + 6, x : x + 6], (0, 1)).mean() for y, x in blocks]))
    assert 1.5 * spreads[0] < spreads[1]


def test_sprites_turn_and_move_as_their_kind_says():
    shape = draw_shape(np.random.default_rng(0), 64, np.full(3, 0.5)) | dict(centre=np.array([20.0, 30.0]), phase=-1.5)
    still = path_of(shape | dict(speed=0.0), "translate_right", 5)
    for kind, axis, sign in (("right", 0, 1), ("left", 0, -1), ("down", 1, 1), ("up", 1, -1)):
        track = path_of(shape, f"translate_{kind}", 5)
        np.testing.assert_allclose(track[axis] - still[axis], sign * shape["speed"] * np.arange(5))
        np.testing.assert_array_equal(track[1 - axis], still[1 - axis])
    for direction, sign in (("clockwise", 1), ("counterclockwise", -1)):
        x, y, turn = path_of(shape, f"orbit_{direction}", 3)
        assert y[0] < 30 and sign * (x[1] - x[0]) > 0 and (turn == turn[0]).all()  # near the top: clockwise is right
        np.testing.assert_allclose(np.hypot(x - 20, y - 30), shape["swing"])
        x, y, turn = path_of(shape, f"spin_{direction}", 3)
        assert (x == 20).all() and (y == 30).all() and sign * (turn[1] - turn[0]) > 0
    for direction, axis in (("horizontally", 0), ("vertically", 1)):
        track = path_of(shape, f"shake_{direction}", 2000)
        assert (track[1 - axis] == still[1 - axis][0]).all()
        assert abs(np.abs(track[axis] - still[axis][0]).max() - shape["swing"]) < 0.1


@pytest.mark.parametrize("outline", OUTLINES)
def test_clockwise_is_clockwise_on_the_screen(monkeypatch, outline):
    """A shape in the middle that spins by a quarter a frame is the frame before, turned."""

    def quarter_turns(rng, size, mean, *_):
        shape = draw_shape(rng, size, mean)
        turn = dict(outline=outline, turn=0.3, speed=shape["radius"] * np.pi / 2, centre=np.full(2, size / 2))
        return shape | turn

    monkeypatch.setattr(moving_shapes, "draw_shape", quarter_turns)
    for kind, quarters in (("spin_clockwise", -1), ("spin_counterclockwise", 1)):
        clip, mask = render_clip(kind, np.random.default_rng(3), 64, 4)
        inside = ~grow(~mask, 1)  # without the rim, which is mixed with the still background
        for t in range(3):
            assert np.array_equal(np.rot90(mask[t], quarters), mask[t + 1]) and inside[t + 1].any()
            turned = np.rot90(clip[t], quarters).astype(int)
            assert np.abs(turned - clip[t + 1])[inside[t + 1]].max() <= 1


def test_shapes_wrap_around():
    """A shape that leaves is back on the other side: what a lone shape covers stays the same all along."""
    steady = 0
    for i in range(40):
        _, mask = render_clip("translate_right", np.random.default_rng([1, i]), 64, 40)
        area = mask.sum((1, 2))
        steady += np.ptp(area) < 0.1 * area.mean()
    assert steady > 35


# ----------------------------------------------------------------------------------- only motion shows the label


def test_the_draws_do_not_look_at_the_kind():
    for seed in range(5):
        streams = [np.random.default_rng(seed) for _ in KINDS]
        first = [render_clip(kind, rng, SIZE, 3) for kind, rng in zip(KINDS, streams, strict=True)]
        assert len({rng.bytes(8) for rng in streams}) == 1  # the same number of draws
        assert all(np.median(first[0][0] == clip) == 1 for clip, _ in first)  # the same background


@pytest.mark.parametrize("kind", KINDS)
def test_place_and_turn_are_uniform_in_every_frame(kind):
    """On a torus a place is uniform if and only if all its Fourier modes vanish: the lowest are tested."""
    rng = np.random.default_rng(KINDS.index(kind))
    count, frames = 1500, 32
    tracks = np.stack([path_of(draw_shape(rng, 64, np.full(3, 0.5)), kind, frames) for _ in range(count)])  # [n, 3, F]
    angles = tracks * np.array([2 * np.pi / 64, 2 * np.pi / 64, 1])[:, None]
    for modes in itertools.product((-1, 0, 1, 2), repeat=3):
        if any(modes):
            phase = np.tensordot(np.array(modes), angles, (0, 1))  # [n, F]
            strength = np.abs(np.exp(1j * phase).mean(0))  # about 1 / sqrt(n) where uniform
            assert strength.max() < 5 / np.sqrt(count), (kind, modes)


def nearest_class_mean(features, labels):
    """Accuracy on the second half of the class means of the first half; features [n, d] scaled to unit variance."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    half = len(features) // 2
    means = np.stack([features[:half][labels[:half] == k].mean(0) for k in range(len(KINDS))])
    distance = np.square(features[half:, None] - means).sum(-1)
    return (distance.argmin(1) == labels[half:]).mean()


def test_a_single_frame_does_not_show_the_label(rendered):
    clips, masks, labels = rendered
    chance, limit = 0.1, 0.1 + 4 * np.sqrt(0.1 * 0.9 / 200)
    for t in (0, FRAMES // 2, FRAMES - 1):
        small = clips[:, t].reshape(400, 8, SIZE // 8, 8, SIZE // 8, 3).mean((2, 4)).reshape(400, -1)
        where = masks[:, t].reshape(400, 8, SIZE // 8, 8, SIZE // 8).mean((2, 4)).reshape(400, -1)
        colour = np.concatenate([clips[:, t].mean((1, 2)), clips[:, t].std((1, 2)), where.sum(1, keepdims=True)], 1)
        for features in (small, where, colour):
            assert nearest_class_mean(features, labels) < limit, (chance, t)


def test_motion_shows_the_label(rendered):
    """The shift of the mask between frames, by its lowest Fourier phase, tells the four directions apart."""
    _, masks, labels = rendered
    wave = np.exp(-2j * np.pi * np.arange(SIZE) / SIZE)
    along_x, along_y = masks.sum(2) @ wave, masks.sum(3) @ wave  # [n, T]
    shifts = np.stack([-np.angle((a[:, 1:] * a[:, :-1].conj()).sum(1)) for a in (along_x, along_y)], 1)
    guesses = {0: shifts[:, 0], 1: -shifts[:, 0], 2: -shifts[:, 1], 3: shifts[:, 1]}  # right, left, up, down
    four = labels < 4
    guess = np.stack([guesses[k] for k in range(4)], 1).argmax(1)
    assert (guess == labels)[four].mean() > 0.97


def test_speeds_of_the_kinds_are_alike():
    """Root mean square speed of the rim in pixels a frame: the kinds share one range (printed: pytest -s)."""
    for kind in KINDS:
        speeds = []
        for seed in range(200):
            shape = draw_shape(np.random.default_rng(seed), 64, np.full(3, 0.5))
            x, y, turn = path_of(shape, kind, 32)
            speeds.append(np.sqrt((np.diff(x) ** 2 + np.diff(y) ** 2 + (shape["radius"] * np.diff(turn)) ** 2).mean()))
        print(f"{kind:24s} {np.min(speeds):.2f} to {np.max(speeds):.2f}, mean {np.mean(speeds):.2f}")
        assert 1.2 < np.min(speeds) and np.max(speeds) < 3.6 and abs(np.mean(speeds) - 2.25) < 0.15, kind
