"""Re-encodes videos for training: smaller frames, H.264 in .mp4, a key frame every few frames, no audio.

Loading a clip decodes all frames since the last key frame, so small frames and close key frames make it cheap, and
without B-frames every decoder seeks exactly. It pays for large videos and for key frames far apart (Kinetics-400);
UCF101 and HMDB51 as distributed, 240 pixels high and MPEG-4, load as fast.

    python tools/resize_videos.py --list lists/train.csv lists/val.csv --output small
    python tools/resize_videos.py --videos kinetics/train --output small

With --list, the listed videos are re-encoded and small/train.csv, small/val.csv list the results with their labels.
The folders below --videos are kept; without --videos, those below the folder that all listed videos share. Frames keep
their number, order and times; phone videos are turned upright. A video that is small enough is re-encoded at its size
(even: H.264 needs it).

Start it again after an interruption: what is finished is not done again, and no file has its final name before it is
complete. Videos that cannot be read are named in failed.txt and left out of the new lists; the exit status is then 1.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.decoding import PyAVReader, VideoError, decoders_for, display_matrices, open_video, upright
from datasets.lists import read_list
from tools.common import Formatter, find_videos, replacing, run_all, run_tool, temporary_name, write_list, write_text
from utils import UsageError

if TYPE_CHECKING:
    import av


def output_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Even height and width with the given short side; a smaller video keeps its size, less an odd row or column."""
    if min(height, width) <= short_side:
        return height // 2 * 2, width // 2 * 2
    return tuple(2 * round(side * short_side / min(height, width) / 2) for side in (height, width))


def resize_video(source: str, target: str, short_side: int, gop: int, crf: int) -> None:
    """Writes source to target, which appears when it is complete. Raises: VideoError, naming source."""
    import av

    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open_video(source, "pyav") as video, replacing(target) as temporary:
        try:
            with av.open(temporary, "w", format="mp4") as result:
                encode(video, result, short_side, gop, crf)
        except av.FFmpegError as error:
            raise VideoError(source, f"cannot be re-encoded ({error})") from error


def encode(video: PyAVReader, result: "av.container.OutputContainer", short_side: int, gop: int, crf: int) -> None:
    """Encodes all frames that training reads of an open video into a container. Raises: VideoError."""
    import av
    import numpy as np

    stream = video.stream
    rate = stream.average_rate or stream.guessed_rate or 25
    step = max(1, round(1 / (rate * stream.time_base)))
    # AVI gives the frames of a codec with B-frames wrong times (HMDB51); those of its packets are right
    known = sorted({packet.pts for packet in video.packets} - {None}) if video.container.format.name == "avi" else []
    # one of each for all frames: a fresh one each is slow
    convert, copy = (av.video.reformatter.VideoReformatter().reformat for _ in range(2))
    matrix_of = display_matrices(copy)
    output = first = last = None
    for number, frame in enumerate(video.plain()):
        time = frame.pts if not known else known[number] if number < len(known) else None
        if last is not None and (time is None or time <= last):
            time = last + step
        last = time or 0
        matrix = matrix_of(frame)
        if output is None:
            size, first = (frame.height, frame.width), last
            # tune: a tenth more bytes, a quarter to a third less time to decode
            options = {"crf": str(crf), "g": str(gop), "bf": "0", "preset": "veryfast", "tune": "fastdecode"}
            output = result.add_stream("libx264", rate=rate, options=options)
            height, width = output_size(*size, short_side)
            output.height, output.width = upright(np.empty((height, width, 0)), matrix).shape[:2]
            output.pix_fmt = "yuv420p"
            context = output.codec_context
            context.thread_count = 1
            context.time_base = stream.time_base
            for tag in ("color_range", "colorspace", "color_primaries", "color_trc"):
                setattr(context, tag, getattr(frame, tag))
        if (frame.height, frame.width) != size:
            raise VideoError(video.path, "the frame size changes within the video")
        turned = tuple(np.sign(matrix)) != (1, 0, 0, 1)
        image = convert(frame, width, height, "yuv444p" if turned else "yuv420p", interpolation="BICUBIC", threads=1)
        if turned:
            planes = upright(image.to_ndarray().transpose(1, 2, 0), matrix).transpose(2, 0, 1)  # [3, H, W]
            image = convert(av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), "yuv444p"), format="yuv420p")
        image.pts, image.time_base, image.duration = last - first, stream.time_base, frame.duration
        image.pict_type = 0  # else the encoder repeats the source's key frames and B-frames
        result.mux(output.encode(image))
    if output is None:
        raise VideoError(video.path, "no frame can be decoded")
    result.mux(output.encode())


