"""Reading frames of a video with PyAV or decord; nothing else in training decodes."""

import bisect
import collections
import contextlib
import functools
import os
import re
import sys
from typing import NamedTuple

import numpy as np
import torch

from datasets.packets import Damage, Doubt, header_reader

# A request may lie this many frames past the end, as headers do that count a frame too many: it gets the last frame.
MAX_SHORTFALL = 2
COVER = 0x400  # FFmpeg's mark (attached_pic) of a stream that is the cover picture of a film or of a song


class VideoError(RuntimeError):
    """A video cannot be read; the message names the path and the reason.

    Without a reason the first argument is the whole message: so a loader rebuilds the error of one of its processes.
    """

    def __init__(self, path, reason=None):
        super().__init__(path if reason is None else f"{path}: {reason}")


class RefusedVideo(VideoError):
    """The file was read and holds nothing to train on: another back end is not asked."""


class VideoReader:
    """An open video: a context manager with a length, `read` and `check`. A back end gives __init__, __len__,
    close, fetch, check and missing.

    fetch(wanted: ascending distinct indices, max_short_side) -> {index: uint8 [H, W, 3]}; where the video ends before
    the last wanted index, the frames found and the last decodable one under its own index. It may give frames already
    scaled to max_short_side, and it may find that the length is another than len() said so far: len() then says so.
    check() -> dict(frames, as training counts them; decoded; width; height; errors, the damaged packets; decoder), by
    decoding everything. Raises VideoError. missing(): how many packets the file's header claims beyond those found.
    """

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def read(self, wanted, max_short_side=None):
        """Decodes frames.

        wanted: indices, a sequence of int in any order, repeats allowed; or a function: number of frames -> indices,
        which is called once more where decoding finds that the number is another. max_short_side in pixels: larger
        frames are scaled down to it, to even sides (see scaled_size).
        Returns: uint8 [n, H, W, 3], RGB. An index up to 2 past the last decodable frame gives that frame.
        Raises: VideoError where the video cannot be decoded that far.
        """
        choose = wanted if callable(wanted) else lambda length: wanted
        length = len(self)
        indices, frames = self.chosen(choose, max_short_side)
        if len(self) != length:
            indices, frames = self.chosen(choose, max_short_side)
        return self.clip(indices, frames, max_short_side)

    def chosen(self, choose, max_short_side):
        if len(self) == 0:
            raise VideoError(self.path, "no frame can be decoded")
        indices = choose(len(self))
        if len(indices) == 0 or min(indices) < 0:
            raise ValueError(f"frame indices must be at least one, none negative: {list(indices)}")
        with one_line(self.path, self.package):
            return indices, self.fetch(sorted(set(indices)), max_short_side)

    def clip(self, indices, frames, max_short_side):
        """The frames of the indices, [n, H, W, 3], from what fetch gave: everything that is decoded passes here."""
        if not frames:
            raise VideoError(self.path, "no frame can be decoded")
        for frame in frames.values():
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise VideoError(self.path, f"{self.package} gave {frame.dtype} {frame.shape} for a picture")
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


def scaled_size(height, width, max_short_side):
    """Height and width, even and with at most this short side, of a frame that is larger; others keep their size."""
    if max_short_side is None or min(height, width) <= max_short_side:
        return height, width
    half = max_short_side // 2
    return tuple(2 * round(side * half / min(height, width)) for side in (height, width))


