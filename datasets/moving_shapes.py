"""The embedded data set: a textured shape moves over a smooth background; the label is the kind of motion.

    python -m datasets.moving_shapes --output DIR

writes H.264 clips, `train.csv` and `val.csv` (`path label`), `classes.txt`, and for every clip the true motion mask;
in translations/ the same lists of the first four kinds alone.
The label can be read from motion alone. What a frame shows (background, outlines, textures, sizes, starts) is drawn
without the label, and the frame is a torus, so that under every kind of motion a shape's position and orientation are
uniform at every instant: any single frame has the same distribution for all kinds.

Version 2. In version 1 the background had waves of 1/8 to 1/4 of the side, the shapes' own: most of the reconstruction
error was the still background's, and no mask taught motion. Now the background is predicted from few tokens, and what
a model does not know is the shape.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

KINDS = (
    "translate_right", "translate_left", "translate_up", "translate_down",
    "orbit_clockwise", "orbit_counterclockwise",
    "spin_clockwise", "spin_counterclockwise",
    "shake_horizontally", "shake_vertically",
)  # fmt: skip
TRANSLATIONS = 4  # the first kinds
OUTLINES = ("disc", "square", "triangle", "star", "ring")
FPS = 16
VERSION = 2  # raise it when the same settings start to give other clips


@dataclasses.dataclass(frozen=True)
class Look:
    """What decides how hard a clip is; lengths in sides of the frame, speeds in sides per frame.

    Raises ValueError for values that make no clip."""

    shape_size: tuple[float, float] = (0.175, 0.28)  # range of a shape's radius
    num_shapes: int = 1  # shapes that move as the label says
    shape_wave: tuple[float, float] = (0.125, 0.25)  # range of the wavelengths in a shape
    background_wave: tuple[float, float] = (0.75, 1.5)  # and in the background
    camera: float = 0.0  # speed at which background and shapes pan together, in a random direction
    distractors: int = 0  # shapes that move in a kind of their own, drawn without the label

    def __post_init__(self):
        for name in ("shape_size", "shape_wave", "background_wave"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 100:
                raise ValueError(f"--{name} {low} {high}: two lengths in sides, 0 < least <= most <= 100")
        if self.shape_size[1] > 0.4:
            raise ValueError(f"--shape_size {self.shape_size[0]} {self.shape_size[1]}: at most 0.4, or no background")
        if not 1 <= self.num_shapes <= 20 or not 0 <= self.distractors <= 20:
            raise ValueError(f"--num_shapes {self.num_shapes} --distractors {self.distractors}: 1 to 20 and 0 to 20")
        if not 0 <= self.camera <= 0.5:
            raise ValueError(f"--camera {self.camera}: sides per frame, 0 to 0.5")


# ---------------------------------------------------------------------------------------------------- appearance


def draw_texture(
    rng: np.random.Generator, size: int, mean: np.ndarray, wave: tuple[float, float]
) -> dict[str, np.ndarray]:
    """A band-limited texture in shades of one colour: dict(mean [3], wave [K, 2] in radians per pixel, phase [K],
    colour [K, 3]).

    wave: range of the wavelengths in sides. Four waves and one direction in colour space keep a patch simple enough
    for a small autoencoder to learn within minutes.
    """
    count = 4
    length = size / rng.uniform(1 / wave[1], 1 / wave[0], count)
    # spread the directions, else all waves may run the same way and leave flat stripes
    angle = rng.uniform(0, math.pi) + math.pi * (np.arange(count) + rng.uniform(0, 1, count)) / count
    colour = rng.uniform(0.5, 1, (1, 3)) * rng.choice([-1, 1], (count, 1))
    colour *= 0.23 / np.linalg.norm(colour, axis=1, keepdims=True)
    wave = 2 * math.pi / length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return dict(mean=mean, wave=wave, phase=rng.uniform(0, 2 * math.pi, count), colour=colour)


def paint(texture: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colours float [..., 3] of a texture at the points x, y (float [...], pixels)."""
    wave = texture["wave"]
    angle = x[..., None] * wave[:, 0] + y[..., None] * wave[:, 1] + texture["phase"]
    return texture["mean"] + np.sin(angle) @ texture["colour"]


