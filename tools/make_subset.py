"""Draws a smaller list that keeps the class distribution.

This is the small-scale setting of the paper (arXiv 2505.08561): about 15 % of the training videos of Kinetics-400 or
Something-Something V2, as many as the validation set has; the validation list stays as it is.

    python tools/make_subset.py --list lists/train.csv --output lists/train_small.csv
    python tools/make_subset.py --list lists/train.csv --output lists/train_small.csv --count_like lists/val.csv

Every class keeps its share to within one video (largest remainders) and, where the number of videos allows, at least
one. The draw depends on the seed and the paths, not on the order of the lines; with one seed, a class's videos in a
smaller subset are among those in a larger one. Lines come out sorted by label and path.
"""

import argparse
import os
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.lists import read_list
from tools.common import Formatter, run_tool, write_list
from utils import UsageError


def allocate(sizes: dict[int, int], total: int) -> dict[int, int]:
    """Shares out total videos over classes of the given sizes ({label: videos}), in proportion.

    Returns: {label: videos}, summing to total, none above its size, none 0 where total >= the number of classes.
    """
    all_videos = sum(sizes.values())
    least = 1 if total >= len(sizes) else 0
    shares = {label: max(least, total * size // all_videos) for label, size in sizes.items()}

    def shortfall(label: int) -> int:
        """Exact, in videos times all_videos."""
        return total * sizes[label] - shares[label] * all_videos

    while sum(shares.values()) < total:
        shares[max(shares, key=shortfall)] += 1
    while sum(shares.values()) > total:  # the rare classes got more than their share
        shares[min((label for label in shares if shares[label] > least), key=shortfall)] -= 1
    return shares


def draw(paths: list[str], labels: list[int], total: int, seed: int) -> tuple[list[str], list[int]]:
    """Returns paths and labels of a subset of exactly total videos, sorted by label and path."""
    classes = defaultdict(list)
    for path, label in zip(paths, labels, strict=True):
        classes[label].append(path)
    shares = allocate({label: len(classes[label]) for label in sorted(classes)}, total)
    chosen = []
    for label, share in shares.items():
        videos = sorted(classes[label])
        random.Random(f"{seed} {label}").shuffle(videos)
        chosen += [(path, label) for path in sorted(videos[:share])]
    return [path for path, _ in chosen], [label for _, label in chosen]


def make_subset(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    paths, labels = read_list(args.list)
    if args.count_like is not None:
        flag, total = f"--count_like {args.count_like}", len(read_list(args.count_like)[0])
    elif args.count is not None:
        flag, total = f"--count {args.count}", args.count
    else:
        flag = f"--fraction {args.fraction:g}"
        if not 0 < args.fraction <= 1:
            raise UsageError(f"{flag}: give a share of the list above 0 and at most 1")
        total = round(args.fraction * len(paths))
    if not 1 <= total <= len(paths):
        raise UsageError(f"{flag}: {total} videos cannot be drawn from the {len(paths)} of {args.list}")
    if os.path.realpath(args.output) == os.path.realpath(args.list):
        raise UsageError(f"--output {args.output} is the list itself: choose another name")
    chosen, chosen_labels = draw(paths, labels, total, args.seed)
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    write_list(args.output, chosen, chosen_labels)
    for path, counted in ((args.list, Counter(labels)), (args.output, Counter(chosen_labels))):
        sizes = counted.values()
        print(f"{path}: {sum(sizes)} videos, {len(sizes)} classes of {min(sizes)} to {max(sizes)}")
    lost = sorted(set(labels) - set(chosen_labels))
    if lost:
        print(f"warning: fewer videos than classes; {len(lost)} have none, among them label {lost[0]}")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--list", required=True, help="list to draw from: `path label` on each line")
    parser.add_argument("--output", required=True, help="list to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=float, default=0.15, help="share of the list's videos")
    size.add_argument("--count", type=int, help="number of videos, instead of --fraction")
    size.add_argument("--count_like", metavar="LIST", help="as many videos as this list has, instead of --fraction")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other videos")
    return parser


def main(arguments: list[str] | None = None) -> None:
    run_tool(make_subset, get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
