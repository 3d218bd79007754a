"""Data sets by name, loaders of clips for training and of views for evaluation, and the training order."""

import argparse
import functools
import os
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from datasets.lists import ListError
from datasets.transforms import FinetuneTransform, PretrainTransform, auto_augmentation, mean_and_std, spatial_crops
from datasets.video import EvalVideoDataset, TrainVideoDataset, collate, collate_views

LOADER_TIMEOUT = 1800  # seconds without a batch after which training stops: a loader process or the disk hangs


class DataSet(NamedTuple):
    """What fine-tuning needs to know about a data set."""

    num_classes: int | None  # None: given by --nb_classes
    segments: bool = False  # one frame of each of num_frames segments, rather than a dense clip
    flip: bool = True  # whether a mirrored video keeps its label


DATA_SETS = {
    "Kinetics-400": DataSet(400),
    "Kinetics-600": DataSet(600),
    "Kinetics-700": DataSet(700),
    "Kinetics-710": DataSet(710),  # VideoMAE V2's union of the three
    "SSV2": DataSet(174, segments=True, flip=False),  # labels such as "pushing something from left to right"
    "UCF101": DataSet(101),
    "HMDB51": DataSet(51),
    "Diving48": DataSet(48),
    "EPIC-100-verb": DataSet(97),
    "EPIC-100-noun": DataSet(300),
    "custom": DataSet(None),
}


