"""Reading frames of a video with PyAV or decord; nothing else in training decodes."""

import bisect
import functools
import os
import re

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
