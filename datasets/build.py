"""Data sets by name, loaders of clips for training and of views for evaluation, and the training order."""

import functools
import os
import signal
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from datasets.lists import ListError
from datasets.transforms import (
    FinetuneTransform,
    PretrainTransform,
    auto_augmentation,
    mean_and_std,
    spatial_crops,
)
from datasets.video import EvalVideoDataset, TrainVideoDataset, collate, collate_views

LOADER_TIMEOUT = 1800  # seconds without a batch after which a loader process, or the disk, counts as hanging


class DataSet(NamedTuple):
    """What fine-tuning has to know of a data set."""

    num_classes: int | None  # None: --nb_classes says it
    segments: bool = False  # one frame of each of num_frames segments, rather than a dense clip
    flip: bool = True  # whether a mirrored video keeps its label


DATA_SETS = {
    "Kinetics-400": DataSet(400),
    "SSV2": DataSet(174, segments=True, flip=False),  # labels such as "pushing something from left to right"
    "UCF101": DataSet(101),
    "HMDB51": DataSet(51),
    "custom": DataSet(None),
}


class EpochSampler(Sampler):
    """Yields (index, item seed). The order of an epoch depends on (seed, epoch) alone; rank r takes every world_size-th
    entry, so that the ranks' batches of a step together are the batch of one process. The item seed depends on
    (seed, epoch, index) and travels with the index: workers that outlive an epoch need not be told of it.

    The last num_videos % world_size entries of an epoch's order are left out.
    """

    def __init__(self, num_videos, seed, rank=0, world_size=1, shuffle=True):
        self.num_videos, self.seed, self.shuffle = num_videos, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def set_epoch(self, epoch, start=0):
        """start: entries of this rank to leave out, which a run that was interrupted has had."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return self.num_videos // self.world_size

    def __iter__(self):
        order = np.arange(self.num_videos)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for index in order[: len(self) * self.world_size][self.rank :: self.world_size][self.start :].tolist():
            mixed = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint64)
            yield index, int(mixed[0] >> np.uint64(1))  # 63 bits: fits int64


def build_pretraining_loader(args, rank=0, world_size=1):
    """The loader of one process. Call loader.sampler.set_epoch(epoch) before each epoch.

    Reads of args: data_path, num_frames, sampling_rate, input_size, crop, train_interpolation, color_jitter,
    num_sample, decoder, max_short_side (0: native), batch_size (videos a process), num_workers, pin_mem, device, seed.
    Batches: see datasets.video.collate; batch_size videos, num_sample clips of each; a short last batch is dropped.
    Raises: ListError for the list, ValueError for a batch size that does not fit.
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


def build_finetuning_loader(args, rank=0, world_size=1, drop_last=True):
    """As build_pretraining_loader, with labels checked against args.nb_classes and the augmentation of fine-tuning.

    Reads further: num_segments, nb_classes, crop_scale, aa, flip, reprob, remode, recount, resplit,
    imagenet_default_mean_and_std.
    """
    mean, std = mean_and_std(args.imagenet_default_mean_and_std)
    size, interpolation = args.input_size, args.train_interpolation
    augment = auto_augmentation(args.aa, interpolation) if args.aa not in ("", "none") else None

    def transform(erase_probability):
        return FinetuneTransform(
            size, args.crop_scale, interpolation, augment, args.color_jitter, args.flip,
            erase_probability, args.remode, args.recount, mean, std,
        )  # fmt: skip

    dataset = TrainVideoDataset(
        find_list(args, "train"),
        args.num_frames,
        args.sampling_rate,
        transform(args.reprob),
        args.num_sample,
        args.decoder,
        num_segments=args.num_segments,
        num_classes=args.nb_classes,
        first_transform=transform(0.0) if args.resplit else None,
        max_short_side=args.max_short_side or None,
    )
    return _training_loader(dataset, args, rank, world_size, drop_last)


def build_evaluation_loader(args, split, rank=0, world_size=1):
    """Views of the videos of one process: every world_size-th, none dropped and none twice.

    split "val": one central view a video; "test": test_num_segment x test_num_crop views.
    Batches: see datasets.video.collate_views; as many videos as have batch_size views, at least one.
    Reads of args: see build_finetuning_loader, and short_side_size.
    """
    num_views, num_crops = (1, 1) if split == "val" else (args.test_num_segment, args.test_num_crop)
    dataset = EvalVideoDataset(
        find_list(args, split),
        args.num_frames,
        args.sampling_rate,
        functools.partial(spatial_crops, size=args.input_size, short_side=args.short_side_size, num_crops=num_crops),
        num_views,
        args.num_segments,
        args.nb_classes,
        args.decoder,
    )
    return DataLoader(
        dataset,
        batch_size=max(args.batch_size // (num_views * num_crops), 1),
        sampler=range(rank, len(dataset), world_size),
        collate_fn=collate_views,
        **_worker_settings(args),
    )


def find_list(args, split):
    """The list file of a split "train", "val" or "test".

    data_path is VideoMAE's folder of train.csv, val.csv and test.csv, or the training list itself; eval_data_path and
    test_data_path name the others. Without a test list the validation list is tested. Raises ListError.
    """
    folder = args.data_path if os.path.isdir(args.data_path) else None
    if split == "train":
        return os.path.join(folder, "train.csv") if folder else args.data_path
    if split == "test" and args.test_data_path:
        return args.test_data_path
    if split == "test" and not args.eval_data_path and folder and os.path.isfile(os.path.join(folder, "test.csv")):
        return os.path.join(folder, "test.csv")
    if args.eval_data_path:
        return args.eval_data_path
    if folder is None:
        raise ListError(
            f"--data_path {args.data_path} is no folder with a val.csv: name the validation list with --eval_data_path"
        )
    return os.path.join(folder, "val.csv")


def _training_loader(dataset, args, rank, world_size, drop_last=True):
    if len(dataset) < args.batch_size * world_size:
        raise ValueError(
            f"{dataset.list_path} lists {len(dataset)} videos, a batch takes {args.batch_size} on each of {world_size} "
            f"process(es): lower --batch_size or give a longer list"
        )
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=EpochSampler(len(dataset), args.seed, rank, world_size),
        collate_fn=collate,
        drop_last=drop_last,
        **_worker_settings(args),
    )


def _worker_settings(args):
    return dict(
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and args.device == "cuda",
        persistent_workers=args.num_workers > 0,
        timeout=LOADER_TIMEOUT if args.num_workers else 0,
        worker_init_fn=_start_worker,
        # torch draws a seed for the workers: from here, so that the training process's random state is its own
        generator=torch.Generator().manual_seed(args.seed),
    )


def _start_worker(worker_id):
    torch.set_num_threads(1)  # workers share the cores with one another and with the training process
    # a scheduler, and a terminal, send them to all: the training process decides
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