class DecordReader(VideoReader):
    """decord: seeks to key frames. One thread, since more fail on VP9 of 427 x 240 (Something-Something V2).

    length: what PyAV counted; None where PyAV is not installed or cannot read the file. decord itself counts packets,
    and gives a copy of the last frame for each that has none.
    """

    name = package = "decord"
    # Containers in which decord seeks exactly, for the usual codecs (H.264, VP9). In AVI with B-frames (HMDB51) its
    # seek and its skip are off, by one frame up to a key-frame interval, so there it decodes frame by frame.
    seekable = (".mp4", ".m4v", ".mov", ".mkv", ".webm")

    def __init__(self, path, length=None):
        import decord

        self.path = path
        self.errors = (RuntimeError, IndexError, StopIteration, decord.DECORDError)  # DECORDError is no RuntimeError
        with open(path, "rb") as file:
            head = file.read(200)
        if head[:1] == b"G" == head[188:189] or head[4:5] == b"G" == head[196:197]:  # every 188 or 192 bytes
            raise VideoError(
                path, "decord begins transport streams at their second key frame: use PyAV (pip install av)"
            )
        try:
            self.video = decord.VideoReader(path, num_threads=1)
        except self.errors as error:
            raise VideoError(path, f"decord cannot open it ({_brief(error)})") from error
        self.length = len(self.video) if length is None else length

    def __len__(self):
        return self.length

    def close(self):
        self.video = None

    def fetch(self, wanted, max_short_side=None):
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

    def check(self):
        length, sizes = len(self), set()
        for begin in range(0, length, 16):  # at a time: bounds the memory
            frames = self.fetch(list(range(begin, min(begin + 16, length))))
            sizes |= {frame.shape[:2] for frame in frames.values()}
        if len(sizes) > 1:
            raise RefusedVideo(self.path, "the frame size changes within the video")
        height, width = sizes.pop()
        return dict(frames=length, decoded=length, width=width, height=height, errors=0, decoder=self.name)

    def missing(self):
        return 0


class Mark(NamedTuple):
    """What is kept of a packet of a large file."""

    pts: int | None
    dts: int | None
    is_discard: bool
    is_keyframe: bool


