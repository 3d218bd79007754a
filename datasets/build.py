"""The loader of pre-training clips and its sampler."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from datasets.transforms import PretrainTransform
from datasets.video import PretrainVideoDataset, collate


class EpochSampler(Sampler):
    """Yields (index, item seed). The order of an epoch depends on (seed, epoch) alone; rank r takes every world_size-th
    entry, so that the ranks' batches of a step together are the batch of one process. The item seed depends on
    (seed, epoch, index) and travels with the index: workers that outlive an epoch need not be told of it.

    The last num_videos % world_size entries of an epoch's order are left out.
    """

    def __init__(self, num_videos, seed, rank=0, world_size=1, shuffle=True):
        self.num_videos, self.seed, self.shuffle = num_videos, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.num_videos // self.world_size

    def __iter__(self):
        order = np.arange(self.num_videos)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for index in order[: len(self) * self.world_size][self.rank :: self.world_size].tolist():
            mixed = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint64)
            yield index, int(mixed[0] >> np.uint64(1))  # 63 bits: fits int64


def build_pretraining_loader(args, rank=0, world_size=1):
    """The loader of one process. Call loader.sampler.set_epoch(epoch) before each epoch.

    Reads of args: data_path, num_frames, sampling_rate, input_size, crop, train_interpolation, color_jitter,
    num_sample, decoder, batch_size (clips a process), num_workers, pin_mem, device, seed.
    Batches: see datasets.video.collate; batch_size clips from batch_size // num_sample videos; a short last batch is
    dropped.
    Raises: ListError for the list, ValueError for a batch size that does not fit.
    """
    if args.batch_size % args.num_sample:
        raise ValueError(f"--batch_size {args.batch_size} (clips) is not divisible by --num_sample {args.num_sample}")
    videos_a_batch = args.batch_size // args.num_sample
    transform = PretrainTransform(args.input_size, args.crop, args.train_interpolation, args.color_jitter)
    dataset = PretrainVideoDataset(
        args.data_path, args.num_frames, args.sampling_rate, transform, args.num_sample, args.decoder
    )
    if len(dataset) < videos_a_batch * world_size:
        raise ValueError(
            f"{args.data_path} lists {len(dataset)} videos, a batch takes {videos_a_batch} on each of {world_size} "
            f"process(es): lower --batch_size (now {args.batch_size}) or give a longer list"
        )
    return DataLoader(
        dataset,
        batch_size=videos_a_batch,
        sampler=EpochSampler(len(dataset), args.seed, rank, world_size),
        num_workers=args.num_workers,
        collate_fn=collate,
        pin_memory=args.pin_mem and args.device == "cuda",
        drop_last=True,
        persistent_workers=args.num_workers > 0,
        worker_init_fn=_one_thread,
        # torch draws a seed for the workers: from here, so that the training process's random state is its own
        generator=torch.Generator().manual_seed(args.seed),
    )


def _one_thread(worker_id):
    torch.set_num_threads(1)  # workers share the cores with one another and with the training process
