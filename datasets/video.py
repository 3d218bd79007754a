"""Video lists, decoding with decord or PyAV, and the two data sets, for training and for evaluation; nothing else in
training decodes."""

import functools
import os
import random
import re

import numpy as np
import torch
from torch.utils.data import Dataset

# path, optionally the number of frames, label; split from the right because paths may hold spaces
LIST_LINE = re.compile(r"^(?P<path>.+?)(?:(?:\s*,\s*|\s+)-?\d+)?(?:\s*,\s*|\s+)(?P<label>-?\d+)$")
FORMATS = "write `path label` or `path num_frames label` on each line, label an integer (-1 = none)"
# A header may count one or two frames that no decoder delivers (HMDB51's AVI files: one). Up to this many frames past
# the last decodable one are served as a copy of it; a request further out means a truncated file.
MAX_SHORTFALL = 2


class VideoError(RuntimeError):
    """A video cannot be read; the message names the path and the reason.

    Without a reason the first argument is the whole message: so a loader rebuilds the error of one of its processes.
    """

    def __init__(self, path, reason=None):
        super().__init__(path if reason is None else f"{path}: {reason}")


class ListError(ValueError):
    """A video list cannot be used; the message names the file, the line, and what to do."""


def read_list(list_path, num_classes=None):
    """Reads a list of videos: one a line, `path label` or `path num_frames label`, columns split by spaces or a comma.

    Lines that are blank or start with # are skipped; relative paths are taken from the list's folder. With num_classes
    every label must be one of 0 .. num_classes - 1.
    Returns: paths (list of str, absolute) and labels (list of int; -1 means no label, as in VideoMAE V2's lists).
    Raises: ListError.
    """
    if os.path.isdir(list_path):
        raise ListError(f"{list_path} is a folder: give a list file; {FORMATS}")
    if not os.path.isfile(list_path):
        raise ListError(f"{list_path}: no such list of videos; {FORMATS}")
    folder = os.path.dirname(os.path.abspath(list_path))
    paths, labels = [], []
    try:
        with open(list_path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                line = line.strip()
                if not line or line.startswith("#"):
                    continue
                match = LIST_LINE.match(line)
                if match is None:
                    columns = re.split(r"\s*,\s*|\s+", line)
                    problem = "no label" if len(columns) == 1 else f"label {columns[-1]!r} is not an integer"
                    raise ListError(f"{list_path}, line {number}: {problem} in {line!r}; {FORMATS}")
                if num_classes is not None and not 0 <= int(match["label"]) < num_classes:
                    raise ListError(
                        f"{list_path}, line {number}: label {match['label']} in {line!r} is not one of the "
                        f"{num_classes} classes, 0 to {num_classes - 1}: correct the list or --nb_classes"
                    )
                paths.append(os.path.join(folder, match["path"]))
                labels.append(int(match["label"]))
    except UnicodeDecodeError as error:
        raise ListError(f"{list_path} is not a text file ({error.reason}): give a list of videos; {FORMATS}") from error
    if not paths:
        raise ListError(f"{list_path} names no video; {FORMATS}")
    return paths, labels


class VideoReader:
    """An open video: a context manager with a length and `read`. A back end gives __init__, __len__, close and decode.

    decode(wanted: ascending distinct indices) -> {index: uint8 [H, W, 3]}; where the video ends before the last wanted
    index, the frames found and the last decodable one under its own index.
    """

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def read(self, indices):
        """Decodes frames.

        Args: indices, a sequence of int in any order, repeats allowed.
        Returns: uint8 [len(indices), H, W, 3], RGB. An index up to 2 past the last decodable frame gives that frame.
        Raises: VideoError where the video cannot be decoded that far.
        """
        if len(indices) == 0 or min(indices) < 0:
            raise ValueError(f"frame indices must be at least one, none negative: {list(indices)}")
        frames = self.decode(sorted(set(indices)))
        if not frames:
            raise VideoError(self.path, "no frame can be decoded")
        last = max(frames)
        if max(indices) > last + MAX_SHORTFALL:
            reason = f"truncated or damaged: frame {max(indices)} wanted, the last decodable one is {last}"
            raise VideoError(self.path, reason)
        if len({frame.shape for frame in frames.values()}) > 1:
            raise VideoError(self.path, "the frame size changes within the video")
        return torch.from_numpy(np.stack([frames[min(i, last)] for i in indices]))


class DecordReader(VideoReader):
    """decord: seeks to key frames. One thread, since more fail on VP9 of 427 x 240 (Something-Something V2)."""

    package = "decord"
    # Containers in which decord seeks exactly, for the usual codecs (H.264, VP9). In AVI with B-frames (HMDB51) its
    # seek and its skip are off, by one frame up to a key-frame interval, so there it decodes frame by frame.
    seekable = (".mp4", ".m4v", ".mov", ".mkv", ".webm")

    def __init__(self, path):
        import decord

        self.path = path
        self.errors = (RuntimeError, IndexError, StopIteration, decord.DECORDError)  # DECORDError is no RuntimeError
        try:
            self.video = decord.VideoReader(path, num_threads=1)
        except self.errors as error:
            raise VideoError(path, f"decord cannot open it ({_brief(error)})") from error

    def __len__(self):
        return len(self.video)

    def close(self):
        self.video = None

    def decode(self, wanted):
        last = len(self) - 1  # decord repeats the last decodable frame up to its len()
        wanted = sorted({min(i, last) for i in wanted})
        try:
            if self.path.lower().endswith(self.seekable):
                return dict(zip(wanted, self.video.get_batch(wanted).asnumpy(), strict=True))
            frames = {}
            self.video.seek(0)
            for index in range(wanted[-1] + 1):
                frame = self.video.next()
                if index in wanted:
                    frames[index] = frame.asnumpy()
            return frames
        except self.errors as error:
            raise VideoError(self.path, f"decord cannot decode it ({_brief(error)})") from error


class PyAVReader(VideoReader):
    """PyAV (FFmpeg): decodes from the start up to the last frame wanted, on one thread; exact whatever the codec."""

    package = "av"

    def __init__(self, path):
        import av

        self.path, self.av = path, av
        try:
            with self.open() as container:  # the packets, not the header: webm states no count, a cut file a wrong one
                packets = container.demux(container.streams.video[0])
                self.length = sum(packet.size > 0 and not packet.is_discard for packet in packets)
        except IndexError as error:
            raise VideoError(path, "no video stream") from error
        except (av.FFmpegError, OSError) as error:
            raise VideoError(path, f"PyAV cannot open it ({_brief(error)})") from error

    def open(self):
        return self.av.open(self.path, metadata_errors="ignore")  # some HMDB51 files hold text that is not UTF-8

    def __len__(self):
        return self.length

    def close(self):
        pass  # `decode` opens and closes: nothing stays open in between

    def decode(self, wanted):
        remaining, frames, index, frame = set(wanted), {}, -1, None
        converter = self.av.video.reformatter.VideoReformatter()  # shared: a fresh one each frame costs 0.3 to 3 ms

        def rgb(frame):
            image = converter.reformat(frame, format="rgb24").to_ndarray()
            return np.rot90(image, frame.rotation // 90)  # upright, as players show it (phones) and decord gives it

        with self.open() as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            try:
                for index, frame in enumerate(container.decode(stream)):
                    if index in remaining:
                        frames[index] = rgb(frame)
                        remaining.discard(index)
                        if not remaining:
                            break
            except self.av.FFmpegError:
                pass  # damaged from here on: what was decoded counts, `read` decides whether it is enough
            if remaining and frame is not None:
                frames[index] = rgb(frame)
        return frames


DECODERS = {"decord": DecordReader, "pyav": PyAVReader}


def _brief(error):
    return re.sub(r"\[[\d:]+\] \S+: ", "", str(error).strip().split("\n")[0])  # without decord's time and source file


@functools.cache
def _imports(package):
    try:
        __import__(package)
    except (ImportError, OSError):  # OSError: the wheel's library does not load on this machine
        return False
    return True


def decoders_for(path, decoder="auto"):
    """Names of the back ends to try, in order. "auto" is those installed, decord first where it seeks exactly, PyAV
    first elsewhere (twice as fast on UCF101's AVI files). Raises ImportError, naming what to install."""
    if decoder not in ("auto", *DECODERS):
        raise ValueError(f"unknown decoder {decoder!r}: choose from auto, {', '.join(DECODERS)}")
    names = [decoder]
    if decoder == "auto":
        names = ["decord", "pyav"] if path.lower().endswith(DecordReader.seekable) else ["pyav", "decord"]
    installed = [name for name in names if _imports(DECODERS[name].package)]
    if not installed:
        packages = " or ".join(DECODERS[name].package for name in names)
        raise ImportError(f"--decoder {decoder} is not installed: pip install {packages}")
    return installed


def open_video(path, decoder="auto"):
    """Opens a video with one of DECODERS, or "auto", and returns its VideoReader. Raises VideoError; ImportError."""
    if not os.path.isfile(path):
        raise VideoError(path, "no such file")
    video = DECODERS[decoders_for(path, decoder)[0]](path)
    if len(video) == 0:
        video.close()
        raise VideoError(path, "no frames")
    return video


def read_frames(path, choose, decoder="auto"):
    """Opens a video, asks choose(number of frames) for indices, reads them and closes it: uint8 [n, H, W, 3].

    "auto" tries the other back end where the first fails (decord refuses a few widths, 48 or 72 pixels).
    Raises: VideoError with the first one's reason.
    """
    errors = []
    for name in decoders_for(path, decoder):
        try:
            with open_video(path, name) as video:
                return video.read(choose(len(video)))
        except VideoError as error:
            errors.append(error)
    raise errors[0]


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
    num_segments, see clip_indices; num_classes, to check labels against; first_transform, of a video's first clip.
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
    ):
        self.list_path = list_path
        self.paths, self.labels = read_list(list_path, num_classes)
        self.num_frames, self.stride, self.num_sample, self.num_segments = num_frames, stride, num_sample, num_segments
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
        def choose(length):  # one pass over the file for all clips
            draw = (length, self.num_frames, self.stride, rng, self.num_segments)
            return [i for _ in range(self.num_sample) for i in clip_indices(*draw)]

        frames = read_frames(self.paths[index], choose, self.decoder)
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