def signed_distance(outline: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Pixels from the outline, positive inside, for points x, y (float [...]) in the shape's own frame."""
    r = np.hypot(x, y)
    if outline == "disc":
        return radius - r
    if outline == "ring":
        return np.minimum(radius - r, r - 0.45 * radius)
    if outline == "square":
        return 0.85 * radius - np.maximum(np.abs(x), np.abs(y))
    if outline == "triangle":
        corner = 1.2 * radius
        normals = [(math.cos(a), math.sin(a)) for a in (math.pi / 3, math.pi, 5 * math.pi / 3)]
        return corner / 2 - np.max([x * nx + y * ny for nx, ny in normals], axis=0)
    if outline == "star":  # fold the plane into one tenth of the star: there its edge is one straight line
        sector = 2 * math.pi / 5
        angle = np.abs((np.arctan2(y, x) + sector / 2) % sector - sector / 2)
        tip, notch = 1.2 * radius, 0.6 * radius
        notch_x, notch_y = notch * math.cos(sector / 2), notch * math.sin(sector / 2)
        along_x, along_y = notch_x - tip, notch_y  # the edge runs from (tip, 0) to the notch
        return (along_y * (r * np.cos(angle) - tip) - along_x * r * np.sin(angle)) / -math.hypot(along_x, along_y)
    raise ValueError(f"unknown outline {outline!r}")


# -------------------------------------------------------------------------------------------------------- motion


def draw_shape(
    rng: np.random.Generator,
    size: int,
    background_mean: np.ndarray,
    look: Look = Look(),  # noqa: B008  a constant
) -> dict[str, Any]:
    """One shape: its look, start, speed and swing, drawn without the kind of motion."""
    while True:  # a mean colour that a person can tell from the background's
        mean = rng.uniform(0.25, 0.75, 3)
        if np.linalg.norm(mean - background_mean) > 0.3:
            break
    return dict(
        outline=OUTLINES[rng.integers(len(OUTLINES))],
        texture=draw_texture(rng, size, mean, look.shape_wave),
        radius=rng.uniform(*look.shape_size) * size,
        speed=rng.uniform(1.5, 3.0) * size / 64,  # pixels a frame: root mean square over time, at the rim for a spin
        swing=rng.uniform(6.0, 12.0) * size / 64,  # radius of an orbit, amplitude of a shake
        centre=rng.uniform(0, size, 2),
        phase=rng.uniform(0, 2 * math.pi),
        turn=rng.uniform(0, 2 * math.pi),
    )


def path_of(shape: dict[str, Any], kind: str, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a shape is: x, y (pixels, y down) and turn (radians, clockwise on the screen), float [frames] each."""
    time = np.arange(frames)
    speed, swing, phase = shape["speed"], shape["swing"], shape["phase"]
    x, y = (np.full(frames, c) for c in shape["centre"])
    turn = np.full(frames, shape["turn"])
    motion, _, direction = kind.partition("_")
    sign = -1 if direction in ("left", "up", "counterclockwise") else 1
    if motion == "translate":
        along = sign * speed * time
        x, y = (x + along, y) if direction in ("left", "right") else (x, y + along)
    elif motion == "orbit":
        angle = phase + sign * speed / swing * time
        x, y = x + swing * np.cos(angle), y + swing * np.sin(angle)
    elif motion == "spin":
        turn = turn + sign * speed / shape["radius"] * time
    elif motion == "shake":
        along = swing * np.sin(phase + math.sqrt(2) * speed / swing * time)
        x, y = (x + along, y) if direction == "horizontally" else (x, y + along)
    else:
        raise ValueError(f"unknown kind of motion {kind!r}")
    return x, y, turn


def render_clip(
    kind: str,
    rng: np.random.Generator,
    size: int = 64,
    frames: int = 32,
    look: Look = Look(),  # noqa: B008  a constant
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one clip.

    Args: kind, one of KINDS; rng, a numpy Generator (the draws do not depend on kind); size in pixels; frames; look.
    Returns: clip uint8 [frames, size, size, 3]; mask bool [frames, size, size], True where a shape that moves as the
    label says is seen.
    """
    mean = rng.uniform(0.3, 0.7, 3)
    texture = draw_texture(rng, size, mean, look.background_wave)
    shapes = [(draw_shape(rng, size, mean, look), kind) for _ in range(look.num_shapes)]
    distractors = [(draw_shape(rng, size, mean, look), KINDS[rng.integers(len(KINDS))])
                   for _ in range(look.distractors)]  # fmt: skip
    direction = rng.uniform(0, 2 * math.pi)
    pan = look.camera * size * np.arange(frames)[:, None, None]  # [F, 1, 1], pixels
    pan_x, pan_y = pan * math.cos(direction), pan * math.sin(direction)
    grid_y, grid_x = np.mgrid[:size, :size] + 0.5
    if look.camera:
        clip = paint(texture, grid_x - pan_x, grid_y - pan_y)  # [F, S, S, 3]
    else:
        clip = np.repeat(paint(texture, grid_x, grid_y)[None], frames, axis=0)
    mask = np.zeros((frames, size, size), dtype=bool)
    for number, (shape, its_kind) in enumerate(distractors + shapes):  # the labelled ones in front
        x, y, turn = (a[:, None, None] for a in path_of(shape, its_kind, frames))
        dx = (grid_x - x - pan_x + size / 2) % size - size / 2  # [F, S, S], the nearest copy on the torus
        dy = (grid_y - y - pan_y + size / 2) % size - size / 2
        own_x, own_y = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        cover = np.clip(0.5 + signed_distance(shape["outline"], own_x, own_y, shape["radius"]), 0, 1)
        near = cover > 0  # a small part of the pixels: paint only these
        alpha = cover[near][:, None]
        clip[near] = (1 - alpha) * clip[near] + alpha * paint(shape["texture"], own_x[near], own_y[near])
        if number >= len(distractors):
            mask |= cover > 0.5
    return np.round(np.clip(clip, 0, 1) * 255).astype(np.uint8), mask


# ------------------------------------------------------------------------------------------------------- writing


def write_video(path: str | Path, clip: np.ndarray) -> None:
    """Encodes uint8 [T, H, W, 3] as H.264 (yuv420p, crf 12, 16 frames a second)."""
    import av

    # with B-frames or vector code that differs between processors, x264 gave one clip in twenty other bytes on each run
    options = {"crf": "12", "preset": "veryfast", "x264-params": "bframes=0:cpu-independent=1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for image in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_clip(output: Path, split: str, index: int, size: int, frames: int, seed: int, look: Look) -> str:
    """Writes clip number `index` of a split and its mask; returns its line of the list."""
    label = index % len(KINDS)
    name = f"{split}_{index:05d}"
    rng = np.random.default_rng([seed, ("train", "val").index(split), index])
    clip, mask = render_clip(KINDS[label], rng, size, frames, look)
    write_video(output / "videos" / f"{name}.mp4", clip)
    np.savez_compressed(output / "masks" / f"{name}.npz", mask=mask)
    return f"videos/{name}.mp4 {label}\n"


def write_dataset(
    output: str | Path,
    train: int = 320,
    val: int = 80,
    size: int = 64,
    frames: int = 32,
    seed: int = 0,
    workers: int | None = None,
    **look: Any,
) -> Path:
    """Writes the data set; the same settings give the same clips on any number of workers.

    Args: output folder; numbers of training and validation clips; frame side in pixels (even); frames per clip; seed;
    workers, threads that draw and encode (default: one per core); look: fields of Look.
    Returns: the output folder as a Path. A finished data set with the same settings is left as it is.
    Raises: ValueError when the folder contains something else, or the settings make no sense.
    """
    output = Path(output)
    look = Look(**{name: tuple(value) if isinstance(value, list) else value for name, value in look.items()})
    settings = dict(version=VERSION, train=train, val=val, size=size, frames=frames, seed=seed, kinds=list(KINDS))
    settings |= json.loads(json.dumps(dataclasses.asdict(look)))
    if size < 16 or size % 2 or frames < 2 or min(train, val) < len(KINDS):
        raise ValueError(f"need an even size >= 16, frames >= 2, and at least {len(KINDS)} clips a split (one a kind)")
    done = output / "settings.json"
    if done.exists():
        found = json.loads(done.read_text())
        if found.get("version") != VERSION:
            raise ValueError(
                f"{output} contains version {found.get('version')} of the moving shapes, this is version {VERSION}, "
                "which has other clips: choose another folder or delete it"
            )
        if found != settings:
            changed = [name for name in settings if found.get(name) != settings[name]]
            raise ValueError(
                f"{output} contains moving shapes with other settings ({', '.join(changed)}): choose another folder or "
                "delete it"
            )
        print(f"moving shapes: {output} is complete, nothing to do")
        return output
    if (output / "train.csv").exists():
        raise ValueError(f"{output} holds another or an unfinished data set: choose another folder or delete it")
    for folder in ("videos", "masks", "translations"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for split, count in (("val", val), ("train", train)):
            lines = pool.map(
                lambda i, split=split: write_clip(output, split, i, size, frames, seed, look), range(count)
            )
            lines = list(lines)
            (output / f"{split}.csv").write_text("".join(lines))
            few = [f"../{line}" for i, line in enumerate(lines) if i % len(KINDS) < TRANSLATIONS]
            (output / "translations" / f"{split}.csv").write_text("".join(few))
    for folder, kinds in ((output, KINDS), (output / "translations", KINDS[:TRANSLATIONS])):
        (folder / "classes.txt").write_text("\n".join(kinds) + "\n")
    partial = output / f"settings.json.{os.getpid()}"
    partial.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(partial, done)  # last and at once: its presence means the data set is complete
    print(f"moving shapes: wrote {train} + {val} clips of {frames} frames, {size} x {size}, to {output}")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=320, help="training clips")
    parser.add_argument("--val", type=int, default=80, help="validation clips")
    parser.add_argument("--size", type=int, default=64, help="frame side in pixels")
    parser.add_argument("--frames", type=int, default=32, help="frames per clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="threads (default: one per core)")
    parser.add_argument("--shape_size", type=float, nargs=2, default=list(Look.shape_size), metavar=("LEAST", "MOST"),
                        help="radius of a shape in sides of the frame")  # fmt: skip
    parser.add_argument("--num_shapes", type=int, default=Look.num_shapes, help="shapes that move as the label says")
    parser.add_argument("--shape_wave", type=float, nargs=2, default=list(Look.shape_wave), metavar=("LEAST", "MOST"),
                        help="wavelengths of the texture of a shape in sides")  # fmt: skip
    parser.add_argument("--background_wave", type=float, nargs=2, default=list(Look.background_wave),
                        metavar=("LEAST", "MOST"), help="wavelengths of the background in sides")  # fmt: skip
    parser.add_argument("--camera", type=float, default=Look.camera, help="pan of the whole scene, sides per frame")
    parser.add_argument("--distractors", type=int, default=Look.distractors, help="shapes that move without a label")
    try:
        write_dataset(**vars(parser.parse_args()))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
