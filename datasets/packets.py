"""What the header of one coded packet says: how many frames the decoder will show for it, and whether decoding may
start there. No decoder is needed, so a file can be surveyed at the speed of reading it.

Written from the standards: ISO 14496-10 (H.264), 23008-2 (HEVC), 14496-2 (MPEG-4), RFC 6386 (VP8), the VP9 and AV1
bitstream specifications, ITU T.81 (JPEG).
"""

import itertools
import re
from typing import NamedTuple


class Unit(NamedTuple):
    frames: int  # that the decoder shows for the packet: 1, or 0 (hidden, or a placeholder)
    start: bool  # whether frames from here on, in the order shown, refer to nothing before


class Doubt(Exception):
    """The frames of a packet cannot be told without decoding."""


class Damage(Doubt):
    """The packet is damaged, or one before it is missing."""


def header_reader(codec, container, extradata):
    """A function bytes of the next packet -> Unit, which raises Doubt; None for a codec whose headers are not read.

    Args: codec, FFmpeg's name; container, FFmpeg's name of the format; extradata, bytes or None. Packets must come in
    the order of the file from its start: what a stream announces once (sizes, counters) is compared from then on.
    """
    if codec == "hevc" and not container.startswith(("mov,", "matroska,")):
        return None  # a lost packet leaves no trace in its headers, and other containers lose packets unnoticed
    reader = {"h264": H264, "hevc": HEVC, "mpeg4": MPEG4, "vp8": VP8, "vp9": VP9, "av1": AV1, "mjpeg": JPEG}.get(codec)
    if reader is None:
        return None
    try:
        read = reader(bytes(extradata or b"")).read
    except (Doubt, IndexError):  # damaged from the first byte
        return None

    def checked(data):
        try:
            return read(data)
        except IndexError as error:  # ends in the middle of its header
            raise Damage from error

    return checked


