"""Frames of a video, by PyAV or else decord: the extra `video`, imported where it is used."""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from PIL import Image

TYPICAL_SECONDS = 30  # of a video whose length is not known yet


def check_decoder() -> None:
    """Refuse a run with videos, before its first step, where nothing can decode them."""
    if not (find_spec("av") or find_spec("decord")):
        raise ValueError(
            "the data has videos, but neither PyAV nor decord is installed: pip install 'llava-comp[video]'"
        )


@dataclass(frozen=True)
class FrameRule:
    """Which frames stand for a video, LLaVA's arithmetic.

    Attributes:
        count: how many, evenly from the first to the last (all, if there are fewer); with `fps` the most; 0 = no limit.
        fps: take so many a second instead, as long as these are not more than `count`.
        force: always `count` of them, also more than there are, some then several times.
    """

    count: int = 8
    fps: float | None = None
    force: bool = False

    def __post_init__(self):
        if self.count < 0 or (self.fps is not None and self.fps <= 0):
            raise ValueError(
                f"--video_frames {self.count} --video_fps {self.fps}: expected at least 0 (no limit) frames, and a "
                "positive number of them a second."
            )

    @property
    def typical(self) -> int:
        """About how many frames a video gives, for estimates before any is read."""
        return self.count or round(TYPICAL_SECONDS * (self.fps or 1))

    def __call__(self, total: int, video_fps: float) -> list[int]:
        """The numbers of the frames, of a video of so many and of so many a second."""
        if self.force and self.count:
            return evenly_spaced(total, self.count)
        if self.fps is None and self.count:
            return evenly_spaced(total, min(self.count, total))
        step = max(1, round(video_fps / (self.fps or 1)))
        chosen = list(range(0, total, step))
        return evenly_spaced(total, self.count) if 0 < self.count < len(chosen) else chosen


def load_frames(path: str, rule: FrameRule) -> list[Image.Image]:
    """The frames that the rule says, in their order, upright, RGB.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as a video.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"video file not found: {path}")
    read = read_by_av if find_spec("av") else read_by_decord
    try:
        return read(path, rule)
    except Exception as error:  # FFmpeg's and decord's own exceptions share no base
        raise ValueError(f"cannot read video {path}: {error or type(error).__name__}") from error


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` of `total` frames, the first and the last among them; a single one is the first. Rounded down."""
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def read_by_av(path: str, choose: Callable[[int, float], list[int]]) -> list[Image.Image]:
    """The frames that `choose` picks by their numbers, given how many there are and how many a second."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        # Reading packets decodes nothing; it gives the exact number of frames, which headers often lack.
        packets = [
            (packet.pts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.pts is not None and not packet.is_discard
        ]
        if not packets:
            raise ValueError("it holds no frames with a time")
        times = sorted(time for time, _ in packets)
        keyframes = sorted(time for time, is_keyframe in packets if is_keyframe) or times[:1]
        per_second = float(stream.average_rate or stream.guessed_rate or 1)
        wanted = [times[number] for number in choose(len(times), per_second)]
    return [_upright(frame) for frame in _frames_at(path, wanted, keyframes)]


def _frames_at(path: str, wanted: list[int], keyframes: list[int]) -> Iterator:
    """The frames at the wanted times (ascending), each decoded on from where the one before left off or from the last
    keyframe before it, whichever is nearer."""
    frames, frame = _frames_from(path, None), None
    for time in wanted:
        keyframe = keyframes[max(bisect_right(keyframes, time) - 1, 0)]
        if keyframe > (keyframes[0] if frame is None else frame.pts):
            jumped = _frames_from(path, keyframe)
            landed = next(jumped, None)
            if landed is not None and landed.pts <= time:  # some formats land too far
                frames, frame = jumped, landed
        while frame is None or frame.pts < time:
            frame = next(frames, None)
            if frame is None:
                raise ValueError(f"its frame at time {time} cannot be decoded")
        yield frame


def _frames_from(path: str, keyframe: int | None) -> Iterator:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        if keyframe is not None:
            container.seek(keyframe, stream=stream)
        yield from container.decode(stream)


def _upright(frame) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def read_by_decord(path: str, choose: Callable[[int, float], list[int]]) -> list[Image.Image]:
    """As `read_by_av`, in the order of the file: where frames refer ahead, decord's seeks land beside the frame."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    wanted = choose(len(reader), reader.get_avg_fps())
    frames = (reader.next() for _ in range(wanted[-1] + 1))
    found = {number: Image.fromarray(frame.asnumpy()) for number, frame in enumerate(frames) if number in wanted}
    return [found[number] for number in wanted]
