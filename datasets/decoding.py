"""Reading frames of a video with PyAV or decord; nothing else in training decodes."""

import bisect
import collections
import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from datasets.packets import Damage, Doubt, Unit, header_reader

# A request may lie this many frames past the end, as headers do that count a frame too many: it gets the last frame.
MAX_SHORTFALL = 2
COVER = 0x400  # FFmpeg's mark (attached_pic) of a stream that is the cover picture of a film or of a song

Choose = Callable[[int], Sequence[int]]  # number of frames -> indices of frames
Matrix = Sequence[float]  # (a, b, c, d), see display_matrices


class VideoError(RuntimeError):
    """A video cannot be read; the message names the path and the reason.

    Without a reason the first argument is the whole message: a loader builds the error of a worker again in this way.
    """

    def __init__(self, path: object, reason: str | None = None) -> None:
        super().__init__(path if reason is None else f"{path}: {reason}")


class RefusedVideo(VideoError):
    """The file was read and has nothing to train on, so the other back end is not tried."""


class VideoReader:
    """An open video: a context manager with a length, `read` and `check`.

    A back end gives __init__(path), the methods that raise NotImplementedError here, and these attributes: name, of
    --decoder; package, which it imports; path.
    """

    name: str
    package: str
    path: str

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of frames, as far as it is known now: `fetch` may find another."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def fetch(self, wanted: list[int], max_short_side: int | None = None) -> dict[int, np.ndarray]:
        """Decodes the frames of ascending distinct indices: {index: uint8 [H, W, 3], RGB}.

        If the video ends before the last wanted index, the last decodable frame is added under its own index. Frames
        may come scaled to max_short_side already. Raises: VideoError.
        """
        raise NotImplementedError

    def decode_all(self) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        """Decodes everything once, in order: (index, a function that gives the frame uint8 [H, W, 3], RGB). Raises:
        VideoError."""
        raise NotImplementedError

    def time(self, index: int) -> float:
        """When a frame is shown, in seconds from the first one; by the average rate where the file does not tell."""
        raise NotImplementedError

    def check(self) -> dict[str, Any]:
        """Decodes everything: dict(frames, as training counts them; decoded; width; height; errors, the number of
        damaged packets; decoder). Raises: VideoError."""
        raise NotImplementedError

    def missing(self) -> int:
        """How many packets the file's header claims beyond those found, where the back end sees them."""
        return 0

    def read(self, wanted: Sequence[int] | Choose, max_short_side: int | None = None) -> torch.Tensor:
        """Decodes frames.

        Args: wanted, indices in any order, repeats allowed; or a function, number of frames -> indices, which is called
        again if decoding finds another number. max_short_side in pixels: larger frames are scaled down to it, to even
        sides (see scaled_size).
        Returns: uint8 [n, H, W, 3], RGB. An index up to 2 past the last decodable frame gives that frame.
        Raises: VideoError if the video cannot be decoded that far; ValueError for a bad index.
        """
        choose = wanted if callable(wanted) else lambda length: wanted
        length = len(self)
        indices, frames = self.chosen(choose, max_short_side)
        if len(self) != length:
            indices, frames = self.chosen(choose, max_short_side)
        return self.clip(indices, frames, max_short_side)

    def chosen(self, choose: Choose, max_short_side: int | None) -> tuple[Sequence[int], dict[int, np.ndarray]]:
        """The indices chosen for the length known now, and what `fetch` gives for them."""
        if len(self) == 0:
            raise VideoError(self.path, "no frame can be decoded")
        indices = choose(len(self))
        if len(indices) == 0 or min(indices) < 0:
            raise ValueError(f"frame indices must not be empty or negative: {list(indices)}")
        with one_line(self.path, self.package):
            return indices, self.fetch(sorted(set(indices)), max_short_side)

    def clip(self, indices: Sequence[int], frames: dict[int, np.ndarray], max_short_side: int | None) -> torch.Tensor:
        """Checks what `fetch` gave and stacks it: uint8 [n, H, W, 3]. All frames of all back ends pass here."""
        if not frames:
            raise VideoError(self.path, "no frame can be decoded")
        for frame in frames.values():
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise VideoError(self.path, f"{self.package} gave {frame.dtype} {frame.shape}, not uint8 [H, W, 3]")
        last = max(frames)
        if max(indices) > last + MAX_SHORTFALL:
            reason = f"truncated or damaged: frame {max(indices)} wanted, the last decodable one is {last}"
            raise VideoError(self.path, reason)
        if len({frame.shape for frame in frames.values()}) > 1:
            raise RefusedVideo(self.path, "the frame size changes within the video")
        clip = torch.from_numpy(np.stack([frames[min(i, last)] for i in indices]))
        size = scaled_size(*clip.shape[1:3], max_short_side)
        if size == clip.shape[1:3]:  # PyAV has scaled already
            return clip
        clip = clip.permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(clip, size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)