class PyAVReader(VideoReader):
    """PyAV (FFmpeg), one thread, exact whatever the codec.

    The frames of a video are those a plain decode shows: packet after packet from the start, past those that are
    damaged (`plain`). Their number is known in one of two ways. Where every packet's header was read and says what the
    decoder will show (datasets/packets.py), it is counted without decoding, and where the packets' times are those of
    the frames (`survey`), `fetch` starts at key frames and the codec skips what is neither wanted nor referred to. If
    what comes out is not what the packets said, and for all other files, everything is decoded once to know
    (`confirm`). The answer depends on the file alone, never on what a process has read before.
    """

    name, package = "pyav", "av"
    max_kept = 1 << 28  # bytes; the packets of larger files are not kept in memory, but found again by their times
    # What stands in files read before, by path, size and time: it saves time and changes no answer.
    surveys = collections.OrderedDict()  # of large files: packets, units, length
    decoded = collections.OrderedDict()  # of files that had to be decoded: length, sizes, size upright, errors

    def __init__(self, path):
        import av

        self.path, self.av = path, av
        self.errors, self.size = 0, None
        self.container, self.stream = self.open()
        try:
            codec, status = self.stream.codec_context, os.stat(path)
            codec.options = {"err_detect": "explode"}  # `by_times` leaves a damaged packet to `plain`
            self.large = status.st_size > self.max_kept
            self.key = (path, status.st_size, status.st_mtime_ns)
            if not self.large:
                self.demux()
            else:
                if self.key not in self.surveys:
                    self.demux()
                    remember(self.surveys, self.key, (self.packets, self.units, self.length, self.damaged), 8)
                self.packets, self.units, self.length, self.damaged = self.surveys[self.key]
        except BaseException:
            self.close()
            raise

    def open(self):
        """A container and its video stream: the first of those marked as the default one, no cover picture.

        Raises: VideoError; RefusedVideo where there is no video in the file.
        """
        try:
            try:
                container = self.av.open(self.path, metadata_errors="ignore")  # HMDB51 holds text that is not UTF-8
            except TypeError:  # from PyAV 19 on, it is ignored always
                container = self.av.open(self.path)
        except (self.av.FFmpegError, OSError) as error:
            raise VideoError(self.path, f"PyAV cannot open it ({_brief(error)})") from error
        videos = [stream for stream in container.streams.video if not stream.disposition & COVER]
        # as FFmpeg chooses: one that the file marks as default, and then the largest
        best = max(videos, key=lambda stream: (stream.disposition & 1, pixels(stream)), default=None)
        if best is not None and best.codec_context is not None:
            best.thread_count = 1
            return container, best
        cover = ", only a cover picture" if container.streams.video else ""
        container.close()
        if best is None:
            raise RefusedVideo(self.path, f"PyAV cannot open it (no video stream{cover})")
        raise VideoError(self.path, "PyAV cannot open it (no decoder for its codec)")

    def demux(self):
        """Notes all packets (of small files: keeps them) and what their headers say; units is None where that is in
        doubt, and then nothing is known of the frames."""
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
                self.damaged += damaged
        except self.av.FFmpegError:  # what follows cannot be taken apart
            self.damaged += 1
        if read is None or self.damaged or not self.units or not self.units[0].start:
            self.units = self.length = None
        else:
            shown = zip(self.packets, self.units, strict=True)
            self.length = sum(unit.frames for packet, unit in shown if not packet.is_discard)

    def __len__(self):
        if self.length is None:
            self.confirm()
        return self.length

    def close(self):
        self.container.close()

    # ------------------------------------------------------------------------------------------------ plain decoding

    def plain(self):
        """Yields the frames from the start on, as players show them: a packet that cannot be decoded is left out and
        counted in `errors`, so is a frame that the codec had to make up in part, which is shown."""
        self.errors = lost = 0
        size = None
        container, stream = self.open()
        with container:
            packets, packet = container.demux(stream), None
            while True:
                try:
                    packet = next(packets, None)
                except self.av.FFmpegError:  # nothing that follows can be found
                    packet, lost = None, lost + 1
                if packet is not None and packet.size == 0:  # it would be taken for the end
                    continue
                try:
                    frames = stream.codec_context.decode(packet)
                except self.av.FFmpegError:
                    frames, lost = [], lost + 1
                lost += sum(frame.is_corrupt for frame in frames)
                self.errors = lost
                for frame in frames:
                    size = size or (frame.height, frame.width)
                    if not frame.is_corrupt or (frame.height, frame.width) == size:  # else the size, too, is made up
                        yield frame
                if packet is None:
                    return

    def confirm(self):
        """Decodes everything: from here on the length is that of what came out, and no header is asked."""
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

    def mirrored(self):
        """Whether the display matrix does more than turn the picture."""
        matrix = display_matrices(self.av.video.reformatter.VideoReformatter().reformat)
        a, b, c, d = next(map(matrix, self.plain()), (1, 0, 0, 1))
        return a * d < b * c

    def check(self):
        length = len(self)
        self.confirm()
        if not self.length:
            raise VideoError(self.path, "no frame can be decoded")
        height, width = self.size
        found = dict(
            frames=length, decoded=self.length, width=width, height=height, errors=max(self.errors, self.damaged)
        )
        return found | dict(decoder=self.name)

    def missing(self):
        return self.stream.frames - len(self.packets) if self.container.format.name.startswith("mov,") else 0

    def converter(self, max_short_side):
        """A function: frame -> uint8 [H, W, 3], RGB, upright, scaled down to max_short_side (None: as it is)."""
        # one of each for all frames: a new one a frame costs up to 3 ms; threads=1: three times as fast as the default
        shrink, convert, copy = (self.av.video.reformatter.VideoReformatter().reformat for _ in range(3))
        matrix = display_matrices(copy)

        def rgb(frame):
            height, width = scaled_size(frame.height, frame.width, max_short_side)
            if (height, width) != (frame.height, frame.width):  # before the conversion: both at once take longer
                frame = shrink(frame, width, height, interpolation="AREA", threads=1)
            return upright(convert(frame, format="rgb24", threads=1).to_ndarray(), matrix(frame))

        return rgb

    def decode(self, wanted, max_short_side=None):
        """As fetch, from the start to the last frame wanted."""
        remaining, frames, index, frame = set(wanted), {}, -1, None
        rgb = self.converter(max_short_side)
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

    def fetch(self, wanted, max_short_side=None):
        if self.survey is not None:
            frames = self.by_times(wanted, max_short_side)
            if frames is not None:
                return frames
            self.confirm()
        return self.decode(wanted, max_short_side)

    def by_times(self, wanted, max_short_side):
        """As fetch; None where what comes out is not what the packets said."""
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
                        if frame.is_corrupt:
                            return None
                        shown.append(frame.pts)
                        if frame.pts in goal:
                            frames[goal[frame.pts]] = rgb(frame)
                # pictures shown before the key frame the run starts at may refer to what stands before it
                begin = run[0].pts
                due = {packet.pts for packet in run if not packet.is_discard and packet.pts >= begin}
                due &= goal.keys() | set(shown) if skip else self.places.keys()
                if [time for time in shown if time >= begin] != sorted(due):
                    return None
        except (self.av.FFmpegError, Doubt):
            return None
        return frames if len(frames) == len(goal) else None

    def runs(self, goal, starts):
        """Yields the packets to decode for the times in goal: lists from a start to a wanted frame."""
        bounds = []
        for time in sorted(goal):
            last = self.places[time]
            key = bisect.bisect_right(starts, last) - 1
            while self.packets[starts[key]].pts > time:  # shown before the key frame it follows
                key -= 1
            if bounds and starts[key] <= bounds[-1][1]:
                bounds[-1][1] = max(last, bounds[-1][1])
            else:
                bounds.append([starts[key], last])
        for first, last in bounds:
            yield self.found_again(first, last) if self.large else self.packets[first : last + 1]

    def found_again(self, first, last):
        """The packets first to last of a large file. Raises: Doubt where they are not there any more."""
        wanted, second = self.packets[first : last + 1], round(1 / self.stream.time_base)
        late = wanted[0].dts if wanted[0].dts is not None else wanted[0].pts
        for target in (wanted[0].pts, late, late - second, late - 30 * second, None):
            if target is None:
                begin = [mark.dts for mark in self.packets if mark.dts is not None] or [0]
                target = begin[0] - second
            self.container.seek(target, stream=self.stream)
            found = []
            for packet in self.container.demux(self.stream):
                if packet.size == 0:
                    continue
                if not found and packet.pts != wanted[0].pts:
                    if self.places.get(packet.pts, -1) > first:
                        break  # it landed behind
                    continue
                found.append(packet)
                if packet.pts != wanted[len(found) - 1].pts:
                    raise Doubt
                if len(found) == len(wanted):
                    return found
        raise Doubt

    @functools.cached_property
    def places(self):
        """{time (pts) of a packet that shows a frame: its place among the packets}"""
        shown = enumerate(zip(self.packets, self.units, strict=True))
        return {packet.pts: place for place, (packet, unit) in shown if unit.frames}

    @functools.cached_property
    def survey(self):
        """What the packets say, or None where it does not tell which frame is which.

        Returns: times (pts) of the frames in the order shown; places of the packets at which decoding may start;
        whether the codec is told to skip: without reordering nothing would be, and then all that is due is checked.
        """
        if self.units is None:
            return None
        codec = self.stream.codec_context
        shown = [packet for packet, unit in zip(self.packets, self.units, strict=True) if unit.frames]
        times = [packet.pts for packet in shown]
        if not times or None in times or len(self.places) < len(times) or times[0] > min(times):
            return None
        in_order = times == sorted(times)
        if codec.has_b_frames and (in_order or self.container.format.name == "avi"):  # these are times of decoding
            return None
        starts = [place for place, unit in enumerate(self.units) if unit.start]
        skip = not in_order and codec.codec.canonical_name != "hevc"  # its marks are of temporal layers
        return sorted(packet.pts for packet in shown if not packet.is_discard), starts, skip


