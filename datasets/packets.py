"""What the header of one coded packet says: how many frames the decoder will show for it, and whether decoding may
start there. No decoder is needed, so a file can be surveyed at the speed of reading it.

Written from the standards, whose names the comments use: ISO 14496-10 (H.264), 23008-2 (HEVC), 14496-2 (MPEG-4),
RFC 6386 (VP8), the VP9 and AV1 bitstream specifications, ITU T.81 (JPEG).
"""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Unit(NamedTuple):
    """What one packet means for the frames of a video."""

    frames: int  # that the decoder shows for the packet: 1, or 0 (hidden, or a placeholder)
    start: bool  # whether frames from here on, in the order shown, refer to nothing before


class Doubt(Exception):
    """The frames of a packet cannot be told without decoding."""


class Damage(Doubt):
    """The packet is damaged, or one before it is missing."""


def header_reader(codec: str, container: str, extradata: bytes | None) -> Callable[[bytes], Unit] | None:
    """A function that reads the header of one packet, or None if the headers of this codec are not read.

    Packets must come in the order of the file, from its start: sizes and counters are compared with earlier ones.
    Args: codec and container, FFmpeg's names; extradata, the codec's global headers.
    The function raises: Doubt or Damage.
    """
    if codec == "hevc" and not container.startswith(("mov,", "matroska,")):
        return None  # a lost packet leaves no trace in its headers, and other containers lose packets unnoticed
    if codec not in READERS:
        return None
    try:
        read = READERS[codec](bytes(extradata or b"")).read
    except (Doubt, IndexError):  # damaged from the first byte
        return None

    def checked(data: bytes) -> Unit:
        try:
            return read(data)
        except IndexError as error:  # the packet ends in the middle of its header
            raise Damage from error

    return checked


