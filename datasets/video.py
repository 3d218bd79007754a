"""Video lists, decoding with decord or PyAV, and the two data sets, for training and for evaluation; nothing else in
training decodes."""

import bisect
import functools
import os
import random
import re

import numpy as np
import torch
from torch.utils.data import Dataset

FORMATS = "write `path label` or `path num_frames label` on each line, label an integer (-1 = none)"
# A header may count one or two frames that no decoder delivers (HMDB51's AVI files: one). Up to this many frames past
# the last decodable one are served as a copy of it; a request further out means a truncated file.
MAX_SHORTFALL = 2
MAX_LABEL = 999_999_999


class VideoError(RuntimeError):
    """A video cannot be read; the message names the path and the reason.

    Without a reason the first argument is the whole message: so a loader rebuilds the error of one of its processes.
    """

    def __init__(self, path, reason=None):
        super().__init__(path if reason is None else f"{path}: {reason}")


class ListError(ValueError):
    """A video list cannot be used; the message names the file, the line, and what to do."""


def split_line(line):
    """A stripped line of a list: (path, label as text), or None where it does not end with a whole number.

    `path label`, `path num_frames label`, columns split by spaces or a comma. Taken apart from the right because paths
    may hold spaces, and not by one regular expression: that needs minutes for a line of 20,000 spaces.
    """
    last = _cut_number(line)
    if last is None:
        return None
    before, label = last
    frames = _cut_number(before)
    return (frames[0] if frames else before), label


def _cut_number(text):
    """(what stands before the separator, the whole number behind it), or None."""
    head = text.rstrip("-0123456789")
    number = text[len(head) :]
    before = head.rstrip()
    if before.endswith(","):
        before = before[:-1].rstrip()
    elif before == head:
        return None
    return (before, number) if before and re.fullmatch("-?[0-9]+", number) else None


def excerpt(text):
    """A text of any length and content for a message of one line."""
    return repr(text if len(text) <= 200 else f"{text[:100]} ... {text[-60:]}")


