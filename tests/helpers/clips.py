"""Small clips, real ones and their frames by a plain decode."""

import argparse

import av
import numpy as np
import pytest

from datasets import decoding

NO_DECORD = pytest.mark.skipif(not decoding._imports("decord"), reason="no decord")
BACK_ENDS = ["pyav", pytest.param("decord", marks=NO_DECORD)]


def open_av(path):
    """Some of HMDB51's files hold text that is not UTF-8; from PyAV 19 on it is ignored always."""
    return av.open(str(path), **({} if int(av.__version__.split(".")[0]) > 18 else dict(metadata_errors="ignore")))


def whole_video(path):
    """Every frame by a plain sequential decode, uint8 [n, H, W, 3]; the reference for both back ends."""
    with open_av(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def hide_frames(source, path, count):
    """A stream copy whose edit list leaves out the first frames: their packets stay, and are never shown."""
    with av.open(str(source)) as container, av.open(str(path), "w") as result:
        stream = container.streams.video[0]
        copy = result.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.size:
                packet.pts -= count * packet.duration
                packet.dts -= count * packet.duration
                packet.stream = copy
                result.mux(packet)


def loader_args(listing, **changes):
    args = dict(data_path=str(listing), num_frames=4, sampling_rate=2, input_size=24, crop="multiscale")
    args |= dict(train_interpolation="bicubic", color_jitter=0.0, num_sample=2, decoder="auto", batch_size=4)
    return argparse.Namespace(**args | dict(num_workers=0, pin_mem=False, seed=3, max_short_side=0) | changes)


def moving(frames, height, width, seed=0):
    """A texture that pans, a square that crosses it, a cut, and noise: every frame is unlike its neighbours."""
    rng = np.random.default_rng(seed)
    texture = np.kron(rng.integers(30, 220, (2 * height // 8, 2 * width // 8, 3)), np.ones((8, 8, 1)))
    clip = np.empty((frames, height, width, 3))
    for i in range(frames):
        y, x = i * height // frames, int((0.5 + 0.5 * np.sin(i / 9)) * (width - 1))
        clip[i] = np.roll(texture, 31 * (i // 37), 0)[y : y + height, x : x + width]
        clip[i, 20:36, (3 * i) % (width - 16) :][:, :16] = (i * 5) % 256
    return np.clip(clip + rng.normal(0, 3, clip.shape), 0, 255).astype(np.uint8)


def encode(path, clip, codec, options, pixels="yuv420p", rate=25):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pixels
        stream.codec_context.thread_count = 1
        for image in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
