"""Which frames make a clip, and the two data sets, for training and for evaluation."""

import random

import torch
from torch.utils.data import Dataset

from datasets.decoding import VideoError, decoders_for, read_frames
from datasets.lists import read_list


def clip_indices(num_video_frames, num_frames, stride, rng, num_segments=1):
    """Frames of a random clip: the video is cut into num_segments equal parts and num_frames / num_segments frames, a
    stride apart, are taken from each at a start uniform over all at which they fit.

    One segment is VideoMAE's dense clip; num_frames segments are TSN's sampling, one random frame each (Something-
    Something), where the stride means nothing. A part too short is read from its start, beyond the video's end its
    last frame is repeated.
    Args: counts and stride in frames; rng, a random.Random. Returns: list of num_frames indices.
    """
    return _segment_indices(num_video_frames, num_frames, stride, num_segments, lambda slack: rng.randint(0, slack))


def view_indices(num_video_frames, num_frames, stride, num_segments, view, num_views):
    """Frames of temporal view number `view` of num_views, the same every time; otherwise as clip_indices.

    Dense: starts evenly from the first possible to the last, one view in the middle. Segments: at the (view + 1/2) /
    num_views part of each segment's starts.
    """
    if num_segments == 1 and num_views > 1:
        return _segment_indices(
            num_video_frames, num_frames, stride, 1, lambda slack: round(slack * view / (num_views - 1))
        )
    place = (view + 0.5) / num_views
    return _segment_indices(num_video_frames, num_frames, stride, num_segments, lambda slack: int(place * (slack + 1)))


def _segment_indices(num_video_frames, num_frames, stride, num_segments, place):
    """place(slack): how far into a segment its frames start, 0 .. slack."""
    length = num_frames // num_segments
    span = (length - 1) * stride + 1
    indices = []
    for segment in range(num_segments):
        begin, end = (num_video_frames * i // num_segments for i in (segment, segment + 1))
        start = begin + place(max(end - begin - span, 0))
        indices += [min(start + i * stride, num_video_frames - 1) for i in range(length)]
    return indices


class TrainVideoDataset(Dataset):
    """Random clips of videos. An item is asked for as (index, seed), and everything random in it comes from the
    seed, so that it is the same on any number of workers and in any order.

    Args: list_path (see read_list); num_frames T and stride in frames; transform(clip uint8 [T, 3, H, W], rng) ->
    uint8 [T, 3, S, S]; num_sample, clips taken from one decoded video; decoder; max_retries, videos tried for one item;
    num_segments, see clip_indices; num_classes, to check labels against; first_transform, of a video's first clip;
    max_short_side in pixels: larger frames come scaled down to it (None: at their own size).
    """

    def __init__(
        self,
        list_path,
        num_frames,
        stride,
        transform,
        num_sample=1,
        decoder="auto",
        max_retries=10,
        num_segments=1,
        num_classes=None,
        first_transform=None,
        max_short_side=None,
    ):
        self.list_path = list_path
        self.paths, self.labels = read_list(list_path, num_classes)
        self.num_frames, self.stride, self.num_sample, self.num_segments = num_frames, stride, num_sample, num_segments
        self.max_short_side = max_short_side
        self.transforms = [first_transform or transform] + [transform] * (num_sample - 1)
        decoders_for(self.paths[0], decoder)  # a missing library is an error now and not in the workers
        self.decoder, self.max_retries = decoder, max_retries

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        """item: (index of the video, seed). A video that cannot be read is replaced by one drawn at random, and named.

        Returns: dict(video=uint8 [num_sample, T, 3, S, S], label=int64 [num_sample], seed=int64 [num_sample] for each
        clip's mask noise, index=the video used, failed=list of "path: reason").
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
                index = rng.randrange(len(self))
                continue
            seeds = torch.tensor([rng.getrandbits(63) for _ in range(self.num_sample)])
            labels = torch.full((self.num_sample,), self.labels[index])
            return dict(video=clips, label=labels, seed=seeds, index=index, failed=failed)
        reason = f"{len(failed)} videos in a row cannot be read; the first: {failed[0]}"
        raise VideoError(self.list_path, f"{reason} (check the list's paths, and that the files play)")

    def load(self, index, rng):
        def choose(length):  # one pass over the file for all clips; drawn again where decoding finds another length
            draw = (length, self.num_frames, self.stride, rng, self.num_segments)
            return [i for _ in range(self.num_sample) for i in clip_indices(*draw)]

        frames = read_frames(self.paths[index], choose, self.decoder, self.max_short_side)
        clips = frames.permute(0, 3, 1, 2).unflatten(0, (self.num_sample, self.num_frames))
        return torch.stack([transform(clip, rng) for transform, clip in zip(self.transforms, clips, strict=True)])


def collate(items):
    """Joins B items: dict(video=[B * num_sample, T, 3, S, S], label and seed=[B * num_sample], index=int64 [B],
    failed=list)."""
    return {name: torch.cat([item[name] for item in items]) for name in ("video", "label", "seed")} | dict(
        index=torch.tensor([item["index"] for item in items]),
        failed=[failure for item in items for failure in item["failed"]],
    )


class EvalVideoDataset(Dataset):
    """All views of a video from one decode: num_views temporal clips x num_crops spatial crops, nothing random.

    Args: crop(frames uint8 [n, 3, H, W]) -> uint8 [num_crops, n, 3, S, S], such as transforms.spatial_crops; the others
    as in TrainVideoDataset and view_indices.
    """

    def __init__(
        self, list_path, num_frames, stride, crop, num_views=1, num_segments=1, num_classes=None, decoder="auto"
    ):
        self.list_path = list_path
        self.paths, self.labels = read_list(list_path, num_classes)
        self.num_frames, self.stride, self.num_segments = num_frames, stride, num_segments
        self.crop, self.num_views = crop, num_views
        decoders_for(self.paths[0], decoder)
        self.decoder = decoder

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """Returns: dict(index, video=uint8 [num_views * num_crops, T, 3, S, S], crops of a view adjacent, or None where
        the video cannot be read, failed=list of "path: reason", one or none)."""

        def choose(length):
            view = (length, self.num_frames, self.stride, self.num_segments)
            return [i for number in range(self.num_views) for i in view_indices(*view, number, self.num_views)]

        try:
            frames = read_frames(self.paths[index], choose, self.decoder).permute(0, 3, 1, 2)
        except VideoError as error:
            return dict(index=index, video=None, failed=[str(error)])
        views = self.crop(frames).unflatten(1, (self.num_views, self.num_frames)).transpose(0, 1).flatten(0, 1)
        return dict(index=index, video=views.contiguous(), failed=[])


def collate_views(items):
    """Joins the readable ones of B items: dict(index=int64 [R], video=[R * views, T, 3, S, S] or None, failed=list)."""
    read = [item for item in items if item["video"] is not None]
    return dict(
        index=torch.tensor([item["index"] for item in read], dtype=torch.int64),
        video=torch.cat([item["video"] for item in read]) if read else None,
        failed=[failure for item in items for failure in item["failed"]],
    )