def scaled_size(height: int, width: int, max_short_side: int | None) -> tuple[int, int]:
    """Height and width in pixels of a frame after max_short_side.

    A larger frame gets even sides and at most this short side; other frames keep their size.
    """
    short_side = min(height, width)
    if max_short_side is None or short_side <= max_short_side:
        return height, width
    half = max_short_side // 2
    return 2 * round(height * half / short_side), 2 * round(width * half / short_side)


class DecordReader(VideoReader):
    """decord: seeks to key frames. One thread, since more fail on VP9 of 427 x 240 (Something-Something V2).

    length: what PyAV counted; None if PyAV is not installed or cannot read the file. decord itself counts packets, and
    gives a copy of the last frame for each packet that has none.
    """

    name = package = "decord"
    # Containers in which decord seeks exactly, for the usual codecs (H.264, VP9). In AVI with B-frames (HMDB51) its
    # seek and its skip are off, by one frame up to a key-frame interval, so there it decodes frame by frame.
    seekable = (".mp4", ".m4v", ".mov", ".mkv", ".webm")

    def __init__(self, path: str, length: int | None = None) -> None:
        import decord

        self.path = path
        self.errors = (RuntimeError, IndexError, StopIteration, decord.DECORDError)  # DECORDError is no RuntimeError
        with open(path, "rb") as file:
            head = file.read(200)
        # a transport stream has the byte G at the start of every packet of 188, or after four bytes in every 192
        if head[:1] == b"G" == head[188:189] or head[4:5] == b"G" == head[196:197]:
            raise VideoError(
                path, "decord begins transport streams at their second key frame: use PyAV (pip install av)"
            )
        try:
            self.video = decord.VideoReader(path, num_threads=1)
        except self.errors as error:
            raise VideoError(path, f"decord cannot open it ({_brief(error)})") from error
        self.length = len(self.video) if length is None else length

    def __len__(self) -> int:
        return self.length

    def close(self) -> None:
        self.video = None

    def fetch(self, wanted: list[int], max_short_side: int | None = None) -> dict[int, np.ndarray]:
        last = len(self) - 1
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

    def decode_all(self) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        with one_line(self.path, self.package):
            self.video.seek(0)
            for index in range(len(self)):
                yield index, self.video.next().asnumpy

    def time(self, index: int) -> float:
        return index / self.video.get_avg_fps()

    def check(self) -> dict[str, Any]:
        length, sizes = len(self), set()
        for begin in range(0, length, 16):  # 16 frames at a time bound the memory
            frames = self.fetch(list(range(begin, min(begin + 16, length))))
            sizes |= {frame.shape[:2] for frame in frames.values()}
        if len(sizes) > 1:
            raise RefusedVideo(self.path, "the frame size changes within the video")
        height, width = sizes.pop()
        return dict(frames=length, decoded=length, width=width, height=height, errors=0, decoder=self.name)


class Mark(NamedTuple):
    """What is kept of a packet of a large file; times in units of the stream's time base."""

    pts: int | None
    dts: int | None
    is_discard: bool
    is_keyframe: bool


class Survey(NamedTuple):
    """Where the frames of a video are, from its packets alone."""

    times: list[int]  # pts of the frames in the order shown
    starts: list[int]  # places of the packets at which decoding may start
    skip: bool  # whether the codec is told to skip frames that nothing refers to