class Bits:
    """Reads a header bit by bit."""

    def __init__(self, data):
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count):
        self.left -= count
        if self.left < 0:
            raise Damage
        return self.value >> self.left & ((1 << count) - 1)

    def unsigned(self):
        """Exp-Golomb."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)

    def signed(self):
        number = self.unsigned()
        return (number + 1) // 2 if number % 2 else -(number // 2)


class Same:
    """A value that must not change within a video, such as its size."""

    def __init__(self):
        self.value = None

    def check(self, value):
        if self.value is None:
            self.value = value
        if value != self.value:
            raise Doubt


# -------------------------------------------------------------------------------------------------- H.264 and HEVC


def units_of(data, width):
    """The NAL units of a packet, of long ones the first 1000 bytes.

    width: bytes of the size before each (mp4, mkv); 0: start codes are between them.
    """
    if not width:
        starts = [match.end() for match in re.finditer(b"\0\0\1", data)]
        bounds = itertools.pairwise([*starts, len(data) + 3])
        return [data[begin : min(end - 3, begin + 1000)] for begin, end in bounds]
    units, at = [], 0
    while at < len(data):
        end = at + width + int.from_bytes(data[at : at + width], "big")
        if end > len(data):
            raise Damage
        units.append(data[at + width : min(end, at + width + 1000)])
        at = end
    return [unit for unit in units if unit]


def unescape(unit):
    return unit.replace(b"\0\0\3", b"\0\0")


class H264:
    def __init__(self, extradata):
        self.width, self.sequence, self.expected = 0, None, None
        units = units_of(extradata, 0)
        if extradata[:1] == b"\1":  # avcC
            self.width, units, at = (extradata[4] & 3) + 1, [], 6
            for _ in range(extradata[5] & 31):
                size = int.from_bytes(extradata[at : at + 2], "big")
                units.append(extradata[at + 2 : at + 2 + size])
                at += 2 + size
        for unit in units:
            if unit and unit[0] & 31 == 7:
                self.announce(unit)

    def announce(self, unit):
        """A sequence parameter set: one for the whole video, or the size may change within it."""
        unit = unit.rstrip(b"\0")
        if self.sequence is None:
            self.sequence = unit
            self.counter, self.gaps, self.may_be_fields = _sequence(Bits(unescape(unit[1:])))
        elif unit != self.sequence:
            raise Doubt

    def read(self, data):
        pictures = []
        for unit in units_of(data, self.width):
            kind = unit[0] & 31
            if unit[0] & 128:
                raise Damage
            if 2 <= kind <= 4:  # data partitions
                raise Doubt
            if kind == 7:
                self.announce(unit)
            elif kind in (1, 5):
                if unit[1] & 128:  # its first macroblock is number 0: a new picture
                    pictures.append(unit)
                elif not pictures:
                    raise Damage
        if not pictures:
            raise Damage
        if len(pictures) > 1 or self.sequence is None:
            raise Doubt
        (picture,) = pictures
        kind, reference, bits = picture[0] & 31, picture[0] & 96, Bits(unescape(picture[1:40]))
        bits.unsigned()
        if bits.unsigned() > 9 or bits.unsigned() > 255:  # kind of slice; parameter set
            raise Damage
        number = bits.read(self.counter)
        if self.may_be_fields and bits.read(1):
            raise Doubt  # two packets make a frame
        # a reference picture that is missing shows in the count of them, and the decoder may then drop frames
        due = 0 if kind == 5 else self.expected
        if reference and due is not None:
            self.expected = (number + 1) % (1 << self.counter)
        if number != due and due is not None and not self.gaps:
            raise Damage
        return Unit(1, kind == 5)


def _sequence(bits):
    """Bits of the picture counter, whether it may jump, and whether there may be fields, of H.264."""
    profile = bits.read(8)
    bits.read(16)
    bits.unsigned()
    if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
        chroma = bits.unsigned()
        if chroma == 3 and bits.read(1):
            raise Doubt  # three colour planes, each coded as a picture
        bits.unsigned(), bits.unsigned(), bits.read(1)
        if bits.read(1):
            for number in range(12 if chroma == 3 else 8):
                if bits.read(1):
                    last = following = 8
                    for _ in range(16 if number < 6 else 64):
                        if following:
                            following = (last + bits.signed()) % 256
                        last = following or last
    counter = bits.unsigned() + 4
    order = bits.unsigned()
    if order == 0:
        bits.unsigned()
    elif order == 1:
        bits.read(1), bits.signed(), bits.signed()
        for _ in range(bits.unsigned()):
            bits.signed()
    bits.unsigned()
    gaps = bits.read(1)
    bits.unsigned(), bits.unsigned()
    return counter, bool(gaps), not bits.read(1)


class HEVC:
    def __init__(self, extradata):
        if extradata[:1] != b"\1":  # hvcC
            raise Doubt
        self.width, self.sequence, self.first, self.cut, at = (extradata[21] & 3) + 1, Same(), True, False, 23
        for _ in range(extradata[22]):
            kind, count = extradata[at] & 63, int.from_bytes(extradata[at + 1 : at + 3], "big")
            at += 3
            for _ in range(count):
                size = int.from_bytes(extradata[at : at + 2], "big")
                if kind == 33:
                    self.sequence.check(extradata[at + 2 : at + 2 + size].rstrip(b"\0"))
                at += 2 + size

    def read(self, data):
        pictures = []
        for unit in units_of(data, self.width):
            kind, layer = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3
            if unit[0] & 128:
                raise Damage
            if layer:  # depth, or a second view: not decoded
                continue
            if kind == 33:
                self.sequence.check(unit.rstrip(b"\0"))
            elif kind < 32:
                if unit[2] & 128:
                    pictures.append(kind)
                elif not pictures:
                    raise Damage
        if not pictures:
            raise Damage
        if len(pictures) > 1:
            raise Doubt
        (kind,) = pictures
        start = 16 <= kind <= 21
        if start:  # pictures shown before it may refer to what a cut has removed: they are skipped
            self.cut = kind <= 18 or kind == 21 and self.first
        self.first = False
        return Unit(int(not (self.cut and kind in (8, 9))), start)


# ------------------------------------------------------------------------------------------------------------ MPEG-4


def vop_kinds(data):
    """The MPEG-4 pictures in a packet, such as "P" or "PB" (packed); "" for a placeholder."""
    kinds, at = "", data.find(b"\0\0\1\xb6")
    while -1 < at < len(data) - 4:
        kinds += "IPBS"[data[at + 4] >> 6]
        at = data.find(b"\0\0\1\xb6", at + 4)
    return kinds


class MPEG4:
    def __init__(self, extradata):
        self.size, self.packed = Same(), False
        self.announce(extradata)

    def announce(self, data):
        """A video object layer, which holds the size and stands before the first picture."""
        found = re.search(rb"\x00\x00\x01[\x20-\x2f]", data[: data.find(b"\0\0\1\xb6")])
        if not found:
            return
        bits = Bits(data[found.end() : found.end() + 40])
        bits.read(9)
        if bits.read(1):
            bits.read(7)
        if bits.read(4) == 15:  # shape of a pixel
            bits.read(16)
        if bits.read(1):
            bits.read(3)
            if bits.read(1):  # buffer sizes
                bits.read(79)
        if bits.read(2):  # not a rectangle
            raise Doubt
        bits.read(1)
        resolution = bits.read(16)
        bits.read(1)
        if bits.read(1):
            bits.read(max((resolution - 1).bit_length(), 1))
        self.size.check((bits.read(14), bits.read(14)))

    def read(self, data):
        kinds = vop_kinds(data)
        if self.packed:  # the second picture of the packet before is shown in place of this one
            self.packed = False
            if len(data) > 19:
                raise Doubt
            return Unit(1, False)
        if not kinds and len(data) > 1:
            raise Damage
        if len(kinds) > 2 or kinds and len(data) < 16:
            raise Doubt  # the decoder shows nothing for a picture marked as not coded, which is short
        self.announce(data)
        self.packed = len(kinds) == 2
        return Unit(min(len(kinds), 1), kinds == "I")


# ------------------------------------------------------------------------------------------------- VP8, VP9, AV1, JPEG


class VP8:
    def __init__(self, extradata):
        self.size = Same()

    def read(self, data):
        key = not data[0] & 1
        if key:
            if data[3:6] != b"\x9d\1\x2a" or len(data) < 10:
                raise Damage
            self.size.check(data[6:10])
        return Unit(data[0] >> 4 & 1, key)


class VP9:
    def __init__(self, extradata):
        self.size = Same()

    def read(self, data):
        frames, last = [data], data[-1]
        if last >> 5 == 6:  # a superframe: sizes of the frames in it, at its end
            width, count = (last >> 3 & 3) + 1, (last & 7) + 1
            index = data[-2 - width * count :]
            if index[0] == last:
                frames, at = [], 0
                for number in range(count):
                    size = int.from_bytes(index[1 + number * width : 1 + (number + 1) * width], "little")
                    frames.append(data[at : at + size])
                    at += size
                if at + len(index) > len(data):
                    raise Doubt
        headers = [self.header(Bits(frame[:32])) for frame in frames if frame]
        shown = sum(show for show, _ in headers)
        if shown > 1:
            raise Doubt
        return Unit(shown, headers[0] == (1, True))

    def header(self, bits):
        """(frames shown, whether a key frame)"""
        if bits.read(2) != 2:
            raise Damage
        profile = bits.read(1) + 2 * bits.read(1)
        if profile == 3:
            bits.read(1)
        if bits.read(1):  # shows an earlier frame
            return 1, False
        key, show, resilient = not bits.read(1), bits.read(1), bits.read(1)
        if key:
            self.sync(bits)
            self.colours(bits, profile)
            self.size.check((bits.read(16), bits.read(16)))
            return show, True
        intra = not show and bits.read(1)
        if not resilient:
            bits.read(2)
        if intra:
            self.sync(bits)
            if profile > 0:
                self.colours(bits, profile)
            bits.read(8)
            self.size.check((bits.read(16), bits.read(16)))
        else:
            bits.read(8 + 3 * 4)
            if not any(bits.read(1) for _ in range(3)):  # as large as one of the three frames it refers to
                self.size.check((bits.read(16), bits.read(16)))
        return show, False

    @staticmethod
    def sync(bits):
        if bits.read(24) != 0x498342:
            raise Damage

    @staticmethod
    def colours(bits, profile):
        if profile >= 2:
            bits.read(1)
        if bits.read(3) != 7:
            bits.read(1)
            if profile in (1, 3):
                bits.read(3)
        elif profile in (1, 3):
            bits.read(1)


class AV1:
    def __init__(self, extradata):
        self.sequence = Same()

    @staticmethod
    def units(data):
        """Yields (kind, content) of the open bitstream units."""
        at = 0
        while at < len(data):
            head = data[at]
            at += 1
            if head & 0b10000101:  # forbidden and reserved bits; layers
                raise Doubt
            size = len(data) - at
            if head & 2:
                size = shift = 0
                while True:
                    byte = data[at]
                    at += 1
                    size |= (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
            if at + size > len(data):
                raise Doubt
            yield head >> 3 & 15, data[at : at + size]
            at += size

    def read(self, data):
        shown, start = 0, False
        for kind, content in self.units(data):
            if kind == 1:
                if content[0] & 0b1000:  # a still picture's short header
                    raise Doubt
                self.sequence.check(content)
            elif kind in (3, 6):  # frame header; frame
                again, kind, show = content[0] >> 7, content[0] >> 5 & 3, content[0] >> 4 & 1
                start = start or not (shown or again) and kind == 0 and bool(show)
                shown += again or show
            elif kind not in (2, 4, 5, 7, 15):
                raise Doubt
        if shown != 1 or self.sequence.value is None:
            raise Doubt
        return Unit(1, start)


class JPEG:
    def __init__(self, extradata):
        self.size = Same()

    def read(self, data):
        end = data.rstrip(b"\0")
        if data[:3] != b"\xff\xd8\xff" or end[-2:] != b"\xff\xd9":
            raise Damage
        if data.find(b"\xff\xd8\xff", 2) > 0:
            raise Doubt  # two fields
        at = 2
        while data[at] == 255:
            if 0xC0 <= data[at + 1] <= 0xC2:
                self.size.check(data[at + 5 : at + 9])
                return Unit(1, True)
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        raise Doubt