class EpochSampler(Sampler):
    """Yields (index, item seed).

    Sample order depends only on (seed, epoch); rank r takes every world_size-th entry, so that the ranks' batches of a
    step together are the batch of one process. The item seed depends only on (seed, epoch, index) and comes with the
    index, because persistent workers do not know the epoch. The last num_videos % world_size entries are left out.
    """

    def __init__(self, num_videos: int, seed: int, rank: int = 0, world_size: int = 1, shuffle: bool = True) -> None:
        self.num_videos, self.seed, self.shuffle = num_videos, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """start: entries of this rank to skip, which an interrupted run has already used."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.num_videos // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.num_videos)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        complete = order[: len(self) * self.world_size]
        for index in complete[self.rank :: self.world_size][self.start :].tolist():
            mixed = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint64)
            yield index, int(mixed[0] >> np.uint64(1))  # 63 bits: fits int64


def build_pretraining_loader(args: argparse.Namespace, rank: int = 0, world_size: int = 1) -> DataLoader:
    """The loader of one rank. Call loader.sampler.set_epoch(epoch) before each epoch.

    Reads of args: data_path, num_frames, sampling_rate, input_size, crop, train_interpolation, color_jitter,
    num_sample, decoder, max_short_side (0: native), batch_size (videos per rank), num_workers, pin_mem, device, seed.
    Batches: see datasets.video.collate; batch_size videos, num_sample clips of each; a short last batch is dropped.
    Raises: ListError for the list, ValueError if the list has fewer videos than a batch of all ranks.
    """
    transform = PretrainTransform(args.input_size, args.crop, args.train_interpolation, args.color_jitter)
    dataset = TrainVideoDataset(
        args.data_path,
        args.num_frames,
        args.sampling_rate,
        transform,
        args.num_sample,
        args.decoder,
        max_short_side=args.max_short_side or None,
    )
    return _training_loader(dataset, args, rank, world_size)


def build_finetuning_loader(
    args: argparse.Namespace, rank: int = 0, world_size: int = 1, drop_last: bool = True
) -> DataLoader:
    """As build_pretraining_loader, with labels checked against args.nb_classes and the augmentation of fine-tuning.

    Reads further: num_segments, nb_classes, task, crop_scale, aa, flip, reprob, remode, recount, resplit,
    imagenet_default_mean_and_std.
    """
    mean, std = mean_and_std(args.imagenet_default_mean_and_std)
    augment = None
    if args.aa not in ("", "none"):
        augment = auto_augmentation(args.aa, args.train_interpolation)
    make_transform = functools.partial(
        FinetuneTransform,
        args.input_size,
        args.crop_scale,
        args.train_interpolation,
        augment,
        args.color_jitter,
        args.flip,
        erase_mode=args.remode,
        erase_count=args.recount,
        mean=mean,
        std=std,
    )
    dataset = TrainVideoDataset(
        find_list(args, "train"),
        args.num_frames,
        args.sampling_rate,
        make_transform(erase_probability=args.reprob),
        args.num_sample,
        args.decoder,
        num_segments=args.num_segments,
        num_classes=args.nb_classes,
        # --resplit: the first clip of a video is never erased
        first_transform=make_transform(erase_probability=0.0) if args.resplit else None,
        max_short_side=args.max_short_side or None,
        task=args.task,
    )
    return _training_loader(dataset, args, rank, world_size, drop_last)


def build_evaluation_loader(
    args: argparse.Namespace, split: str, rank: int = 0, world_size: int = 1, paths: list[str] | None = None
) -> DataLoader:
    """Views of the videos of one rank: every world_size-th video, none dropped and none twice.

    split "val": one central view per video, "train" too; "test": test_num_segment x test_num_crop views. paths: of
    videos to read in place of the split's list.
    Batches: see datasets.video.collate_views; as many videos as have batch_size views, at least one.
    Reads of args: see build_finetuning_loader, and short_side_size.
    """
    num_views = num_crops = 1
    if split == "test":
        num_views, num_crops = args.test_num_segment, args.test_num_crop
    dataset = EvalVideoDataset(
        find_list(args, split) if paths is None else "",
        args.num_frames,
        args.sampling_rate,
        functools.partial(spatial_crops, size=args.input_size, short_side=args.short_side_size, num_crops=num_crops),
        num_views,
        args.num_segments,
        args.nb_classes,
        args.decoder,
        args.task,
        paths,
    )
    return DataLoader(
        dataset,
        batch_size=max(args.batch_size // (num_views * num_crops), 1),
        sampler=range(rank, len(dataset), world_size),
        collate_fn=collate_views,
        **_worker_settings(args),
    )


def find_list(args: argparse.Namespace, split: str) -> str:
    """The list file of a split "train", "val" or "test".

    data_path is VideoMAE's folder of train.csv, val.csv and test.csv, or the training list itself; eval_data_path and
    test_data_path name the others. Without a test list, the validation list is the test. Raises: ListError.
    """
    has_folder = os.path.isdir(args.data_path)
    if split == "train":
        return os.path.join(args.data_path, "train.csv") if has_folder else args.data_path
    if split == "test":
        if args.test_data_path:
            return args.test_data_path
        in_folder = os.path.join(args.data_path, "test.csv")
        if not args.eval_data_path and os.path.isfile(in_folder):
            return in_folder
    if args.eval_data_path:
        return args.eval_data_path
    if not has_folder:
        raise ListError(
            f"--data_path {args.data_path} is no folder with a val.csv: give the validation list as --eval_data_path"
        )
    return os.path.join(args.data_path, "val.csv")


def _training_loader(
    dataset: TrainVideoDataset, args: argparse.Namespace, rank: int, world_size: int, drop_last: bool = True
) -> DataLoader:
    if len(dataset) < args.batch_size * world_size:
        raise ValueError(
            f"{dataset.list_path} lists {len(dataset)} videos, a batch takes {args.batch_size} on each of {world_size} "
            f"rank(s): lower --batch_size or give a longer list"
        )
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=EpochSampler(len(dataset), args.seed, rank, world_size),
        collate_fn=collate,
        drop_last=drop_last,
        **_worker_settings(args),
    )


def _worker_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of DataLoader about its processes."""
    return dict(
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and args.device == "cuda",
        persistent_workers=args.num_workers > 0,
        timeout=LOADER_TIMEOUT if args.num_workers else 0,
        worker_init_fn=start_worker,
        # torch draws a seed for the workers: from this generator, so that no draw of the training process changes
        generator=torch.Generator().manual_seed(args.seed),
    )


def start_worker(worker_id: int) -> None:
    """Runs first in each loader process."""
    torch.set_num_threads(1)  # workers share the cores with one another and with the training process
    # schedulers and terminals signal all processes; only the training process decides when to stop
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