class Bits:
    """Reads the bits of a header, the highest bit of each byte first. Raises Damage at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        """The next `count` bits as an unsigned number."""
        self.left -= count
        if self.left < 0:
            raise Damage
        return self.value >> self.left & ((1 << count) - 1)

    def unsigned(self) -> int:
        """An Exp-Golomb code, ue(v) in H.264: n zeros, a one, n bits."""
        zeros = 0
        while self.read(1) == 0:
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)

    def signed(self) -> int:
        """A signed Exp-Golomb code, se(v) in H.264: 0, 1, -1, 2, -2, ..."""
        number = self.unsigned()
        return (number + 1) // 2 if number % 2 else -(number // 2)


class Same:
    """A value that must not change within a video, such as its size."""

    def __init__(self) -> None:
        self.value = None

    def check(self, value: object) -> None:
        """Raises: Doubt, if the value differs from the first one."""
        if self.value is None:
            self.value = value
        if value != self.value:
            raise Doubt


class HeaderReader:
    """The headers of one video. A codec gives `read`, and may look at the global headers in __init__."""

    def __init__(self, extradata: bytes) -> None:
        self.fixed = Same()  # size or sequence header

    def read(self, data: bytes) -> Unit:
        """Reads the header of the next packet. Raises: Doubt, Damage, or IndexError if the packet is too short."""
        raise NotImplementedError


# -------------------------------------------------------------------------------------------------- H.264 and HEVC


def units_of(data: bytes, width: int) -> list[bytes]:
    """The NAL units of a packet, of long ones the first 1000 bytes.

    width: bytes of the size before each unit (mp4, mkv); 0: start codes separate the units (Annex B).
    """
    if width == 0:
        starts = [match.end() for match in re.finditer(b"\0\0\1", data)]
        bounds = itertools.pairwise([*starts, len(data) + 3])
        return [data[begin : min(end - 3, begin + 1000)] for begin, end in bounds]
    units, at = [], 0
    while at < len(data):
        begin = at + width
        end = begin + int.from_bytes(data[at:begin], "big")
        if end > len(data):
            raise Damage
        if end > begin:
            units.append(data[begin : min(end, begin + 1000)])
        at = end
    return units


def parameter_sets(data: bytes, at: int, count: int) -> tuple[list[bytes], int]:
    """`count` parameter sets of a global header from byte `at` on, each after its size in two bytes; and their end."""
    found = []
    for _ in range(count):
        size = int.from_bytes(data[at : at + 2], "big")
        found.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return found, at


def unescape(unit: bytes) -> bytes:
    """A NAL unit without the bytes that keep start codes out of its content (emulation_prevention_three_byte)."""
    return unit.replace(b"\0\0\3", b"\0\0")


class H264(HeaderReader):
    """Counts pictures. A reference picture that is missing shows in frame_num, which must grow by one."""

    def __init__(self, extradata: bytes) -> None:
        super().__init__(extradata)
        self.width, self.expected = 0, None
        units = units_of(extradata, 0)
        if extradata[:1] == b"\1":  # avcC, the global header of mp4 and mkv
            self.width = (extradata[4] & 3) + 1
            units, _ = parameter_sets(extradata, 6, extradata[5] & 31)
        for unit in units:
            if unit and unit[0] & 31 == 7:
                self.announce(unit)

    def announce(self, unit: bytes) -> None:
        """A sequence parameter set. A second, different one may change the frame size: Doubt."""
        unit = unit.rstrip(b"\0")
        if self.fixed.value is None:
            self.counter_bits, self.gaps, self.may_be_fields = _sequence(Bits(unescape(unit[1:])))
        self.fixed.check(unit)

    def read(self, data: bytes) -> Unit:
        pictures = []
        for unit in units_of(data, self.width):
            kind = unit[0] & 31
            if unit[0] & 128:  # forbidden_zero_bit
                raise Damage
            if 2 <= kind <= 4:  # data partitions
                raise Doubt
            if kind == 7:
                self.announce(unit)
            elif kind in (1, 5):
                if unit[1] & 128:  # first_mb_in_slice is 0: a new picture
                    pictures.append(unit)
                elif not pictures:
                    raise Damage
        if not pictures:
            raise Damage
        if len(pictures) > 1 or self.fixed.value is None:
            raise Doubt
        self.check_slice(pictures[0])
        return Unit(1, pictures[0][0] & 31 == 5)

    def check_slice(self, unit: bytes) -> None:
        """Reads the slice header of a picture and compares its frame_num with the pictures before it."""
        is_idr, is_reference = unit[0] & 31 == 5, unit[0] & 96 != 0
        bits = Bits(unescape(unit[1:40]))
        bits.unsigned()  # first_mb_in_slice
        if bits.unsigned() > 9 or bits.unsigned() > 255:  # slice_type; pic_parameter_set_id
            raise Damage
        number = bits.read(self.counter_bits)
        if self.may_be_fields and bits.read(1):  # field_pic_flag: two packets make a frame
            raise Doubt
        expected = 0 if is_idr else self.expected
        if expected is None:  # no key frame so far
            return
        if is_reference:
            self.expected = (number + 1) % (1 << self.counter_bits)
        if number != expected and not self.gaps:  # a reference is missing, and the decoder may then drop frames
            raise Damage


def _sequence(bits: Bits) -> tuple[int, bool, bool]:
    """A sequence parameter set of H.264: bits of frame_num, whether it may jump, whether there may be fields."""
    profile = bits.read(8)
    bits.read(16)  # constraint flags, level_idc
    bits.unsigned()  # seq_parameter_set_id
    if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
        chroma = bits.unsigned()
        if chroma == 3 and bits.read(1):
            raise Doubt  # three colour planes, each coded as a picture
        bits.unsigned()  # bit_depth_luma_minus8
        bits.unsigned()  # bit_depth_chroma_minus8
        bits.read(1)  # qpprime_y_zero_transform_bypass_flag
        if bits.read(1):
            for number in range(12 if chroma == 3 else 8):
                if bits.read(1):
                    _skip_scaling_list(bits, 16 if number < 6 else 64)
    counter_bits = bits.unsigned() + 4
    order = bits.unsigned()  # pic_order_cnt_type
    if order == 0:
        bits.unsigned()  # log2_max_pic_order_cnt_lsb_minus4
    elif order == 1:
        bits.read(1)  # delta_pic_order_always_zero_flag
        bits.signed()  # offset_for_non_ref_pic
        bits.signed()  # offset_for_top_to_bottom_field
        for _ in range(bits.unsigned()):
            bits.signed()  # offset_for_ref_frame
    bits.unsigned()  # max_num_ref_frames
    gaps = bits.read(1) == 1  # gaps_in_frame_num_value_allowed_flag
    bits.unsigned()  # pic_width_in_mbs_minus1
    bits.unsigned()  # pic_height_in_map_units_minus1
    return counter_bits, gaps, bits.read(1) == 0  # frame_mbs_only_flag


def _skip_scaling_list(bits: Bits, count: int) -> None:
    """A quantisation matrix of `count` numbers; a difference that leads to 0 ends it early."""
    last = 8
    for _ in range(count):
        following = (last + bits.signed()) % 256
        if following == 0:
            return
        last = following


class HEVC(HeaderReader):
    """Counts pictures; those that refer to what a cut has removed (RASL, types 8 and 9) are not shown."""

    def __init__(self, extradata: bytes) -> None:
        super().__init__(extradata)
        if extradata[:1] != b"\1":  # hvcC, the global header of mp4 and mkv
            raise Doubt
        self.width, self.first, self.cut = (extradata[21] & 3) + 1, True, False
        at = 23
        for _ in range(extradata[22]):
            kind, count = extradata[at] & 63, int.from_bytes(extradata[at + 1 : at + 3], "big")
            units, at = parameter_sets(extradata, at + 3, count)
            if kind == 33:  # SPS
                for unit in units:
                    self.fixed.check(unit.rstrip(b"\0"))

    def read(self, data: bytes) -> Unit:
        pictures = []
        for unit in units_of(data, self.width):
            kind, layer = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3
            if unit[0] & 128:  # forbidden_zero_bit
                raise Damage
            if layer:  # depth, or a second view: not decoded
                continue
            if kind == 33:
                self.fixed.check(unit.rstrip(b"\0"))
            elif kind < 32:
                if unit[2] & 128:  # first_slice_segment_in_pic_flag: a new picture
                    pictures.append(kind)
                elif not pictures:
                    raise Damage
        if not pictures:
            raise Damage
        if len(pictures) > 1:
            raise Doubt
        kind = pictures[0]
        is_start = 16 <= kind <= 21  # BLA, IDR, CRA
        if is_start:
            self.cut = kind <= 18 or (kind == 21 and self.first)
        self.first = False
        hidden = self.cut and kind in (8, 9)
        return Unit(0 if hidden else 1, is_start)


# ------------------------------------------------------------------------------------------------------------ MPEG-4


def vop_kinds(data: bytes) -> str:
    """The MPEG-4 pictures (VOP) in a packet, such as "P" or "PB" (packed); "" for a placeholder."""
    kinds, at = "", data.find(b"\0\0\1\xb6")
    while -1 < at < len(data) - 4:
        kinds += "IPBS"[data[at + 4] >> 6]
        at = data.find(b"\0\0\1\xb6", at + 4)
    return kinds


class MPEG4(HeaderReader):
    """Counts pictures. Where B-frames are packed, one packet has two pictures and the next is a placeholder."""

    def __init__(self, extradata: bytes) -> None:
        super().__init__(extradata)
        self.packed = False
        self.announce(extradata)

    def announce(self, data: bytes) -> None:
        """The size from a video object layer, which comes before the first picture."""
        found = re.search(rb"\x00\x00\x01[\x20-\x2f]", data[: data.find(b"\0\0\1\xb6")])
        if not found:
            return
        bits = Bits(data[found.end() : found.end() + 40])
        bits.read(9)  # random_accessible_vol, video_object_type_indication
        if bits.read(1):
            bits.read(7)  # verid, priority
        if bits.read(4) == 15:  # aspect_ratio_info: the shape of a pixel follows
            bits.read(16)
        if bits.read(1):  # vol_control_parameters
            bits.read(3)
            if bits.read(1):
                bits.read(79)  # vbv_parameters
        if bits.read(2):  # video_object_layer_shape: not a rectangle
            raise Doubt
        bits.read(1)  # marker
        resolution = bits.read(16)  # vop_time_increment_resolution
        bits.read(1)  # marker
        if bits.read(1):
            bits.read(max((resolution - 1).bit_length(), 1))  # fixed_vop_time_increment
        self.fixed.check((bits.read(14), bits.read(14)))  # a marker and 13 bits each: width, height

    def read(self, data: bytes) -> Unit:
        kinds = vop_kinds(data)
        if self.packed:  # the second picture of the packet before is shown in place of this one
            self.packed = False
            if len(data) > 19:
                raise Doubt
            return Unit(1, False)
        if not kinds:
            if len(data) > 1:
                raise Damage
        elif len(kinds) > 2 or len(data) < 16:
            raise Doubt  # the decoder shows nothing for a picture marked as not coded, which is short
        self.announce(data)
        self.packed = len(kinds) == 2
        return Unit(1 if kinds else 0, kinds == "I")


# ------------------------------------------------------------------------------------------------- VP8, VP9, AV1, JPEG


class VP8(HeaderReader):
    """One frame per packet, hidden if show_frame is 0."""

    def read(self, data: bytes) -> Unit:
        is_key = data[0] & 1 == 0
        if is_key:
            if data[3:6] != b"\x9d\1\x2a" or len(data) < 10:  # start code
                raise Damage
            self.fixed.check(data[6:10])  # width and height
        return Unit(data[0] >> 4 & 1, is_key)  # show_frame


class VP9(HeaderReader):
    """One frame per packet, or a superframe: hidden frames and a shown one."""

    def read(self, data: bytes) -> Unit:
        headers = [self.header(Bits(frame[:32])) for frame in self.frames_of(data) if frame]
        shown = len([header for header in headers if header.frames])
        if shown > 1:
            raise Doubt
        return Unit(shown, headers[0] == Unit(1, True))

    @staticmethod
    def frames_of(data: bytes) -> list[bytes]:
        """The frames of a packet: itself, or those of a superframe, which has their sizes at its end."""
        last = data[-1]
        width, count = (last >> 3 & 3) + 1, (last & 7) + 1
        index = data[-2 - width * count :]
        if last >> 5 != 6 or index[0] != last:
            return [data]
        frames, at = [], 0
        for number in range(count):
            size = int.from_bytes(index[1 + number * width : 1 + (number + 1) * width], "little")
            frames.append(data[at : at + size])
            at += size
        if at + len(index) > len(data):
            raise Doubt
        return frames

    def header(self, bits: Bits) -> Unit:
        """An uncompressed_header: whether the frame is shown, whether it is a key frame."""
        if bits.read(2) != 2:  # frame_marker
            raise Damage
        profile = bits.read(1) + 2 * bits.read(1)
        if profile == 3:
            bits.read(1)
        if bits.read(1):  # show_existing_frame
            return Unit(1, False)
        is_key, show, resilient = bits.read(1) == 0, bits.read(1), bits.read(1)
        if is_key:
            self.sync(bits)
            self.colours(bits, profile)
            self.size(bits)
            return Unit(show, True)
        intra_only = 0 if show else bits.read(1)
        if not resilient:
            bits.read(2)  # reset_frame_context
        if intra_only:
            self.sync(bits)
            if profile > 0:
                self.colours(bits, profile)
            bits.read(8)  # refresh_frame_flags
            self.size(bits)
        else:
            bits.read(8 + 3 * 4)  # refresh_frame_flags; three references
            if not any(bits.read(1) for _ in range(3)):  # found_ref: as large as that reference
                self.size(bits)
        return Unit(show, False)

    def size(self, bits: Bits) -> None:
        self.fixed.check((bits.read(16), bits.read(16)))  # width and height, minus 1

    @staticmethod
    def sync(bits: Bits) -> None:
        if bits.read(24) != 0x498342:
            raise Damage

    @staticmethod
    def colours(bits: Bits, profile: int) -> None:
        """Skips color_config."""
        if profile >= 2:
            bits.read(1)  # ten_or_twelve_bit
        if bits.read(3) != 7:  # color_space, not RGB
            bits.read(1)  # color_range
            if profile in (1, 3):
                bits.read(3)  # subsampling
        elif profile in (1, 3):
            bits.read(1)


class AV1(HeaderReader):
    """One temporal unit per packet, which shows one frame."""

    @staticmethod
    def units(data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yields (kind, content) of the open bitstream units (OBU)."""
        at = 0
        while at < len(data):
            head = data[at]
            at += 1
            if head & 0b10000101:  # forbidden and reserved bits; layers
                raise Doubt
            size = len(data) - at
            if head & 2:  # obu_has_size_field: 7 bits per byte, the lowest first
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

    def read(self, data: bytes) -> Unit:
        shown, start = 0, False
        for kind, content in self.units(data):
            if kind == 1:  # sequence header
                if content[0] & 0b1000:  # reduced_still_picture_header
                    raise Doubt
                self.fixed.check(content)
            elif kind in (3, 6):  # frame header; frame
                existing, frame_type, show = content[0] >> 7, content[0] >> 5 & 3, content[0] >> 4 & 1
                if existing:
                    shown += 1
                elif show:
                    if shown == 0 and frame_type == 0:
                        start = True
                    shown += 1
            elif kind not in (2, 4, 5, 7, 15):
                raise Doubt
        if shown != 1 or self.fixed.value is None:
            raise Doubt
        return Unit(1, start)


class JPEG(HeaderReader):
    """One picture per packet."""

    def read(self, data: bytes) -> Unit:
        if data[:3] != b"\xff\xd8\xff" or not data.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise Damage
        if data.find(b"\xff\xd8\xff", 2) > 0:
            raise Doubt  # two fields
        at = 2
        while data[at] == 255:
            if 0xC0 <= data[at + 1] <= 0xC2:  # start of frame
                self.fixed.check(data[at + 5 : at + 9])  # height and width
                return Unit(1, True)
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        raise Doubt


READERS = {"h264": H264, "hevc": HEVC, "mpeg4": MPEG4, "vp8": VP8, "vp9": VP9, "av1": AV1, "mjpeg": JPEG}
