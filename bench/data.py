"""Clips per second of the pre-training loader, as a ratio to VideoMAE's published way of loading, in the same run.

    python bench/data.py [--videos LIST] [--rounds 5] [--workers 0 1 2] [--clips 24] [flags below]

The reference is `classic`, that way in our own words: decord, one thread; the 16 frames as PIL images, each cropped and
resized (bilinear) by PIL; stacked, made float, normalised, one clip per decode. Ours ends at uint8 and leaves the last
steps to the device. `resized` are the same files after tools/resize_videos.py with its defaults. All go through
DataLoader with the same settings and one thread per process. Rounds visit every row in turn, which spreads the noise of
a shared machine over all; medians over rounds are printed, in brackets the ratio to `classic` with as many workers. A
second table says where a clip's milliseconds go.

--videos is a list, `path label` per line. Without it files are made: 320 x 240, 300 frames of 1.1 kB, H.264 with x264's
defaults (key frames up to 250 apart, B-frames, crf 23). They show a texture with about the 1/f spectrum of natural
images, panned by half pixels, a patch of another that crosses it, and a little noise.
"""

import argparse
import contextlib
import functools
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from common import header, print_table, time_rounds
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datasets import decoding, transforms
from datasets.build import EpochSampler, _worker_settings, build_pretraining_loader
from datasets.lists import read_list
from datasets.video import clip_indices
from tools import resize_videos
from utils import peak_memory


