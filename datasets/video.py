"""Which frames make a clip, and the two data sets, for training and for evaluation."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from datasets.decoding import VideoError, decoders_for, read_frames
from datasets.lists import read_list

Transform = Callable[[torch.Tensor, random.Random], torch.Tensor]


def clip_indices(
    num_video_frames: int, num_frames: int, stride: int, rng: random.Random, num_segments: int = 1
) -> list[int]:
    """Frames of a random clip.

    The video is cut into num_segments equal segments. From each, num_frames / num_segments frames are taken, `stride`
    frames apart, at a start uniform over all at which they fit. One segment is VideoMAE's dense clip. num_frames
    segments are TSN's sampling (Something-Something): one random frame each, whatever the stride. A segment that is
    too short is read from its start; beyond the video's end its last frame is repeated.
    Args: counts and stride in frames. Returns: num_frames indices, ascending.
    """
    return _segment_indices(num_video_frames, num_frames, stride, num_segments, lambda slack: rng.randint(0, slack))


def view_indices(
    num_video_frames: int, num_frames: int, stride: int, num_segments: int, view: int, num_views: int
) -> list[int]:
    """Frames of temporal view number `view` of num_views, without randomness; otherwise as clip_indices.

    One segment: starts evenly from the first possible to the last; a single view is in the middle. Several segments:
    at the (view + 1/2) / num_views part of each segment's possible starts.
    """

    def start(slack: int) -> int:
        if num_segments == 1 and num_views > 1:
            return round(slack * view / (num_views - 1))
        return int((view + 0.5) / num_views * (slack + 1))

    return _segment_indices(num_video_frames, num_frames, stride, num_segments, start)


def _segment_indices(
    num_video_frames: int, num_frames: int, stride: int, num_segments: int, choose_start: Callable[[int], int]
) -> list[int]:
    """choose_start(slack): how far into a segment its frames start, 0 .. slack."""
    length = num_frames // num_segments
    span = (length - 1) * stride + 1  # from the first to the last frame of a segment, both counted
    indices = []
    for segment in range(num_segments):
        begin = num_video_frames * segment // num_segments
        end = num_video_frames * (segment + 1) // num_segments
        start = begin + choose_start(max(end - begin - span, 0))  # 0: too short for a choice
        indices += [min(start + i * stride, num_video_frames - 1) for i in range(length)]
    return indices


def read_targets(list_path: str, num_classes: int | None, task: str) -> tuple[list[str], list[int] | torch.Tensor]:
    """Paths of a list, and its labels: ints; or what a loss takes where there are several: float32 [n, num_classes], 1
    for the classes of a video ("multi_label"), or its values ("regression"). Raises: ListError."""
    paths, labels = read_list(list_path, num_classes, task)
    if task == "regression":
        return paths, torch.tensor(labels, dtype=torch.float32)
    if task == "multi_label":
        target = torch.zeros(len(paths), num_classes)
        rows = [row for row, label in enumerate(labels) for _ in label]
        target[rows, [k for label in labels for k in label]] = 1
        return paths, target
    return paths, labels


class TrainVideoDataset(Dataset):
    """Random clips of videos. The key of an item is (index, seed), and everything random in it comes from the seed, so
    that it is the same on any number of workers and in any order.

    Args: list_path (see read_list); num_frames T and stride in frames; transform(clip uint8 [T, 3, H, W], rng) ->
    uint8 [T, 3, S, S]; num_sample, clips taken from one decoded video; decoder; max_retries, videos tried for one item;
    num_segments, see clip_indices; num_classes and task, see read_targets; first_transform, of a video's first clip
    (None: as the others); max_short_side in pixels: larger frames are scaled down to it (None: they keep their size).
    Raises: ListError; ImportError if no decoder is installed.
    """

    def __init__(
        self,
        list_path: str,
        num_frames: int,
        stride: int,
        transform: Transform,
        num_sample: int = 1,
        decoder: str = "auto",
        max_retries: int = 10,
        num_segments: int = 1,
        num_classes: int | None = None,
        first_transform: Transform | None = None,
        max_short_side: int | None = None,
        task: str = "single_label",
    ) -> None:
        self.list_path = list_path
        self.paths, self.labels = read_targets(list_path, num_classes, task)
        self.num_frames, self.stride, self.num_sample, self.num_segments = num_frames, stride, num_sample, num_segments
        self.max_short_side = max_short_side
        self.transforms = [first_transform or transform] + [transform] * (num_sample - 1)
        decoders_for(self.paths[0], decoder)  # a missing library is an error now and not in the workers
        self.decoder, self.max_retries = decoder, max_retries

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """item: (index of the video, seed). A video that cannot be read is replaced by one drawn at random, and named.

        Returns: dict(video=uint8 [num_sample, T, 3, S, S], label=int64 [num_sample] or float32 [num_sample, K],
        seed=int64 [num_sample] for each clip's mask noise, index=the video used, failed=list of "path: reason").
        Raises: VideoError after max_retries unreadable videos.
        """
        index, seed = item
        rng = random.Random(seed)
        failed = []
        for _ in range(self.max_retries):
            try:
                clips = self.load(index, rng)
            except VideoError as error:
                failed.append(str(error))
                index = rng.randrange(len(self))  # from the item's seed: the same replacement on any worker
                continue
            seeds = torch.tensor([rng.getrandbits(63) for _ in range(self.num_sample)])
            labels = torch.stack([torch.as_tensor(self.labels[index])] * self.num_sample)
            return dict(video=clips, label=labels, seed=seeds, index=index, failed=failed)
        reason = f"{len(failed)} videos in a row cannot be read; the first: {failed[0]}"
        raise VideoError(self.list_path, f"{reason}; check the list's paths, and that the files play")

    def load(self, index: int, rng: random.Random) -> torch.Tensor:
        """num_sample random clips from one decode: uint8 [num_sample, T, 3, S, S]. Raises: VideoError."""

        def choose(length: int) -> list[int]:  # called again if decoding finds another length
            indices = []
            for _ in range(self.num_sample):
                indices += clip_indices(length, self.num_frames, self.stride, rng, self.num_segments)
            return indices

        frames = read_frames(self.paths[index], choose, self.decoder, self.max_short_side)
        # [num_sample * T, H, W, 3] -> [num_sample, T, 3, H, W]
        clips = frames.permute(0, 3, 1, 2).unflatten(0, (self.num_sample, self.num_frames))
        return torch.stack([transform(clip, rng) for transform, clip in zip(self.transforms, clips, strict=True)])


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins B items: dict(video=uint8 [B * num_sample, T, 3, S, S], label=int64 [B * num_sample] (or float32, with a
    dimension K more), seed=int64 [B * num_sample], index=int64 [B], failed=list)."""
    return dict(
        video=torch.cat([item["video"] for item in items]),
        label=torch.cat([item["label"] for item in items]),
        seed=torch.cat([item["seed"] for item in items]),
        index=torch.tensor([item["index"] for item in items]),
        failed=[failure for item in items for failure in item["failed"]],
    )


class EvalVideoDataset(Dataset):
    """All views of a video from one decode: num_views temporal clips x num_crops spatial crops, nothing random.

    Args: crop(frames uint8 [n, 3, H, W]) -> uint8 [num_crops, n, 3, S, S], such as transforms.spatial_crops; paths, of
    videos without labels, in place of a list; the others as in TrainVideoDataset and view_indices. Raises: ListError;
    ImportError.
    """

    def __init__(
        self,
        list_path: str,
        num_frames: int,
        stride: int,
        crop: Callable[[torch.Tensor], torch.Tensor],
        num_views: int = 1,
        num_segments: int = 1,
        num_classes: int | None = None,
        decoder: str = "auto",
        task: str = "single_label",
        paths: list[str] | None = None,
    ) -> None:
        self.list_path = list_path
        if paths is None:
            self.paths, self.labels = read_targets(list_path, num_classes, task)
        else:
            self.paths, self.labels = paths, [-1] * len(paths)
        self.num_frames, self.stride, self.num_segments = num_frames, stride, num_segments
        self.crop, self.num_views = crop, num_views
        decoders_for(self.paths[0], decoder)  # as in TrainVideoDataset
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns: dict(index, video=uint8 [num_views * num_crops, T, 3, S, S], crops of a view adjacent, or None if
        the video cannot be read, failed=list of "path: reason", one or none)."""

        def choose(length: int) -> list[int]:
            indices = []
            for view in range(self.num_views):
                indices += view_indices(length, self.num_frames, self.stride, self.num_segments, view, self.num_views)
            return indices

        try:
            # [num_views * T, 3, H, W]
            frames = read_frames(self.paths[index], choose, self.decoder).permute(0, 3, 1, 2)
        except VideoError as error:  # no replacement: the test reports or counts it
            return dict(index=index, video=None, failed=[str(error)])
        crops = self.crop(frames).unflatten(1, (self.num_views, self.num_frames))  # [crops, views, T, 3, S, S]
        views = crops.transpose(0, 1).flatten(0, 1)
        return dict(index=index, video=views.contiguous(), failed=[])


def collate_views(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the R readable ones of B items: dict(index=int64 [R], video=uint8 [R * views, T, 3, S, S] or None if R = 0,
    failed=list)."""
    read = [item for item in items if item["video"] is not None]
    return dict(
        index=torch.tensor([item["index"] for item in read], dtype=torch.int64),
        video=torch.cat([item["video"] for item in read]) if read else None,
        failed=[failure for item in items for failure in item["failed"]],
    )