def remember(cache, key, value, count):
    """Of the surveys of large files 8 are kept: some 15 MB for an hour of video each."""
    cache[key] = value
    while len(cache) > count:
        cache.popitem(last=False)


def pixels(stream):
    return 0 if stream.codec_context is None else stream.codec_context.height * stream.codec_context.width


def display_matrices(reformat):
    """A function: frame -> (a, b, c, d) of x' = a x + c y, y' = b x + d y, which says where a player shows a pixel (ISO
    14496-12), in 16.16. Read once for all frames of one rotation.

    PyAV ties a frame that is asked for its side data into a cycle, so that it goes back to the decoder's pool when
    Python happens to collect garbage, and what a damaged picture lacks would come from another old picture in every
    run. So a small copy is asked. reformat: of a VideoReformatter.
    """
    known = {}

    def matrix(frame):
        rotation = frame.rotation
        if rotation not in known:
            data = reformat(frame, 8, 8, "gray", threads=1).side_data.get("DISPLAYMATRIX")
            known[rotation] = (1, 0, 0, 1) if data is None else np.frombuffer(data, np.int32)[[0, 1, 3, 4]].tolist()
        return known[rotation]

    return matrix


def upright(image, matrix):
    """An image [H, W, C], turned and mirrored as the display matrix says (phones, front cameras), and as players and
    FFmpeg show it. A matrix that is none of the eight quarter turns and mirrors is left alone."""
    a, b, c, d = matrix
    if max(abs(a), abs(d)) < 0.02 * min(abs(b), abs(c)):
        image, a, d = image.swapaxes(0, 1), c, b
    elif max(abs(b), abs(c)) >= 0.02 * min(abs(a), abs(d)):
        return image
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


