"""Decodes every video of one or more lists before training does, and writes lists without the bad ones.

    python tools/check_videos.py --list lists/train.csv lists/val.csv --output checked --num_workers 16

writes checked/train.clean.csv (a list: the videos that decode), checked/train.report.csv (one line per video: path,
label, status, reason, frames, decoded, errors, width, height, decoder), and the same for val. The exit status is 1 if
any video is bad, so that a script can test it.

A video is good if training reads it. Training, the test and resize_videos.py continue after a damaged packet, as
players do. So a damaged or truncated video is good as far as it decodes: `errors` counts packets that do not decode, or
in part only, and `reason` says what the file's header claims beyond the frames found. Remove such videos yourself if
you do not want them. `frames` is the number that training draws clips from, `decoded` the number of frames when
everything was decoded. They differ only where no packet's header shows the damage; a clip with such a frame is then
drawn again. Where one decoder refused a video and the other read it, `reason` has the refusal of the first. Each video
is read in a process of its own: a file on which the decoder crashes or never returns is a bad video, and the check
continues.
"""

import argparse
import csv
import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.decoding import DECODERS, MAX_SHORTFALL, RefusedVideo, VideoError, decoders_for, open_video
from datasets.lists import read_list
from tools.common import Formatter, Outcome, run_all, run_tool, write_list, write_text
from utils import UsageError

COLUMNS = ("path", "label", "status", "reason", "frames", "decoded", "errors", "width", "height", "decoder")


def check_video(path: str, decoder: str) -> dict:
    """Decodes a video as training would, with the other back end where "auto" allows it and the first one fails.

    Returns: dict(frames, decoded, errors, width, height, decoder, reason = why the first back end failed, or what the
    header claims and is not there, or None).
    Raises: VideoError with the first back end's reason.
    """
    refusal = None
    for name in decoders_for(path, decoder):
        try:
            with open_video(path, name) as video:
                found = video.check()
                missing = video.missing()
        except VideoError as error:
            refusal = refusal or error
            if isinstance(error, RefusedVideo):
                break
            continue
        reason = refusal and str(refusal).removeprefix(f"{path}: ")
        if reason is None and missing > MAX_SHORTFALL:
            reason = f"truncated or damaged: {missing} frames that its header claims are not there"
        return dict(found, reason=reason)
    raise refusal


def check_lists(args: argparse.Namespace, check: Callable[..., dict] = check_video) -> int:
    """Returns 1 if any video is bad, else 0. check: see check_video. Raises UsageError, ListError."""
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
    return 1 if any(reason is not None for _, reason in outcomes.values()) else 0


def write_results(prefix: str, paths: list[str], labels: list[int], outcomes: dict[str, Outcome]) -> None:
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
    found = [found for found, reason in map(outcomes.get, paths) if reason is None]
    damaged = len([one for one in found if one.get("errors") or one["reason"]])
    if damaged:
        print(f"{prefix}.report.csv: {damaged} of the good videos are damaged (columns errors and reason)")
    clean = f"{prefix}.clean.csv"
    if good:
        write_list(clean, *zip(*good, strict=True))
        print(f"{clean}: {len(good)} of {len(paths)} videos are good")
    else:
        Path(clean).unlink(missing_ok=True)  # of an earlier check
        print(f"{prefix}.report.csv: none of {len(paths)} videos is good, no clean list is written")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--list", required=True, nargs="+", action="extend", help="list(s): `path label` on each line")
    parser.add_argument("--output", required=True, help="folder for the clean lists and the reports")
    parser.add_argument("--num_workers", type=int, default=4, help="videos decoded at a time, one process each")
    parser.add_argument("--decoder", default="auto", choices=["auto", *DECODERS], help="as in training")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="longest time for one video")
    return parser


def main(arguments: list[str] | None = None) -> None:
    run_tool(check_lists, get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