def plan(args: argparse.Namespace) -> tuple[dict[str, tuple[list[str], list[int]]], dict[str, str]]:
    """Returns lists {name: (sources, labels)} ({} without --list) and targets {source: target}, absolute paths.
    Raises: UsageError, ListError."""
    output = os.path.abspath(args.output)
    root = os.path.abspath(args.videos) if args.videos else None
    if root and not os.path.isdir(root):
        raise UsageError(f"--videos {args.videos}: no such folder")
    lists = {os.path.basename(path): read_list(path) for path in args.list or ()}
    if len(lists) < len(args.list or ()):
        raise UsageError("--list: two lists have the same name, and so would the new ones")
    sources = list(dict.fromkeys(path for paths, _ in lists.values() for path in paths))
    if not lists:
        sources = list(find_videos(root, skip=output))
        if not sources:
            raise UsageError(f"--videos {args.videos}: no video file there")
    root = root or os.path.commonpath([os.path.dirname(path) for path in sources])
    targets, taken = {}, {}
    for source in sources:
        inside = os.path.relpath(source, root)
        if inside.startswith("../"):
            raise UsageError(f"{source} is listed, but is not below --videos {args.videos}")
        target = targets[source] = os.path.splitext(os.path.join(output, inside))[0] + ".mp4"
        if target in taken:
            raise UsageError(f"{taken[target]} and {source} would both become {target}: rename one")
        taken[target] = source
    for target, source in taken.items():
        if target in targets:
            raise UsageError(f"{source} would become {target}, which is a video to re-encode: choose another --output")
    return lists, targets


def resize_videos(args: argparse.Namespace) -> int:
    """Returns 1 if any video could not be re-encoded, else 0."""
    if args.short_side < 16 or args.short_side % 2 or not 1 <= args.gop <= 10_000 or not 0 <= args.crf <= 51:
        raise UsageError("--short_side must be even and at least 16, --gop from 1 to 10000, --crf from 0 to 51")
    if not args.list and not args.videos:
        raise UsageError("give --list or --videos")
    lists, targets = plan(args)
    decoders_for("", "pyav")  # a missing library is an error now and not for every video
    settings = dict(short_side=args.short_side, gop=args.gop, crf=args.crf)
    record = os.path.join(args.output, "settings.json")
    os.makedirs(args.output, exist_ok=True)
    text = json.dumps(settings) + "\n"
    if os.path.exists(record) and not (os.path.isfile(record) and Path(record).read_bytes() == text.encode()):
        raise UsageError(f"--output {args.output} has videos of other settings ({record}): choose another folder")
    write_text(record, text)

    todo = [(source, target) for source, target in targets.items() if not os.path.exists(target)]
    print(f"{len(targets)} videos, {len(targets) - len(todo)} are done already")
    resize = functools.partial(resize_video, **settings)
    outcomes = run_all(resize, todo, args.num_workers, args.timeout)
    failed = {source: reason for (source, _), (_, reason) in zip(todo, outcomes, strict=True) if reason is not None}
    for source in failed:
        Path(temporary_name(targets[source])).unlink(missing_ok=True)  # of a process that died
    report = os.path.join(args.output, "failed.txt")
    Path(report).unlink(missing_ok=True)  # of an earlier run
    if failed:
        write_text(report, "".join(f"{source}: {reason}\n" for source, reason in failed.items()))
        print(f"{report}: the {len(failed)} videos that could not be re-encoded")
    for name, (paths, labels) in lists.items():
        listed = [(targets[path], label) for path, label in zip(paths, labels, strict=True) if path not in failed]
        path = os.path.join(args.output, name)
        write_list(path, [target for target, _ in listed], [label for _, label in listed])
        print(f"{path}: {len(listed)} of {len(paths)} videos")
    return 1 if failed else 0


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--list", nargs="+", action="extend", help="list(s) of videos: `path label` on each line")
    parser.add_argument("--videos", metavar="FOLDER", help="all videos below; with --list, where paths start")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the new videos and lists go")
    parser.add_argument("--short_side", type=int, default=256, help="pixels; smaller videos are not enlarged")
    parser.add_argument("--gop", type=int, default=16, help="frames from one key frame to the next, at most")
    parser.add_argument(
        "--crf", type=int, default=20, help="quality, 0 to 51: 18 = no visible loss, more = smaller files"
    )
    parser.add_argument("--num_workers", type=int, default=4, help="videos re-encoded at a time, one process each")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="longest time for one video")
    return parser


def main(arguments: list[str] | None = None) -> None:
    run_tool(resize_videos, get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