DECODERS = {"decord": DecordReader, "pyav": PyAVReader}


def _brief(error):
    # without decord's time and source file
    return re.sub(r"\[[\d:]+\] \S+: ", "", (str(error).strip() or type(error).__name__).split("\n")[0])


@contextlib.contextmanager
def one_line(path, package):
    """Makes whatever a back end fails with a VideoError that names the package's version."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        version = getattr(sys.modules.get(package), "__version__", "(of unknown version)")
        reason = f"{package} {version} failed in a way it should not ({type(error).__name__}: {_brief(error)})"
        raise VideoError(path, reason) from error


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
    if os.path.isdir(path):
        reason = "a folder, not a video: folders of frames are not read; make each a video first, such as with ffmpeg"
        raise RefusedVideo(path, f"{reason} -framerate 25 -i FOLDER/%05d.jpg VIDEO.mp4")
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


def open_with_decord(path):
    """decord for what it reads exactly: a clip of equal packets, one a frame, in a container in which it seeks. PyAV
    reads the rest: of that decord would give other frames, copies, or memory that nobody wrote. Without PyAV, or where
    PyAV cannot read the file, decord's word is taken."""
    if not _imports("av"):
        return DecordReader(path)
    try:
        with one_line(path, "av"):
            video = PyAVReader(path)
    except RefusedVideo:
        raise
    except VideoError:
        return DecordReader(path)
    codec, packets = video.stream.codec_context, video.packets
    if (
        video.units is None
        or any(packet.is_discard for packet in packets)
        or len(packets) > video.length + MAX_SHORTFALL
        or any(packet.is_keyframe and not unit.start for packet, unit in zip(packets, video.units, strict=True))
        or not video.container.format.name.startswith(("mov,", "matroska,", "avi"))
        or len(video.container.streams.video) > 1
        or codec.codec.canonical_name not in ("h264", "mpeg4", "vp8", "vp9")
        or codec.pix_fmt not in ("yuv420p", "yuvj420p")
        or codec.height % 2 + codec.width % 2
        or codec.field_order > 1  # interlaced: newer FFmpeg brings the colours of the fields to full size one by one
        or video.mirrored()
    ):
        return video
    video.close()
    return DecordReader(path, video.length)


def read_frames(path, choose, decoder="auto", max_short_side=None):
    """Opens a video, asks choose(number of frames) for indices, reads them and closes it: uint8 [n, H, W, 3].

    "auto" asks the other back end where the first cannot read the file. See VideoReader.read.
    Raises: VideoError with the first one's reason.
    """
    errors = []
    for name in decoders_for(path, decoder):
        try:
            with open_video(path, name) as video:
                return video.read(choose, max_short_side)
        except VideoError as error:
            errors.append(error)
            if isinstance(error, RefusedVideo):
                break
    raise errors[0]