class PyAVReader(VideoReader):
    """PyAV (FFmpeg), one thread, exact whatever the codec.

    The frames of a video are those a plain decode shows: packet after packet from the start, without those that are
    damaged (`plain`). Their number is known in one of two ways. If every packet's header was read and says what the
    decoder will show (datasets/packets.py), it is counted without decoding; and if the packets' times are those of the
    frames (`survey`), `fetch` starts at key frames and the codec skips what is neither wanted nor referred to. If what
    comes out is not what the packets said, and for all other files, everything is decoded once to know (`confirm`).
    The answer depends on the file alone, never on what a process has read before.
    """

    name, package = "pyav", "av"
    max_kept = 1 << 28  # bytes; the packets of larger files are not kept in memory, but found again by their times
    # What is known of files read before, by path, size and time: it saves time and changes no answer.
    surveys = collections.OrderedDict()  # of large files: packets, units, length, damaged
    decoded = collections.OrderedDict()  # of files that had to be decoded: length, sizes, size upright, errors

    def __init__(self, path: str) -> None:
        import av

        self.path, self.av = path, av
        self.errors, self.size = 0, None
        self.container, self.stream = self.open()
        try:
            self.stream.codec_context.options = {"err_detect": "explode"}  # `by_times` leaves damage to `plain`
            status = os.stat(path)
            self.large = status.st_size > self.max_kept
            self.key = (path, status.st_size, status.st_mtime_ns)
            if self.large and self.key in self.surveys:
                self.packets, self.units, self.length, self.damaged = self.surveys[self.key]
            else:
                self.demux()
                if self.large:  # some 15 MB for an hour of video
                    remember(self.surveys, self.key, (self.packets, self.units, self.length, self.damaged), 8)
        except BaseException:
            self.close()
            raise

    def open(self) -> tuple[Any, Any]:
        """An av container and its video stream, chosen as FFmpeg does: one that the file marks as default, then the
        largest; never a cover picture.

        Raises: VideoError; RefusedVideo if there is no video in the file.
        """
        try:
            try:
                container = self.av.open(self.path, metadata_errors="ignore")  # HMDB51 has text that is not UTF-8
            except TypeError:  # PyAV 19 has no such argument and always ignores it
                container = self.av.open(self.path)
        except (self.av.FFmpegError, OSError) as error:
            raise VideoError(self.path, f"PyAV cannot open it ({_brief(error)})") from error
        videos = [stream for stream in container.streams.video if not stream.disposition & COVER]
        best = max(videos, key=lambda stream: (stream.disposition & 1, frame_area(stream)), default=None)
        if best is not None and best.codec_context is not None:
            best.thread_count = 1
            return container, best
        cover = ", only a cover picture" if container.streams.video else ""
        container.close()
        if best is None:
            raise RefusedVideo(self.path, f"PyAV cannot open it (no video stream{cover})")
        raise VideoError(self.path, "PyAV cannot open it (no decoder for its codec)")

    def demux(self) -> None:
        """Reads all packets and their headers, without decoding.

        Sets packets (of large files: Marks), damaged, their number, and units and length, which are None if the
        headers leave a doubt.
        """
        codec = self.stream.codec_context
        read = header_reader(codec.codec.canonical_name, self.container.format.name, codec.extradata)
        self.packets, self.units, self.damaged = [], [], 0
        try:
            for packet in self.container.demux(self.stream):
                if packet.size == 0:
                    continue
                keep = Mark(packet.pts, packet.dts, packet.is_discard, packet.is_keyframe) if self.large else packet
                self.packets.append(keep)
                damaged = packet.is_corrupt
                try:
                    if read is not None:
                        self.units.append(read(bytes(packet)))
                except Damage:
                    damaged = True
                except Doubt:
                    read = None
                if damaged:
                    self.damaged += 1
        except self.av.FFmpegError:  # what follows cannot be split into packets
            self.damaged += 1
        if read is None or self.damaged or not self.units or not self.units[0].start:
            self.units = self.length = None
        else:
            self.length = sum(unit.frames for packet, unit in self.pairs() if not packet.is_discard)

    def pairs(self) -> Iterable[tuple[Any, Unit]]:
        """Each packet with what its header says."""
        return zip(self.packets, self.units, strict=True)

    def __len__(self) -> int:
        if self.length is None:
            self.confirm()
        return self.length

    def close(self) -> None:
        self.container.close()

    # ------------------------------------------------------------------------------------------------ plain decoding

    def plain(self) -> Iterator[Any]:
        """Yields the frames (av.VideoFrame) from the start on, as players show them.

        A packet that cannot be decoded is left out and counted in `errors`. A frame that the codec had to make up in
        part is counted too, and shown.
        """
        self.errors, size = 0, None
        container, stream = self.open()
        with container:
            packets = container.demux(stream)
            while True:
                packet = None  # the end, at which the codec gives the frames that it holds back
                try:
                    packet = next(packets, None)
                except self.av.FFmpegError:  # nothing that follows can be found
                    self.errors += 1
                if packet is not None and packet.size == 0:  # the codec would take it for the end
                    continue
                try:
                    frames = stream.codec_context.decode(packet)
                except self.av.FFmpegError:
                    frames = []
                    self.errors += 1
                self.errors += len([frame for frame in frames if frame.is_corrupt])
                for frame in frames:
                    size = size or (frame.height, frame.width)
                    # a corrupt frame of another size: the size, too, is made up
                    if not frame.is_corrupt or (frame.height, frame.width) == size:
                        yield frame
                if packet is None:
                    return

    def decode_all(self) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        rgb, size = self.converter(None), None
        with one_line(self.path, self.package):
            for index, frame in enumerate(self.plain()):
                size = size or (frame.height, frame.width)
                if (frame.height, frame.width) != size:
                    raise RefusedVideo(self.path, "the frame size changes within the video")
                yield index, functools.partial(rgb, frame)
        if size is None:
            raise VideoError(self.path, "no frame can be decoded")

    def time(self, index: int) -> float:
        rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        if self.survey is None:
            return index / rate
        times, last = self.survey.times, len(self.survey.times) - 1
        return float((times[min(index, last)] - times[0]) * self.stream.time_base) + max(index - last, 0) / rate

    def confirm(self) -> None:
        """Decodes everything: from here on the length is that of what came out, and no header is used.

        Raises: RefusedVideo if the frame size changes.
        """
        if self.key not in self.decoded:
            count, sizes, rgb = 0, set(), self.converter(None)
            for frame in self.plain():
                if count == 0:
                    self.size = rgb(frame).shape[:2]
                count += 1
                sizes.add((frame.height, frame.width))
            remember(self.decoded, self.key, (count, sizes, self.size, self.errors), 100_000)
        self.length, sizes, self.size, self.errors = self.decoded[self.key]
        self.units = self.survey = None
        if len(sizes) > 1:
            raise RefusedVideo(self.path, "the frame size changes within the video")

    def mirrored(self) -> bool:
        """Whether the display matrix mirrors the picture: then its determinant is negative."""
        matrix_of = display_matrices(self.av.video.reformatter.VideoReformatter().reformat)
        for frame in self.plain():
            a, b, c, d = matrix_of(frame)
            return a * d < b * c
        return False

    def check(self) -> dict[str, Any]:
        length = len(self)
        self.confirm()
        if self.length == 0:
            raise VideoError(self.path, "no frame can be decoded")
        height, width = self.size
        return dict(
            frames=length,
            decoded=self.length,
            width=width,
            height=height,
            errors=max(self.errors, self.damaged),
            decoder=self.name,
        )

    def missing(self) -> int:
        if not self.container.format.name.startswith("mov,"):
            return 0
        return self.stream.frames - len(self.packets)

    def converter(self, max_short_side: int | None) -> Callable[[Any], np.ndarray]:
        """A function: av.VideoFrame -> uint8 [H, W, 3], RGB, upright, scaled down to max_short_side (None: not)."""
        # one of each for all frames: a new one takes up to 3 ms; threads=1 is three times as fast as the default
        shrink, convert, copy = (self.av.video.reformatter.VideoReformatter().reformat for _ in range(3))
        matrix_of = display_matrices(copy)

        def rgb(frame: Any) -> np.ndarray:
            height, width = scaled_size(frame.height, frame.width, max_short_side)
            if (height, width) != (frame.height, frame.width):  # before the conversion: both at once take longer
                frame = shrink(frame, width, height, interpolation="AREA", threads=1)
            return upright(convert(frame, format="rgb24", threads=1).to_ndarray(), matrix_of(frame))

        return rgb

    def decode(self, wanted: list[int], max_short_side: int | None = None) -> dict[int, np.ndarray]:
        """As fetch, by decoding from the start to the last frame wanted."""
        remaining, frames, rgb = set(wanted), {}, self.converter(max_short_side)
        index, frame = -1, None
        for index, frame in enumerate(self.plain()):
            if index in remaining:
                frames[index] = rgb(frame)
                remaining.discard(index)
                if not remaining:
                    return frames
        self.length = index + 1  # the end was seen
        if frame is not None:
            frames[index] = rgb(frame)
        return frames

    # ----------------------------------------------------------------------------------------- by the packets' times

    def fetch(self, wanted: list[int], max_short_side: int | None = None) -> dict[int, np.ndarray]:
        if self.survey is not None:
            frames = self.by_times(wanted, max_short_side)
            if frames is not None:
                return frames
            self.confirm()
        return self.decode(wanted, max_short_side)

    def by_times(self, wanted: list[int], max_short_side: int | None) -> dict[int, np.ndarray] | None:
        """As fetch, by starting at key frames; None if what comes out is not what the packets said."""
        times, starts, skip = self.survey
        last = len(times) - 1
        goal = {times[min(i, last)]: min(i, last) for i in wanted}  # {pts: index}
        rgb, frames = self.converter(max_short_side), {}
        try:
            for run in self.runs(goal, starts):
                shown = []
                for frame in self.decode_run(run, goal, skip):
                    if frame.is_corrupt:
                        return None
                    shown.append(frame.pts)
                    if frame.pts in goal:
                        frames[goal[frame.pts]] = rgb(frame)
                # compare with what is due; frames before the run's key frame may refer to what lies before it
                begin = run[0].pts
                expected = self.places
                if skip:  # the codec may have left out what is not wanted
                    expected = goal.keys() | set(shown)
                due = {packet.pts for packet in run if not packet.is_discard and packet.pts >= begin}
                if [time for time in shown if time >= begin] != sorted(time for time in due if time in expected):
                    return None
        except (self.av.FFmpegError, Doubt):
            return None
        return frames if len(frames) == len(goal) else None

    def decode_run(self, run: list[Any], goal: dict[int, int], skip: bool) -> Iterator[Any]:
        """Yields the frames of successive packets; with skip, unwanted ones only if others refer to them."""
        context = self.stream.codec_context
        context.flush_buffers()
        for packet in (*run, None):  # None: the codec gives the frames that it holds back
            unwanted = packet is not None and packet.pts not in goal
            context.skip_frame = "NONREF" if skip and unwanted else "DEFAULT"
            yield from context.decode(packet)

    def runs(self, goal: dict[int, int], starts: list[int]) -> Iterator[list[Any]]:
        """Yields the packets to decode for the times in goal: lists from a start to a wanted frame."""
        bounds = []  # [first, last] places of packets
        for time in sorted(goal):
            last = self.places[time]
            key = bisect.bisect_right(starts, last) - 1
            while self.packets[starts[key]].pts > time:  # shown before the key frame it follows
                key -= 1
            if bounds and starts[key] <= bounds[-1][1]:  # overlaps the run before: one run for both
                bounds[-1][1] = max(last, bounds[-1][1])
            else:
                bounds.append([starts[key], last])
        for first, last in bounds:
            yield self.found_again(first, last) if self.large else self.packets[first : last + 1]

    def found_again(self, first: int, last: int) -> list[Any]:
        """The packets first to last of a large file. Raises: Doubt if they are not found any more."""
        pts, dts = self.packets[first].pts, self.packets[first].dts
        if dts is None:
            dts = pts
        second = round(1 / self.stream.time_base)
        begin = next((mark.dts for mark in self.packets if mark.dts is not None), 0)
        # a seek may land behind its target: then try earlier ones, at last the beginning of the file
        for target in (pts, dts, dts - second, dts - 30 * second, begin - second):
            found = self.found_behind(target, first, last)
            if found is not None:
                return found
        raise Doubt

    def found_behind(self, target: int, first: int, last: int) -> list[Any] | None:
        """As found_again, after a seek to the time `target`; None if it landed behind the first packet."""
        wanted, found = self.packets[first : last + 1], []
        self.container.seek(target, stream=self.stream)
        for packet in self.container.demux(self.stream):
            if packet.size == 0:
                continue
            if not found and packet.pts != wanted[0].pts:
                if self.places.get(packet.pts, -1) > first:
                    return None
                continue
            if packet.pts != wanted[len(found)].pts:
                raise Doubt
            found.append(packet)
            if len(found) == len(wanted):
                return found
        return None

    @functools.cached_property
    def places(self) -> dict[int, int]:
        """{time (pts) of a packet that shows a frame: its place among the packets}"""
        return {packet.pts: place for place, (packet, unit) in enumerate(self.pairs()) if unit.frames}

    @functools.cached_property
    def survey(self) -> Survey | None:
        """What the packets say, or None if it does not tell which frame is which."""
        if self.units is None:
            return None
        codec = self.stream.codec_context
        shown = [packet for packet, unit in self.pairs() if unit.frames]
        times = [packet.pts for packet in shown]
        if not times or None in times or len(self.places) < len(times) or times[0] > min(times):
            return None  # no times, one of them twice, or one before the first packet's
        in_order = times == sorted(times)
        if codec.has_b_frames and (in_order or self.container.format.name == "avi"):
            return None  # these are the times of decoding, not those of showing
        starts = [place for place, unit in enumerate(self.units) if unit.start]
        # without reordering nothing would be skipped, and then all that is due is checked; HEVC marks temporal layers
        skip = not in_order and codec.codec.canonical_name != "hevc"
        return Survey(sorted(packet.pts for packet in shown if not packet.is_discard), starts, skip)