def make_video(path, seed, frames, height, width):
    """Writes one test file (see above); the same arguments give the same frames."""
    import av

    rng = np.random.default_rng(seed)

    def texture(side):  # uint8 [side, side, 3]
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
        spectrum = np.fft.fft2(rng.standard_normal((3, side, side))) / np.maximum(frequency, 1 / side) ** 1.3
        image = np.fft.ifft2(spectrum).real
        image = image[0] + 0.4 * image  # mostly grey
        return np.clip(128 + 50 * image / image.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)

    ground, patch_of = texture(4 * width), texture(height)  # the ground at twice the resolution of a frame
    turn, speed = rng.uniform(0, 2 * np.pi, 4), np.array([0.5, 0.7, 1.1, 0.9]) / 30
    noise = rng.normal(0, 2, (8, height, width, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            place = 0.5 + 0.5 * np.sin(turn + speed * number)  # y, x of ground and of patch, 0 .. 1
            y, x = (place[:2] * (4 * width - 2 * np.array([height, width]))).astype(int)
            image = ground[y : y + 2 * height, x : x + 2 * width].reshape(height, 2, width, 2, 3).mean((1, 3))
            y, x = (place[2:] * (np.array([height, width]) - height // 3)).astype(int)
            image[y : y + height // 3, x : x + height // 3] = patch_of[: height // 3, : height // 3]
            image = np.clip(image + noise[number % 8], 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


class Classic(Dataset):
    """What VideoMAE's loader does for one clip: (index, seed) -> float32 [3, T, S, S], normalised."""

    def __init__(self, args):
        self.args, (self.paths, _) = args, read_list(args.data_path)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        import decord

        index, args, rng = item[0], self.args, random.Random(item[1])
        reader = decord.VideoReader(self.paths[index], num_threads=1)
        frames = reader.get_batch(clip_indices(len(reader), args.num_frames, args.sampling_rate, rng)).asnumpy()
        images = [Image.fromarray(frame) for frame in frames]
        top, left, h, w = transforms.multi_scale_crop_box(*frames.shape[1:3], args.input_size, rng)
        size = (args.input_size, args.input_size)
        images = [image.crop((left, top, left + w, top + h)).resize(size, Image.BILINEAR) for image in images]
        clip = torch.from_numpy(np.concatenate(images, axis=2))  # [S, S, 3T]
        clip = clip.permute(2, 0, 1).contiguous().float().div(255).unflatten(0, (args.num_frames, 3)).transpose(0, 1)
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in transforms.mean_and_std(True))
        return clip.sub(mean).div(std)


def make_loader(files, flags, num_workers, num_sample=1, classic=False):
    """A loader of flags.clips clips an epoch, 4 a batch: the list again and again."""
    args = argparse.Namespace(
        data_path=f"{files}.{num_sample}",
        num_frames=16,
        sampling_rate=4,
        input_size=flags.size,
        crop="multiscale",
        train_interpolation="bicubic",
        color_jitter=0.0,
        num_sample=num_sample,
        decoder=flags.decoder,
        batch_size=4 // num_sample,
        num_workers=num_workers,
        pin_mem=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
        seed=0,
        max_short_side=flags.max_short_side,
    )
    paths, count = read_list(files)[0], flags.clips // num_sample
    Path(args.data_path).write_text("".join(f"{path} 0\n" for path in (paths * count)[:count]))
    if not classic:
        return build_pretraining_loader(args)
    dataset = Classic(args)
    return DataLoader(
        dataset, 4, sampler=EpochSampler(len(dataset), args.seed), drop_last=True, **_worker_settings(args)
    )


def one_epoch(loader):
    """A function that loads one more epoch and returns its number of clips."""

    def call():
        loader.sampler.set_epoch(loader.sampler.epoch + 1)
        return sum(len(batch if torch.is_tensor(batch) else batch["video"]) for batch in loader)

    return call


def shares(make):
    """Milliseconds of a clip of ours in one process, by timing the parts where they are called; the last is the sum."""
    parts = [(decoding, "open_video"), (decoding.VideoReader, "read"), (transforms, "resize")]
    spent = dict.fromkeys(parts, 0.0)

    def timed(part):
        function = getattr(*part)

        def call(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - begin

        return call

    load = one_epoch(make(num_workers=0))
    load()
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(patch.object(*part, timed(part)))
        begin = time.perf_counter()
        clips = load()
        total = time.perf_counter() - begin
    return [seconds / clips * 1e3 for seconds in (*spent.values(), total - sum(spent.values()), total)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", help="list of videos (made ones)")
    parser.add_argument("--rounds", default=5, type=int, help="timed visits of every row (5)")
    parser.add_argument("--workers", default=[0, 1, 2], type=int, nargs="+", help="loader processes (0 1 2)")
    parser.add_argument("--clips", default=24, type=int, help="a visit; a multiple of 4 (24)")
    parser.add_argument("--size", default=224, type=int, help="height and width of a clip; of made files too (224)")
    parser.add_argument("--files", default=5, type=int, help="made files (5)")
    parser.add_argument("--frames", default=300, type=int, help="of a made file (300)")
    parser.add_argument("--decoder", default="auto", choices=["auto", *decoding.DECODERS], help="of ours (auto)")
    parser.add_argument("--max_short_side", default=0, type=int, help="of ours; 0: native (0)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare(flags, Path(folder))


def compare(flags, folder):
    """Makes the files and prints the tables."""
    if flags.videos:
        paths = read_list(flags.videos)[0]
    else:
        paths = [str(folder / f"{number}.mp4") for number in range(flags.files)]
        for seed, path in enumerate(paths):
            make_video(path, seed, flags.frames, *(side * flags.size // 224 // 16 * 16 for side in (240, 320)))
    small = [str(folder / f"resized/{number}.mp4") for number in range(len(paths))]
    settings = resize_videos.get_parser().parse_args(["--output", "none"])
    for source, target in zip(paths, small, strict=True):
        resize_videos.resize_video(source, target, settings.short_side, settings.gop, settings.crf)
    files, resized = folder / "files.csv", folder / "resized.csv"
    for listing, listed in ((files, paths), (resized, small)):
        listing.write_text("".join(f"{path} 0\n" for path in listed))
    ours = {
        "ours": functools.partial(make_loader, files, flags),
        "ours, 4 clips a decode": functools.partial(make_loader, files, flags, num_sample=4),
        "ours, resized": functools.partial(make_loader, resized, flags),
        "ours, resized, 4 clips": functools.partial(make_loader, resized, flags, num_sample=4),
    }
    rows = {
        "classic": functools.partial(make_loader, files, flags, classic=True),
        "classic, resized": functools.partial(make_loader, resized, flags, classic=True),
        **ours,
    }
    calls = {(name, n): one_epoch(make(num_workers=n)) for n in flags.workers for name, make in rows.items()}
    seconds = time_rounds(calls, flags.rounds, torch.device("cpu"))

    def cell(name, workers):
        own, reference = seconds[name, workers], seconds["classic", workers]
        ratio = statistics.median(r / t for t, r in zip(own, reference, strict=True))
        return f"{flags.clips / statistics.median(own):.1f} ({ratio:.2f}x)"

    print(header(torch.device("cpu"), "uint8"))
    size = sum(map(os.path.getsize, paths)) / len(paths) / 1e3
    visits = f"{flags.rounds} rounds of {flags.clips} clips"
    print(f"{len(paths)} files of {size:.0f} kB; clips/s by number of loader processes, {visits}")
    print_table(["", *map(str, flags.workers)], [[name, *(cell(name, n) for n in flags.workers)] for name in rows])
    times = {name: shares(make) for name, make in ours.items()}
    columns = ["ms per clip, one process", "open", "decode to RGB", "crop, resize", "flip, copies, collate", "sum"]
    print_table(columns, [[name, *(f"{value:.2f}" for value in values)] for name, values in times.items()])
    print(f"peak resident memory of this process: {peak_memory(torch.device('cpu')) * 1024:.0f} MiB")


if __name__ == "__main__":
    main()