def read_list(list_path, num_classes=None):
    """Reads a list of videos: one a line, `path label` or `path num_frames label`, columns split by spaces or a comma.

    Lines that are blank or start with # are skipped; relative paths are taken from the list's folder. With num_classes
    every label must be one of 0 .. num_classes - 1.
    Returns: paths (list of str, absolute) and labels (list of int; -1 means no label, as in VideoMAE V2's lists).
    Raises: ListError.
    """
    if os.path.isdir(list_path):
        raise ListError(f"{list_path} is a folder: give a list file; {FORMATS}")
    if not os.path.isfile(list_path):  # a pipe or a device would be waited for
        kind = "not a regular file" if os.path.exists(list_path) else "no such list of videos"
        raise ListError(f"{list_path}: {kind}; {FORMATS}")
    folder = os.path.dirname(os.path.abspath(list_path))
    paths, labels = [], []
    try:
        with open(list_path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                line = line.strip()
                if not line or line.startswith("#"):
                    continue
                place = f"{list_path}, line {number}"
                if "\0" in line:
                    raise ListError(f"{place}: a zero byte in {excerpt(line)}: not a text file, or damaged; {FORMATS}")
                columns = split_line(line)
                if columns is None:
                    last = line.replace(",", " ").split()[-1:]
                    alone = last == [line.strip(" ,")] or not last
                    problem = "no label" if alone else f"label {excerpt(last[0])} is not an integer"
                    raise ListError(f"{place}: {problem} in {excerpt(line)}; {FORMATS}")
                path, label = columns
                if len(label) > 10 or not -1 <= int(label) <= MAX_LABEL:
                    raise ListError(f"{place}: label {excerpt(label)} is not in -1 to {MAX_LABEL}; {FORMATS}")
                if num_classes is not None and not 0 <= int(label) < num_classes:
                    raise ListError(
                        f"{place}: label {label} in {excerpt(line)} is not one of the {num_classes} classes, 0 to "
                        f"{num_classes - 1}: correct the list or --nb_classes"
                    )
                paths.append(os.path.join(folder, path))
                labels.append(int(label))
    except UnicodeDecodeError as error:
        raise ListError(f"{list_path} is not a text file ({error.reason}): give a list of videos; {FORMATS}") from error
    except OSError as error:  # no permission, a lost mount
        raise ListError(f"{list_path} cannot be read ({error.strerror}); {FORMATS}") from error
    if not paths:
        raise ListError(f"{list_path} names no video; {FORMATS}")
    return paths, labels


class VideoReader:
    """An open video: a context manager with a length and `read`. A back end gives __init__, __len__, close and decode,
    and `fetch` where it has a faster way to the same frames.

    decode(wanted: ascending distinct indices) -> {index: uint8 [H, W, 3]}; where the video ends before the last wanted
    index, the frames found and the last decodable one under its own index.
    """

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def fetch(self, wanted, max_short_side=None):
        """As decode; may return frames already scaled to max_short_side."""
        return self.decode(wanted)

    def read(self, indices, max_short_side=None):
        """Decodes frames.

        Args: indices, a sequence of int in any order, repeats allowed; max_short_side in pixels: larger frames are
        scaled down to it, to even sides (see scaled_size).
        Returns: uint8 [len(indices), H, W, 3], RGB. An index up to 2 past the last decodable frame gives that frame.
        Raises: VideoError where the video cannot be decoded that far.
        """
        if len(indices) == 0 or min(indices) < 0:
            raise ValueError(f"frame indices must be at least one, none negative: {list(indices)}")
        frames = self.fetch(sorted(set(indices)), max_short_side)
        if not frames:
            raise VideoError(self.path, "no frame can be decoded")
        last = max(frames)
        if max(indices) > last + MAX_SHORTFALL:
            reason = f"truncated or damaged: frame {max(indices)} wanted, the last decodable one is {last}"
            raise VideoError(self.path, reason)
        if len({frame.shape for frame in frames.values()}) > 1:
            raise VideoError(self.path, "the frame size changes within the video")
        clip = torch.from_numpy(np.stack([frames[min(i, last)] for i in indices]))
        size = scaled_size(*clip.shape[1:3], max_short_side)
        if size == clip.shape[1:3]:  # PyAV has scaled already
            return clip
        clip = clip.permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(clip, size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)


def scaled_size(height, width, max_short_side):
    """Height and width, even and with at most this short side, of a frame that is larger; others keep their size."""
    if max_short_side is None or min(height, width) <= max_short_side:
        return height, width
    half = max_short_side // 2
    return tuple(2 * round(side * half / min(height, width)) for side in (height, width))


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
    """PyAV (FFmpeg), one thread, exact whatever the codec.

    `decode` goes from the start to the last frame wanted and counts. `fetch` gives the same frames by their times: it
    starts at key frames, and the codec skips what is neither wanted nor referred to. It does so where the packets tell
    which frame is which (`survey`) and what comes out is what they said; everywhere else it leaves it to `decode`.
    """

    package = "av"
    max_kept = 1 << 28  # bytes; the packets of larger files are not kept in memory

    def __init__(self, path):
        import av

        self.path, self.av = path, av
        try:
            self.container = self.open()
            self.stream = self.container.streams.video[0]
            if self.stream.codec_context is None:
                raise VideoError(path, "PyAV cannot open it (no decoder for its codec)")
            self.stream.thread_count = 1
            keep = os.path.getsize(path) <= self.max_kept
            self.packets, self.length = [], 0
            # the packets are counted; the header's count is none in webm and a wrong one in a cut file
            for packet in self.container.demux(self.stream):
                if packet.size > 0:
                    self.length += not packet.is_discard
                    if keep:
                        self.packets.append(packet)
        except IndexError as error:
            raise VideoError(path, "PyAV cannot open it (no video stream)") from error
        except (av.FFmpegError, OSError) as error:
            raise VideoError(path, f"PyAV cannot open it ({_brief(error)})") from error

    def open(self):
        return self.av.open(self.path, metadata_errors="ignore")  # some HMDB51 files hold text that is not UTF-8

    def open_again(self):
        """A second container. Raises VideoError: the file may have gone since the first, or be another."""
        try:
            container = self.open()
        except (self.av.FFmpegError, OSError) as error:
            raise VideoError(self.path, f"PyAV cannot open it again ({_brief(error)})") from error
        if container.streams.video and container.streams.video[0].codec_context is not None:
            return container
        container.close()
        raise VideoError(self.path, "was replaced by another file while it was read")

    def __len__(self):
        return self.length

    def close(self):
        self.container.close()

    def converter(self, max_short_side):
        """A function: frame -> uint8 [H, W, 3], RGB, upright, scaled down to max_short_side (None: as it is)."""
        # one of each for all frames: a new one a frame costs up to 3 ms; threads=1: three times as fast as the default
        shrink, convert = (self.av.video.reformatter.VideoReformatter().reformat for _ in range(2))

        def rgb(frame):
            height, width = scaled_size(frame.height, frame.width, max_short_side)
            turns = frame.rotation // 90  # upright, as players show it (phones) and decord gives it
            if (height, width) != (frame.height, frame.width):  # before the conversion: both at once take longer
                frame = shrink(frame, width, height, interpolation="AREA", threads=1)
            return np.rot90(convert(frame, format="rgb24", threads=1).to_ndarray(), turns)

        return rgb

    def decode(self, wanted, max_short_side=None):
        remaining, frames, index, frame = set(wanted), {}, -1, None
        rgb = self.converter(max_short_side)
        with self.open_again() as container:
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

    def fetch(self, wanted, max_short_side=None):
        if self.survey is None:
            return self.decode(wanted, max_short_side)
        times, starts, skip = self.survey
        goal = {times[i]: i for i in {min(i, len(times) - 1) for i in wanted}}
        rgb, frames, context = self.converter(max_short_side), {}, self.stream.codec_context
        try:
            for run in self.runs(goal, starts):
                shown = []
                context.flush_buffers()
                for packet in (*run, None):  # None: out with what the codec holds back
                    unwanted = packet is not None and packet.pts not in goal
                    context.skip_frame = "NONREF" if skip and unwanted else "DEFAULT"
                    for frame in context.decode(packet):
                        shown.append(frame.pts)
                        if frame.pts in goal:
                            frames[goal[frame.pts]] = rgb(frame)
                due = {packet.pts for packet in run if not packet.is_discard}
                if skip:
                    due &= goal.keys() | set(shown)
                if shown != sorted(due):
                    return self.decode(wanted, max_short_side)
        except self.av.FFmpegError:
            return self.decode(wanted, max_short_side)
        return frames if len(frames) == len(goal) else self.decode(wanted, max_short_side)

    def runs(self, goal, starts):
        """The packets to decode for the times in goal: lists that begin at a start and end with a wanted frame."""
        places, bounds = {packet.pts: i for i, packet in enumerate(self.packets)}, []
        for time in sorted(goal):
            last = places[time]
            key = bisect.bisect_right(starts, last) - 1
            while self.packets[starts[key]].pts > time:  # shown before the key frame it follows
                key -= 1
            if bounds and starts[key] <= bounds[-1][1]:
                bounds[-1][1] = max(last, bounds[-1][1])
            else:
                bounds.append([starts[key], last])
        return [self.packets[first : last + 1] for first, last in bounds]

    @functools.cached_property
    def survey(self):
        """What the packets say, or None where it does not tell which frame is which.

        Returns: times (pts) of the frames in the order shown; places of the packets at which decoding may start;
        whether the codec is told to skip: without reordering nothing would be, and then all that is due is checked.
        """
        codec = self.stream.codec_context
        times = [packet.pts for packet in self.packets]
        if not times or None in times or len(set(times)) < len(times) or times[0] > min(times):
            return None
        in_order = times == sorted(times)
        if codec.has_b_frames and (in_order or self.container.format.name == "avi"):  # these are times of decoding
            return None
        if codec.name == "mpeg4":
            kinds = [_vop_kind(packet) for packet in self.packets]
            if None in kinds or in_order and "B" in kinds:
                return None
            starts = [i for i, kind in enumerate(kinds) if kind == "I"]
        elif codec.name in ("h264", "vp9"):
            keys = [i for i, packet in enumerate(self.packets) if packet.is_keyframe]
            starts = [i for i in keys if codec.name == "vp9" or _is_idr(self.packets[i], codec.extradata)]
        else:
            return None
        if starts[:1] != [0]:
            return None
        return sorted(packet.pts for packet in self.packets if not packet.is_discard), starts, not in_order


def _vop_kind(packet):
    """ "I", "P", "B" or "S" for the one MPEG-4 picture in a packet; None where there are more (packed B-frames), or
    where it is too short to be a picture (a placeholder, after which the decoder shows nothing)."""
    _, _, picture = bytes(packet).partition(b"\0\0\1\xb6")
    return None if len(picture) < 12 or b"\0\0\1\xb6" in picture else "IPBS"[picture[0] >> 6]


def _is_idr(packet, extradata):
    """Whether an H.264 packet is an IDR picture: what follows it refers to nothing before it. In an open GOP the key
    frame may be another."""
    data = bytes(packet)
    if extradata and extradata[0] == 1:  # avcC (mp4, mkv): the size of each unit stands before it
        width = (extradata[4] & 3) + 1
        units, at = [], 0
        while at + width < len(data):
            units.append(data[at + width] & 31)
            at += width + int.from_bytes(data[at : at + width])
    else:
        units = [code[0] & 31 for code in re.findall(b"\0\0\1(.)", data, re.DOTALL)]
    return 5 in units


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
    """Names of the back ends to try for a path, in order. "auto" is those installed, PyAV first: it was the faster one
    in every container tried (mp4, mkv, webm, avi). Raises ImportError, naming what to install."""
    if decoder not in ("auto", *DECODERS):
        raise ValueError(f"unknown decoder {decoder!r}: choose from auto, {', '.join(DECODERS)}")
    names = ["pyav", "decord"] if decoder == "auto" else [decoder]
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


def read_frames(path, choose, decoder="auto", max_short_side=None):
    """Opens a video, asks choose(number of frames) for indices, reads them and closes it: uint8 [n, H, W, 3].

    "auto" tries the other back end where the first fails. max_short_side: see VideoReader.read.
    Raises: VideoError with the first one's reason.
    """
    errors = []
    for name in decoders_for(path, decoder):
        try:
            with open_video(path, name) as video:
                return video.read(choose(len(video)), max_short_side)
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
        def choose(length):  # one pass over the file for all clips
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