def remember(cache: collections.OrderedDict, key: object, value: object, count: int) -> None:
    """Adds to a cache of at most `count` entries; the oldest goes."""
    cache[key] = value
    while len(cache) > count:
        cache.popitem(last=False)


def frame_area(stream: Any) -> int:
    """Pixels per frame of an av stream, as its header says; 0 if there is no decoder for it."""
    return 0 if stream.codec_context is None else stream.codec_context.height * stream.codec_context.width


def display_matrices(reformat: Callable[..., Any]) -> Callable[[Any], Matrix]:
    """A function: av.VideoFrame -> (a, b, c, d) of x' = a x + c y, y' = b x + d y, which says where a player shows a
    pixel (ISO 14496-12), in 16.16. Read once for all frames of one rotation.

    reformat: of a VideoReformatter, which makes a small copy of the frame to read from. PyAV ties a frame whose side
    data is read into a cycle. Such a frame goes back to the decoder's pool when Python happens to collect garbage, and
    what a damaged picture lacks would come from another old picture in every run.
    """
    known = {}

    def matrix_of(frame: Any) -> Matrix:
        rotation = frame.rotation
        if rotation not in known:
            data = reformat(frame, 8, 8, "gray", threads=1).side_data.get("DISPLAYMATRIX")
            known[rotation] = (1, 0, 0, 1) if data is None else np.frombuffer(data, np.int32)[[0, 1, 3, 4]].tolist()
        return known[rotation]

    return matrix_of


