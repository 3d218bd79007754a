"""Decodes every video of one or more lists before training does, and writes lists without the bad ones.

    python tools/check_videos.py --list lists/train.csv lists/val.csv --output checked --num_workers 16

writes checked/train.clean.csv (a list: the videos that decode), checked/train.report.csv (one line a video: path,
label, status, reason, frames, decoded, width, height, decoder), and the same for val. The exit status is 1 if any
video is bad, so that a script can ask.

A video is good if training can read all of it: it opens, its frames decode to the end, and the header claims at most
two frames more than come out (HMDB51's files claim one; training repeats the last frame there). `frames` is what the
file claims, `decoded` what came out; decord does not say and has the claim there. Where one decoder refused a video and
the other read it, `reason` has the refusal of the first: the file may have lost its end, as a .webm or .avi file may
without any sign. Each video is read in a process of its own, so a file that crashes the decoder or makes it hang is
a bad video and not the end of the check.
"""

import argparse
import csv
import functools
import io
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.decoding import DECODERS, MAX_SHORTFALL, DecordReader, VideoError, decoders_for, open_video
from datasets.lists import read_list
from tools.common import Formatter, run_all, run_tool, write_list, write_text
from utils import UsageError

COLUMNS = ("path", "label", "status", "reason", "frames", "decoded", "width", "height", "decoder")
CHUNK = 16  # frames decoded at a time where a reader seeks: bounds the memory


def check_video(path, decoder):
    """Decodes a video as training would, with the other back end where "auto" allows it and the first one fails.

    Returns: dict(frames, decoded, width, height, decoder, reason = why the first back end failed, or None).
    Raises: VideoError with the first back end's reason.
    """
    refusal = None
    for name in decoders_for(path, decoder):
        try:
            with open_video(path, name) as video:
                reason = refusal and str(refusal).removeprefix(f"{path}: ")
                return dict(decode_all(video), decoder=name, reason=reason)
        except VideoError as error:
            refusal = refusal or error
    raise refusal


def decode_all(video):
    claimed = len(video)
    wanted = range(claimed)
    if not (isinstance(video, DecordReader) and video.path.lower().endswith(DecordReader.seekable)):
        wanted = (0, claimed - 1)  # a reader that does not seek decodes what is between, too, and need not keep it
    sizes, last = set(), -1
    for start in range(0, len(wanted), CHUNK):
        frames = video.decode(wanted[start : start + CHUNK])
        sizes |= {frame.shape[:2] for frame in frames.values()}
        last = max(frames, default=last)
    if last < 0 or claimed > last + 1 + MAX_SHORTFALL:
        raise VideoError(video.path, f"truncated or damaged: {claimed} frames claimed, {last + 1} decoded")
    if len(sizes) > 1:
        raise VideoError(video.path, "the frame size changes within the video")
    height, width = sizes.pop()
    return dict(frames=claimed, decoded=last + 1, width=width, height=height)


def check_lists(args, check=check_video):
    """Returns 1 if any video is bad, else 0. check: see check_video."""
    names = [Path(path).stem for path in args.list]
    if len(set(names)) < len(names):
        raise UsageError(f"two lists have the same name ({', '.join(names)}): check them into different folders")
    lists = {name: read_list(path) for name, path in zip(names, args.list, strict=True)}
    paths = list(dict.fromkeys(path for listed, _ in lists.values() for path in listed))
    decoders_for(paths[0], args.decoder)  # a missing library is an error now and not for every video
    os.makedirs(args.output, exist_ok=True)
    check = functools.partial(check, decoder=args.decoder)
    outcomes = run_all(check, [(path,) for path in paths], args.num_workers, args.timeout)
    outcomes = dict(zip(paths, outcomes, strict=True))
    for name, (listed, labels) in lists.items():
        write_results(os.path.join(args.output, name), listed, labels, outcomes)
    return int(any(reason is not None for _, reason in outcomes.values()))


def write_results(prefix, paths, labels, outcomes):
    """Writes PREFIX.report.csv and PREFIX.clean.csv. outcomes: {path: (what check_video returned, reason)}."""
    report = io.StringIO()
    table = csv.DictWriter(report, COLUMNS, lineterminator="\n")
    table.writeheader()
    good = []
    for path, label in zip(paths, labels, strict=True):
        found, reason = outcomes[path]
        status = "ok" if reason is None else "bad"
        table.writerow(dict(path=path, label=label, status=status, reason=reason) | (found or {}))
        if reason is None:
            good.append((path, label))
    write_text(f"{prefix}.report.csv", report.getvalue())
    clean = f"{prefix}.clean.csv"
    if good:
        write_list(clean, *zip(*good, strict=True))
        print(f"{clean}: {len(good)} of {len(paths)} videos are good")
    else:
        Path(clean).unlink(missing_ok=True)  # of an earlier check
        print(f"{prefix}.report.csv: none of {len(paths)} videos is good, no clean list is written")


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--list", required=True, nargs="+", action="extend", help="list(s): `path label` on each line")
    parser.add_argument("--output", required=True, help="folder for the clean lists and the reports")
    parser.add_argument("--num_workers", type=int, default=4, help="videos decoded at a time, one process each")
    parser.add_argument("--decoder", default="auto", choices=["auto", *DECODERS], help="as in training")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="longest time for one video")
    return parser


def main(arguments=None):
    run_tool(check_lists, get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
