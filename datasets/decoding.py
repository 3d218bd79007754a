"""Reading frames of a video with PyAV or decord; nothing else in training decodes."""

import bisect
import contextlib
import functools
import importlib.metadata
import itertools
import os
import re
from typing import NamedTuple

import numpy as np
import torch

# A header may count one or two frames that no decoder delivers (HMDB51's AVI files: one). Up to this many frames past
# the last decodable one are served as a copy of it; a request further out means a truncated file.
MAX_SHORTFALL = 2


class VideoError(RuntimeError):
    """A video cannot be read; the message names the path and the reason.

    Without a reason the first argument is the whole message: so a loader rebuilds the error of one of its processes.
    """

    def __init__(self, path, reason=None):
        super().__init__(path if reason is None else f"{path}: {reason}")


class CannotOpen(VideoError):
    """The back end cannot open the file at all: another one may."""


class VideoReader:
    """An open video: a context manager with a length and `read`. A back end gives __init__, __len__, close and decode,
    and `fetch` where it has a faster way to the same frames.

    len(video) is what a clip may be drawn from. Decoding may find another number of frames than the file claims: then
    len(video) changes, to the number that was decoded, and stays.
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

    def read_chosen(self, choose, max_short_side=None):
        """read(choose(len(self))), chosen again where decoding changes the length. Raises VideoError."""
        for _ in range(2):
            length = len(self)
            indices = choose(length)
            with foreseen(self.path, self.package):
                frames = self.fetch(sorted(set(indices)), max_short_side)
            if len(self) == length:
                break
        return self._arrange(indices, frames, max_short_side)

    def read(self, indices, max_short_side=None):
        """Decodes frames.

        Args: indices, a sequence of int in any order, repeats allowed; max_short_side in pixels: larger frames are
        scaled down to it, to even sides (see scaled_size).
        Returns: uint8 [len(indices), H, W, 3], RGB. Where the frame size changes within the clip, all frames are scaled
        to the size of the first. An index up to 2 past the last decodable frame gives that frame.
        Raises: VideoError where the video cannot be decoded that far.
        """
        if len(indices) == 0 or min(indices) < 0:
            raise ValueError(f"frame indices must be at least one, none negative: {list(indices)}")
        with foreseen(self.path, self.package):
            frames = self.fetch(sorted(set(indices)), max_short_side)
        return self._arrange(indices, frames, max_short_side)

    def _arrange(self, indices, frames, max_short_side):
        if not frames:
            raise VideoError(self.path, "no frame can be decoded")
        last = max(frames)
        if max(indices) > last + MAX_SHORTFALL:
            reason = f"truncated or damaged: frame {max(indices)} wanted, the last decodable one is {last}"
            raise VideoError(self.path, reason)
        for frame in frames.values():
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
                kind = f"{frame.dtype} {list(frame.shape)}"
                raise VideoError(self.path, f"{self.package} gave a frame of {kind}, not uint8 [H, W, 3]")
        clip = [torch.from_numpy(np.ascontiguousarray(frames[min(i, last)])) for i in indices]
        size = scaled_size(*clip[0].shape[:2], max_short_side)
        if any(frame.shape[:2] != size for frame in clip):  # else PyAV has scaled already, or nothing is to be
            clip = [_resized(frame, size) for frame in clip]
        return torch.stack(clip)


def _resized(frame, size):
    """uint8 [H, W, 3] -> uint8 [*size, 3]."""
    if frame.shape[:2] == size:
        return frame
    frame = frame.permute(2, 0, 1).unsqueeze(0)
    frame = torch.nn.functional.interpolate(frame, size, mode="bicubic", antialias=True)
    return frame.squeeze(0).permute(1, 2, 0)


@contextlib.contextmanager
def foreseen(path, package):
    """Makes a VideoError of whatever a back end raises that nobody thought of, with the package and its version."""
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except Exception as error:
        version = importlib.metadata.version(package)
        raise VideoError(path, f"{package} {version} failed ({type(error).__name__}: {_brief(error)})") from error


def scaled_size(height, width, max_short_side):
    """Height and width, even and with at most this short side, of a frame that is larger; others keep their size."""
    if max_short_side is None or min(height, width) <= max_short_side:
        return height, width
    half = max_short_side // 2
    return tuple(2 * round(side * half / min(height, width)) for side in (height, width))


class DecordReader(VideoReader):
    """decord: seeks to key frames. One thread, since more fail on VP9 of 427 x 240 (Something-Something V2).

    Its FFmpeg is old. Where PyAV is installed, the length is PyAV's, so that both draw the same clips, and what decord
    is known to read wrongly is refused.
    """

    package = "decord"
    # Containers in which decord seeks exactly, for the usual codecs (H.264, VP9). In AVI with B-frames (HMDB51) its
    # seek and its skip are off, by one frame up to a key-frame interval, so there it decodes frame by frame.
    seekable = (".mp4", ".m4v", ".mov", ".mkv", ".webm")

    def __init__(self, path):
        import decord

        self.path = path
        self.known_errors = (RuntimeError, IndexError, StopIteration, decord.DECORDError)  # the last is no RuntimeError
        self.length, checked = None, None
        if _imports("av"):
            with contextlib.suppress(CannotOpen):  # then decord is asked without
                checked = PyAVReader(path)
        if checked is not None:
            with checked:
                wrong = checked.unfit_for_decord()
                self.length = len(checked)
            if wrong:
                raise VideoError(path, f"decord {wrong}: use --decoder pyav, or auto")
        try:
            self.video = decord.VideoReader(path, num_threads=1)
        except self.known_errors as error:
            raise CannotOpen(path, f"decord cannot open it ({_brief(error)})") from error

    def __len__(self):
        return len(self.video) if self.length is None else self.length

    def close(self):
        self.video = None

    def decode(self, wanted):
        last = len(self) - 1  # decord repeats the last decodable frame up to its own length
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
        except self.known_errors as error:
            raise VideoError(self.path, f"decord cannot decode it ({_brief(error)})") from error


class Timeline(NamedTuple):
    """What the packets of a video say of its frames, where that can be relied on."""

    times: list[int]  # pts of the frames, in the order shown
    order: list[int]  # pts of the packets, in the order of the file
    hidden: set[int]  # pts of the packets that show nothing
    starts: list[int]  # places in `order` at which decoding may start
    reordered: bool  # whether packets are decoded in another order than shown


class PyAVReader(VideoReader):
    """PyAV (FFmpeg), one thread, exact whatever the codec.

    Which frame is which is decided in one of two ways. Where every packet has a time of its own and is one picture
    (`_survey`), frames are found by their times: `fetch` starts at key frames, and the codec skips what is neither
    wanted nor referred to. Everywhere else, and where what comes out is not what the packets said, the frames are
    counted: all are decoded once, a damaged packet is left out as players do, and frame i is the i-th that came out.
    """

    package = "av"
    max_kept = 1 << 28  # bytes; the packets of larger files are not kept in memory but read again

    def __init__(self, path):
        import av

        self.path, self.av = path, av
        self.errors = 0  # damaged packets, known once all was decoded
        self.length = None
        try:
            self.container, self.stream = self.open()
            self.keep = os.path.getsize(path) <= self.max_kept
            self.packets, self.timeline = self._survey()
        except (av.FFmpegError, OSError) as error:
            raise CannotOpen(path, f"PyAV cannot open it ({_brief(error)})") from error
        if self.timeline is not None:
            self.length = len(self.timeline.times)

    def open(self):
        """(container, its video stream). Raises FFmpegError, OSError, VideoError."""
        container = open_container(self.path)
        try:
            return container, self._video_stream(container)
        except VideoError:
            container.close()
            raise

    def _video_stream(self, container):
        """The stream that players show: no cover picture, no thumbnails."""
        streams = [s for s in container.streams.video if not int(s.disposition) & COVER]
        if not streams and (container.streams.audio or container.streams.video):
            raise VideoError(self.path, "no video (sound, or a cover picture, alone)")
        if not streams:
            raise CannotOpen(self.path, "PyAV cannot open it (there is no video in it)")
        usable = [s for s in streams if s.codec_context is not None]
        if not usable:
            raise CannotOpen(self.path, "PyAV cannot open it (no decoder for its codec)")
        best = container.streams.best("video")
        stream = next((s for s in usable if best is not None and s.index == best.index), usable[0])
        stream.thread_count = 1
        return stream

    def open_again(self):
        """A second container. Raises VideoError: the file may have gone since the first, or be another."""
        try:
            return self.open()
        except (self.av.FFmpegError, OSError) as error:
            raise VideoError(self.path, f"PyAV cannot open it again ({_brief(error)})") from error

    def __len__(self):
        if self.length is None:
            self.length, self.errors = self._count()
        return self.length

    def close(self):
        self.container.close()

    def unfit_for_decord(self):
        """What decord 0.6.0 does wrong with this file, or None."""
        if self.container.format.name == "mpegts":
            return "starts at the second key frame of a transport stream"
        if self.stream.codec_context.field_order not in (0, 1):
            return "miscounts interlaced video"
        frame = next(self.shown(), None)
        if frame is not None and np.linalg.det(display_matrix(frame)) < 0:
            return "shows mirrored video upside down"
        return None

    def shown(self):
        """Yields all frames from the start, in the order shown. A packet that cannot be decoded is left out, as players
        do, and counted in `errors`."""
        self.errors = 0
        container, stream = self.open_again()
        with container:
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except (self.av.FFmpegError, OSError):  # the file cannot be read further
                    self.errors += 1
                    packet = None
                try:
                    yield from stream.codec_context.decode(packet)
                except EOFError:  # the codec was emptied already
                    return
                except self.av.FFmpegError:
                    self.errors += 1
                if packet is None:
                    return

    def _count(self):
        """(frames, damaged packets) of the whole file, decoded once a process and version of the file."""
        key = self._identity()
        if key not in _COUNTED:
            count = sum(1 for _ in self.shown())
            if len(_COUNTED) >= 1_000_000:  # bounds the memory of a process that reads many millions of files
                _COUNTED.clear()
            _COUNTED[key] = count, self.errors
        return _COUNTED[key]

    def _identity(self):
        status = os.stat(self.path)
        return self.path, status.st_size, status.st_mtime_ns

    def converter(self, max_short_side):
        """A function: frame -> uint8 [H, W, 3], RGB, upright, scaled down to max_short_side (None: as it is)."""
        # one of each for all frames: a new one a frame costs up to 3 ms; threads=1: three times as fast as the default
        shrink, convert = (self.av.video.reformatter.VideoReformatter().reformat for _ in range(2))

        def rgb(frame):
            height, width = scaled_size(frame.height, frame.width, max_short_side)
            matrix = display_matrix(frame)
            if (height, width) != (frame.height, frame.width):  # before the conversion: both at once take longer
                frame = shrink(frame, width, height, interpolation="AREA", threads=1)
            return upright(convert(frame, format="rgb24", threads=1).to_ndarray(), matrix)

        return rgb

    def decode(self, wanted, max_short_side=None):
        remaining, frames, index, frame = set(wanted), {}, -1, None
        rgb = self.converter(max_short_side)
        for index, frame in enumerate(self.shown()):
            if index in remaining:
                frames[index] = rgb(frame)
                remaining.discard(index)
                if not remaining:
                    break
        else:
            self.length = index + 1  # the end was seen
        if remaining and frame is not None:
            frames[index] = rgb(frame)
        return frames

    def fetch(self, wanted, max_short_side=None):
        if self.timeline is not None:
            try:
                frames = self._by_time(self.timeline, wanted, max_short_side)
            except (self.av.FFmpegError, OSError):
                frames = None
            if frames is not None:
                return frames
            self.timeline = self.length = None  # what came out is not what the packets said
        return self.decode(wanted, max_short_side)

    def _by_time(self, timeline, wanted, max_short_side):
        """As decode, or None where other frames come out than the packets said."""
        times = timeline.times
        goal = {times[i]: i for i in {min(i, len(times) - 1) for i in wanted}}
        rgb, frames, context = self.converter(max_short_side), {}, self.stream.codec_context
        for first, last in self._runs(timeline, goal):
            shown, due = [], set()
            context.flush_buffers()
            for packet in itertools.chain(self._read_packets(timeline, first, last), [None]):
                if packet is not None and not packet.is_discard and packet.pts not in timeline.hidden:
                    due.add(packet.pts)
                unwanted = packet is not None and packet.pts not in goal
                context.skip_frame = "NONREF" if timeline.reordered and unwanted else "DEFAULT"
                for frame in context.decode(packet):  # None: out with what the codec holds back
                    if frame.is_corrupt:  # patched from what happened to be decoded before it
                        return None
                    shown.append(frame.pts)
                    if frame.pts in goal:
                        frames[goal[frame.pts]] = rgb(frame)
            if timeline.reordered:  # else nothing was skipped, and all that is due is checked
                due &= goal.keys() | set(shown)
            if shown != sorted(due):
                return None
        return frames if len(frames) == len(goal) else None

    def _runs(self, timeline, goal):
        """The packets to decode for the times in goal: [first, last] places, from a start to a wanted frame."""
        order, starts = timeline.order, timeline.starts
        places, bounds = {time: i for i, time in enumerate(order)}, []
        for time in sorted(goal):
            last = places[time]
            key = bisect.bisect_right(starts, last) - 1
            while order[starts[key]] > time:  # shown before the key frame it follows
                key -= 1
            if bounds and starts[key] <= bounds[-1][1]:
                bounds[-1][1] = max(last, bounds[-1][1])
            else:
                bounds.append([starts[key], last])
        return bounds

    def _read_packets(self, timeline, first, last):
        """The packets with these places: from memory, or read again from the key frame on."""
        if self.packets is not None:
            yield from self.packets[first : last + 1]
            return
        self.container.seek(timeline.order[first], stream=self.stream)
        place = None
        for packet in self.container.demux(self.stream):
            if packet.size == 0:
                return
            if place is None:
                place = first if packet.pts == timeline.order[first] else None
            if place is not None:
                yield packet
                if place == last:
                    return
                place += 1

    def _survey(self):
        """(all packets or None where the file is large, Timeline or None where the packets do not tell)."""
        key = self._identity()
        if not self.keep and key in _SURVEYED:
            return None, _SURVEYED[key]
        packets, entries = [], []
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    entries.append(self._entry(packet))
                    if self.keep:
                        packets.append(packet)
        except (self.av.FFmpegError, OSError):
            if not entries:
                raise
            entries.append((None, None, False))  # the file cannot be read further
        timeline = self._timeline(entries)
        if self.keep:
            return packets, timeline
        while len(_SURVEYED) >= 16:  # some 10 MB for an hour of video
            _SURVEYED.pop(next(iter(_SURVEYED)))
        _SURVEYED[key] = timeline
        return None, timeline

    def _entry(self, packet):
        """(pts, kind: see _picture, whether an edit list hides it) of a packet."""
        kind = None if packet.is_corrupt else _picture(packet, self.stream.codec_context)
        return packet.pts, kind, packet.is_discard

    def _timeline(self, entries):
        """What the packets say, or None. They tell where each is one whole picture with a time of its own, and decoding
        can start at the first. Interlaced video may have two packets a frame; a file that was cut between key frames
        begins with packets that show nothing."""
        codec, order = self.stream.codec_context, [time for time, _, _ in entries]
        kinds = [kind for _, kind, _ in entries]
        if not order or None in order or None in kinds or len(set(order)) < len(order):
            return None
        if (
            codec.field_order not in (0, 1) or kinds[0] != "start" or order[0] > min(order)
        ):  # 0: unknown, 1: progressive
            return None
        ascending = order == sorted(order)
        if codec.has_b_frames and (ascending or self.container.format.name == "avi"):  # these are times of decoding
            return None
        if ascending and "B" in kinds:
            return None
        hidden = {time for time, kind, _ in entries if kind == "hidden"}
        times = sorted(time for time, kind, discard in entries if kind != "hidden" and not discard)
        starts = [place for place, kind in enumerate(kinds) if kind == "start"]
        return Timeline(times, order, hidden, starts, not ascending) if times else None


COVER = 1 << 10 | 1 << 11  # FFmpeg's dispositions attached_pic and timed_thumbnails
# What one process has found out by reading a whole file; the same whenever it is found out.
_COUNTED, _SURVEYED = {}, {}


def damage(video, decoded):
    """What is missing in a video whose frames were all decoded, in words, or None. video: a PyAVReader."""
    claimed = video.stream.frames if "mp4" in video.container.format.name else 0  # where a header can be relied on
    parts = [f"{video.errors} damaged packets left out"] if video.errors else []
    if claimed > decoded + MAX_SHORTFALL:
        parts.append(f"{decoded} of {claimed} frames")
    return ", ".join(parts) or None


def open_container(path):
    """PyAV's container of a file. HMDB51 has text that is not UTF-8, which PyAV 19 ignores unasked."""
    import av

    options = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    return av.open(path, **options)