def upright(image: np.ndarray, matrix: Matrix) -> np.ndarray:
    """An image [H, W, C], turned and mirrored as the display matrix says (phones, front cameras), and as players and
    FFmpeg show it: a view. A matrix that is none of the eight quarter turns and mirrors is ignored."""
    a, b, c, d = matrix
    if max(abs(a), abs(d)) < 0.02 * min(abs(b), abs(c)):  # a quarter turn: x and y change places
        image, a, d = image.swapaxes(0, 1), c, b
    elif max(abs(b), abs(c)) >= 0.02 * min(abs(a), abs(d)):
        return image
    if d < 0:
        image = image[::-1]
    if a < 0:
        image = image[:, ::-1]
    return image


DECODERS = {"decord": DecordReader, "pyav": PyAVReader}


def _brief(error: BaseException) -> str:
    """The first line of an error's message, without decord's time and source file."""
    message = str(error).strip() or type(error).__name__
    return re.sub(r"\[[\d:]+\] \S+: ", "", message.split("\n")[0])


@contextlib.contextmanager
def one_line(path: str, package: str) -> Iterator[None]:
    """Turns any error of a back end into a VideoError that names the package's version."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        version = getattr(sys.modules.get(package), "__version__", "(of unknown version)")
        reason = f"{package} {version} failed unexpectedly ({type(error).__name__}: {_brief(error)})"
        raise VideoError(path, reason) from error


@functools.cache
def _imports(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        __import__(package)
    except (ImportError, OSError):  # OSError: the wheel's library does not load on this machine
        return False
    return True


def decoders_for(path: str, decoder: str = "auto") -> list[str]:
    """Names of the back ends to try for a path, in order.

    "auto" is those installed, PyAV first: it was the faster one in every container tried (mp4, mkv, webm, avi).
    Raises: ImportError, naming what to install; ValueError for an unknown name.
    """
    if decoder not in ("auto", *DECODERS):
        raise ValueError(f"unknown decoder {decoder!r}: choose from auto, {', '.join(DECODERS)}")
    names = ["pyav", "decord"] if decoder == "auto" else [decoder]
    installed = [name for name in names if _imports(DECODERS[name].package)]
    if not installed:
        packages = " or ".join(DECODERS[name].package for name in names)
        raise ImportError(f"--decoder {decoder} is not installed: pip install {packages}")
    return installed


def open_video(path: str, decoder: str = "auto") -> VideoReader:
    """Opens a video with one of DECODERS, or the first of "auto". Raises: VideoError; ImportError."""
    if os.path.isdir(path):
        reason = "a folder, not a video: folders of frames are not supported; make each a video first"
        raise RefusedVideo(path, f"{reason}: ffmpeg -framerate 25 -i FOLDER/%05d.jpg VIDEO.mp4")
    if not os.path.isfile(path):
        raise RefusedVideo(path, "not a regular file" if os.path.lexists(path) else "no such file")
    name = decoders_for(path, decoder)[0]
    with one_line(path, DECODERS[name].package):
        video = open_with_decord(path) if name == "decord" else PyAVReader(path)
        try:
            if len(video) == 0:
                raise VideoError(path, "no frames")
        except BaseException:
            video.close()
            raise
    return video


def open_with_decord(path: str) -> VideoReader:
    """decord if it gives the frames of a plain decode (`decord_is_exact`), else PyAV.

    Without PyAV, or if PyAV cannot read the file, decord's own count is used. Raises: VideoError.
    """
    if not _imports("av"):
        return DecordReader(path)
    try:
        with one_line(path, "av"):
            video = PyAVReader(path)
    except RefusedVideo:
        raise
    except VideoError:
        return DecordReader(path)
    if not decord_is_exact(video):
        return video
    video.close()
    return DecordReader(path, video.length)


def decord_is_exact(video: PyAVReader) -> bool:
    """Whether decord gives the frames of a plain decode; of other files it gives other frames, copies of frames, or
    memory that nobody wrote."""
    codec, container = video.stream.codec_context, video.container
    if video.units is None:
        return False
    if any(packet.is_discard for packet in video.packets):  # hidden by an edit list
        return False
    if len(video.packets) > video.length + MAX_SHORTFALL:  # packets without a frame
        return False
    if any(packet.is_keyframe and not unit.start for packet, unit in video.pairs()):  # it would seek to these
        return False
    if not container.format.name.startswith(("mov,", "matroska,", "avi")) or len(container.streams.video) > 1:
        return False
    if codec.codec.canonical_name not in ("h264", "mpeg4", "vp8", "vp9"):
        return False
    if codec.pix_fmt not in ("yuv420p", "yuvj420p") or codec.height % 2 == 1 or codec.width % 2 == 1:
        return False
    if codec.field_order > 1:  # interlaced: newer FFmpeg brings the colours of the fields to full size one by one
        return False
    return not video.mirrored()


def first_reading(path: str, decoder: str, read: Callable[[VideoReader], Any]) -> Any:
    """Opens a video, and returns read(video); with "auto" the other back end is tried if the first cannot read the
    file. Raises: VideoError with the first back end's reason."""
    errors = []
    for name in decoders_for(path, decoder):
        try:
            with open_video(path, name) as video:
                return read(video)
        except VideoError as error:
            errors.append(error)
            if isinstance(error, RefusedVideo):
                break
    raise errors[0]


def read_frames(
    path: str, choose: Sequence[int] | Choose, decoder: str = "auto", max_short_side: int | None = None
) -> torch.Tensor:
    """Opens a video, reads the frames of indices choose(number of frames), and closes it: uint8 [n, H, W, 3].

    With "auto" the other back end is tried if the first cannot read the file. Args: see VideoReader.read.
    Raises: VideoError with the first back end's reason.
    """
    return first_reading(path, decoder, lambda video: video.read(choose, max_short_side))
