"""Makes small video files of the kinds that cameras, broadcasts and broken downloads leave."""

import random

import av

from tests.helpers.clips import encode, moving

MATRICES = {  # a, b, c, d of x' = a x + c y, y' = b x + d y: where a player shows a pixel
    "as it is": (1, 0, 0, 1),
    "turned by 90": (0, 1, -1, 0),
    "turned by 180": (-1, 0, 0, -1),
    "turned by 270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}


def packets_of(path):
    """[(bytes, pts, dts, whether a key frame)] of the first video stream, in the order of the file."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in packets]


def rewrite(source, target, packets):
    """Writes packets (see packets_of) with the stream header of source."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for data, pts, dts, key in packets:
            packet = av.Packet(data)
            packet.pts, packet.dts, packet.is_keyframe = pts, dts, key
            packet.time_base, packet.stream = old.streams.video[0].time_base, stream
            new.mux(packet)


def with_packet(source, target, number, change):
    """A copy in which the bytes of one packet went through change(data); None leaves the packet out."""
    packets = packets_of(source)
    data = change(packets[number][0])
    packets[number : number + 1] = [] if data is None else [(data, *packets[number][1:])]
    rewrite(source, target, packets)


def noise(data, begin=0.0, end=1.0):
    """Random bytes in place of a part of a packet."""
    begin, end = int(begin * len(data)), int(end * len(data))
    return data[:begin] + random.Random(0).randbytes(end - begin) + data[end:]


def set_matrix(source, target, matrix):
    """A copy of an .mp4 with another display matrix in its track header (ISO 14496-12: 9 numbers of 4 bytes)."""
    data = bytearray(source.read_bytes())
    place, (a, b, c, d) = data.find(b"tkhd") + 44, matrix
    numbers = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    target.write_bytes(data)


def write_hidden(source, target):
    """VP8 with frames that are decoded and never shown, as alt-ref frames are: copies with the mark "show" removed."""
    packets = []
    for number, (data, pts, dts, key) in enumerate(packets_of(source)):
        if number % 10 == 5:
            packets.append((bytes([data[0] & ~16]) + data[1:], pts - 1, dts - 1, False))
        packets.append((data, pts, dts, key))
    rewrite(source, target, packets)


def write_two_sizes(target):
    """VP8 of which the second half is smaller."""
    packets = []
    for number, size in enumerate(((96, 128), (48, 64))):
        part = target.with_name(f"part{number}.webm")
        encode(part, moving(25, *size), "libvpx", dict(g=25))
        packets += [(data, pts + 1000 * number, dts + 1000 * number, key) for data, pts, dts, key in packets_of(part)]
    rewrite(target.with_name("part0.webm"), target, packets)


def write_cover(target, video=True):
    """A cover picture beside a video, or beside nothing but sound."""
    with av.open(str(target), "w") as container:
        if video:
            stream = container.add_stream("libx264", rate=25, options=dict(g="10"))
            stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        else:
            stream = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg", rate=25)
        cover.height, cover.width, cover.pix_fmt = 200, 200, "yuvj420p"  # larger than the video
        cover.disposition = av.stream.Disposition.attached_pic
        picture = moving(1, 200, 200)[0]
        container.mux(cover.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(cover.encode())
        if video:
            for image in moving(30, 96, 128):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        else:
            silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            silence.sample_rate = 8000
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            container.mux(stream.encode(silence))
        container.mux(stream.encode())


class Writer:
    """Bits of an H.264 unit."""

    def __init__(self, head):
        self.head, self.bits = head, ""

    def fixed(self, width, number):
        self.bits += f"{number:0{width}b}"

    def golomb(self, *numbers):
        for number in numbers:
            digits = f"{number + 1:b}"
            self.bits += "0" * (len(digits) - 1) + digits

    def unit(self):
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        return b"\0\0\0\1" + bytes([self.head]) + int(bits, 2).to_bytes(len(bits) // 8, "big")


def write_fields(target, frames=30):
    """H.264 of 16 x 32 pixels whose frames are coded as two fields, each a picture and a packet of its own, as cameras
    of broadcasters do and no free encoder. Uncompressed (I_PCM): field f of frame n is grey, 40 + 5 n + 2 f."""
    sequence = Writer(0x67)
    sequence.fixed(24, 77 << 16 | 30)  # main profile, level 3
    sequence.golomb(0, 0, 2, 1)  # set 0; 4 bits of counter; shown in the order of decoding; one reference frame
    sequence.fixed(1, 0)
    sequence.golomb(0, 0)  # 1 macroblock wide, 1 high in a field
    sequence.fixed(6, 0b001000)  # fields or frames; not mixed; direct_8x8; no cropping, no more
    pictures = Writer(0x68)
    pictures.golomb(0, 0)
    pictures.fixed(2, 0)
    pictures.golomb(0, 0, 0)
    pictures.fixed(3, 0)
    pictures.golomb(0, 0, 0)
    pictures.fixed(3, 0b100)  # the deblocking filter can be switched off
    stream = sequence.unit() + pictures.unit()
    for number in range(frames):
        for field in (0, 1):
            first = number == field == 0
            slices = Writer(0x65 if first else 0x61)
            slices.golomb(0, 7, 0)  # from macroblock 0; intra; picture set 0
            slices.fixed(4, number % 16)
            slices.fixed(2, 2 + field)  # a field; which
            if first:
                slices.golomb(0)
                slices.fixed(2, 0)
            else:
                slices.fixed(1, 0)
            slices.golomb(0, 1, 25)  # quantiser; no filter; I_PCM
            slices.bits += "0" * (-len(slices.bits) % 8)
            for value in [40 + 5 * number + 2 * field] * 256 + [128] * 128:
                slices.fixed(8, value)
            stream += slices.unit()
    target.write_bytes(stream)