def display_matrix(frame):
    """2 x 2 float: where the display matrix of a frame takes (column, row); the identity where there is none."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return np.eye(2)
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5] / 65536.0
    return np.array([[a, c], [b, d]])


def upright(image, matrix):
    """Turns and mirrors [H, W, C] as players do: (column, row) goes to matrix @ (column, row), to right angles."""
    (a, c), (b, d) = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):  # columns stay columns
        horizontal, vertical = a, d
    else:
        image, horizontal, vertical = image.swapaxes(0, 1), c, b
    return image[:: -1 if vertical < 0 else 1, :: -1 if horizontal < 0 else 1]


def _picture(packet, codec):
    """What a packet is: "start" (a picture that refers to none before it, nor does what follows), "frame" (another
    picture; of MPEG-4 its kind), "hidden" (decoded, not shown), or None where it is not one whole picture, or where
    this cannot be told."""
    name = codec.name
    if name in ("h264", "hevc"):
        unit = _first_slice(bytes(packet), codec.extradata, name)
        if unit is None:
            return None
        return "start" if unit in {"h264": (5,), "hevc": (16, 17, 18, 19, 20)}[name] else "frame"
    if name == "mpeg4":
        kind = _vop_kind(packet)
        return "start" if kind == "I" else kind
    if name in ("mjpeg", "prores", "rawvideo"):
        return "start"
    if name in ("av1", "libdav1d"):
        return "start" if packet.is_keyframe else "frame"
    if name in ("vp8", "vp9"):
        data = bytes(memoryview(packet)[:6])
        if len(data) < 6:
            return None
        if name == "vp8":
            if not data[0] & 1:
                return "start" if data[3:] == b"\x9d\x01\x2a" else None
            return "frame" if data[0] >> 4 & 1 else "hidden"
        if data[0] >> 6 != 2:  # VP9's frame marker
            return None
        return "start" if packet.is_keyframe else "frame"
    return None


def _first_slice(data, extradata, name):
    """Type of the first slice in an access unit of H.264 or HEVC, or None where the units are damaged or hold none."""
    shift, mask, slices = (0, 31, range(1, 6)) if name == "h264" else (1, 63, range(32))
    if extradata and extradata[0] == 1:  # avcC, hvcC (mp4, mkv): the size of each unit stands before it
        width = (extradata[4 if name == "h264" else 21] & 3) + 1
        at, found = 0, None
        while at + width < len(data):
            kind = data[at + width] >> shift & mask
            if data[at + width] & 128:  # the forbidden bit
                return None
            if found is None and kind in slices:
                found = kind
            size = int.from_bytes(data[at : at + width])
            if size == 0:
                return None
            at += width + size
        return found if at == len(data) else None
    for start in re.finditer(b"\0\0\1(.)", data, re.DOTALL):
        kind = start[1][0] >> shift & mask
        if not start[1][0] & 128 and kind in slices:
            return kind
    return None


def _vop_kind(packet):
    """ "I", "P", "B" or "S" for the one MPEG-4 picture in a packet; None where there are more (packed B-frames), or
    where it is too short to be a picture (a placeholder, after which the decoder shows nothing)."""
    _, _, picture = bytes(packet).partition(b"\0\0\1\xb6")
    return None if len(picture) < 12 or b"\0\0\1\xb6" in picture else "IPBS"[picture[0] >> 6]


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
    if os.path.isdir(path):
        raise VideoError(
            path, "a folder, perhaps of frames: only video files are read; make one of the frames (ffmpeg)"
        )
    if not os.path.isfile(path):
        raise VideoError(path, "no such file")
    reader = DECODERS[decoders_for(path, decoder)[0]]
    with foreseen(path, reader.package):
        video = reader(path)
        if len(video) == 0:
            video.close()
            raise VideoError(path, "no frame can be decoded")
    return video


def read_frames(path, choose, decoder="auto", max_short_side=None):
    """Opens a video, asks choose(number of frames) for indices, reads them and closes it: uint8 [n, H, W, 3].

    Where decoding shows that there is another number of frames, it asks once more. "auto" tries the other back end
    where the first cannot open the file. max_short_side: see VideoReader.read.
    Raises: VideoError with the first one's reason.
    """
    first = None
    for name in decoders_for(path, decoder):
        try:
            with open_video(path, name) as video:
                return video.read_chosen(choose, max_short_side)
        except CannotOpen as error:
            first = first or error
        except VideoError as error:
            raise first or error from None
    raise first
