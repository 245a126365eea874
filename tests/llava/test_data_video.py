"""Frames of a video, written here with PyAV: which ones, upright, one grid each, one `<image>` for all."""

import json

import numpy as np
import pytest
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data import video
from llava.data.bad_samples import BadSample
from llava.data.mixture import load_records
from llava.data.video import FrameRule, evenly_spaced, load_frames
from llava.train.arguments import parse_arguments
from tests.llava.data_parts import draw, make_dataset, make_record, supervised_text


def write_video(path, count: int, *, size=(32, 16), gop: int = 12) -> None:
    """`count` frames of growing brightness, a keyframe every `gop`, with frames that refer ahead."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(path), "w") as container:
        options = {"sc_threshold": "1000000000"}  # no keyframes of its own choice
        stream = container.add_stream("mpeg4", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = 2
        stream.codec_context.bit_rate = 10**7
        for number in range(count):
            image = np.full((size[1], size[0], 3), brightness(number, count), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def brightness(number: int, count: int) -> int:
    return round(20 + 200 * number / max(count - 1, 1))


def assert_frames(images, numbers, count) -> None:
    found = [float(np.asarray(image).mean()) for image in images]
    expected = [brightness(number, count) for number in numbers]
    assert len(found) == len(expected)
    # Neighbours of 50 frames are 4 apart.
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 2, (found, expected)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(10, 4, [0, 3, 6, 9]), (3, 8, [0, 1, 2]), (5, 1, [0]), (1, 4, [0]), (100, 2, [0, 99]), (8, 4, [0, 2, 4, 7])],
)
def test_frames_are_evenly_spaced_from_the_first_to_the_last(total, count, expected):
    """Rounded down: of 8 frames 0, 2.33, 4.67 and 7."""
    assert FrameRule(count)(total, 25.0) == expected


def llavas_frames(total, per_second, fps, upbound, force):
    """LLaVA-NeXT's choice in exact whole numbers."""
    step = round(per_second / fps)
    chosen = [number for number in range(total) if number % step == 0]
    if upbound and (force or len(chosen) > upbound):
        return [(total - 1) * place // max(upbound - 1, 1) for place in range(upbound)]
    return chosen


@pytest.mark.parametrize("per_second", [25.0, 23.976, 30.0])
@pytest.mark.parametrize("fps", [1, 2])
@pytest.mark.parametrize(("upbound", "force"), [(0, False), (0, True), (9, False), (9, True), (32, True), (1, False)])
def test_frames_a_second_are_llavas(per_second, fps, upbound, force):
    rule = FrameRule(upbound, fps, force)
    for total in (1, 7, 31, 250, 999):
        assert rule(total, per_second) == llavas_frames(total, per_second, fps, upbound, force)


def test_flags_choose_the_frames():
    """LLaVA's name for the limit, and its value for none: one frame a second."""
    needed = ["--model_name_or_path", "a", "--data_path", "b", "--output_dir", "c", "--use_cpu"]
    rule = lambda *flags: parse_arguments([*needed, *flags])[1].frame_rule()  # noqa: E731
    assert rule()(250, 25.0) == evenly_spaced(250, 8)
    assert rule("--frames_upbound", "0")(60, 25.0) == [0, 25, 50]
    assert rule("--frames_upbound", "2", "--video_fps", "1")(60, 25.0) == [0, 59]
    assert rule("--video_fps", "1", "--force_sample", "True")(60, 25.0) == evenly_spaced(60, 8)
    assert rule("--frames_upbound", "0").typical == 30
    with pytest.raises(ValueError, match="--video_frames -1 --video_fps None: expected at least 0"):
        rule("--video_frames", "-1")


def test_a_file_gives_its_frames_a_second_and_repeats_what_is_forced(tmp_path):
    write_video(tmp_path / "a.mp4", 50)
    assert_frames(load_frames(str(tmp_path / "a.mp4"), FrameRule(0, 5)), range(0, 50, 5), 50)
    write_video(tmp_path / "b.mp4", 3)
    assert_frames(load_frames(str(tmp_path / "b.mp4"), FrameRule(5, force=True)), [0, 0, 1, 1, 2], 3)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize(("gop", "count"), [(12, 5), (12, 50), (50, 3), (1, 7), (12, 1)])
def test_the_frames_asked_for_are_the_frames_got(tmp_path, name, gop, count):
    """Near ones decoded on from one another, far ones from the keyframe before them."""
    write_video(tmp_path / name, 50, gop=gop)
    images = load_frames(str(tmp_path / name), FrameRule(count))
    assert {image.size for image in images} == {(32, 16)}
    assert_frames(images, evenly_spaced(50, count), 50)


def test_decord_gives_the_same_frames(tmp_path):
    pytest.importorskip("decord", reason="decord is not installed")
    write_video(tmp_path / "a.mp4", 50)
    assert_frames(video.read_by_decord(str(tmp_path / "a.mp4"), FrameRule(7)), evenly_spaced(50, 7), 50)


def test_a_video_on_its_side_is_turned_upright(tmp_path):
    """A phone's: the picture is stored lying, and the file says by how much to turn it."""
    write_video(tmp_path / "a.mp4", 3)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    one, minus_one, zero, last = (number.to_bytes(4, "big", signed=True) for number in (1 << 16, -1 << 16, 0, 1 << 30))
    upright = one + zero * 3 + one + zero * 3 + last
    at = data.index(upright, data.index(b"tkhd"))
    data[at : at + 36] = zero + one + zero + minus_one + zero * 4 + last  # a quarter turn, clockwise
    (tmp_path / "b.mp4").write_bytes(data)
    assert load_frames(str(tmp_path / "b.mp4"), FrameRule(1))[0].size == (16, 32)


def test_a_video_is_an_image_per_frame_where_its_one_image_mark_stands(tmp_path):
    write_video(tmp_path / "a.mp4", 20)
    record = make_record("What happens? <image>", "It brightens.", "And then?", "It ends.") | {"video": "a.mp4"}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    dataset = make_dataset(load_records(tmp_path / "a.json"), tmp_path, video_frames=5, align_text=True)
    sample = dataset[0]
    assert sample["image_grid_thw"].tolist() == [[1, 4, 8]] * 5
    assert sample["pixel_values"].shape == (5 * 32, 48)
    marks = (sample["input_ids"] == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    assert marks == list(range(marks[0], marks[0] + 5 * 8))  # side by side
    assert supervised_text(sample) == "It brightens.<|im_end|>It ends.<|im_end|>"
    text = len(sample["input_ids"]) - 5 * 8
    expected = text + 5 * dataset.image_processor.num_visual_tokens(640, 480)
    assert dataset.modality_lengths.tolist() == pytest.approx([expected], abs=2)


def test_a_video_is_cut_with_its_turn_never_inside(tmp_path):
    write_video(tmp_path / "a.mp4", 20)
    record = make_record("Hi", "Hello.", "<image>\nWhat happens?", "It brightens.") | {"video": "a.mp4"}
    alone = make_dataset([make_record("Hi", "Hello.")])[0]
    cut = make_dataset([record], tmp_path, video_frames=5, model_max_length=len(alone["input_ids"]) + 20)[0]
    assert cut["input_ids"].tolist() == alone["input_ids"].tolist()
    assert len(cut["image_grid_thw"]) == 0


def test_videos_that_cannot_be_used_are_bad_samples(tmp_path):
    write_video(tmp_path / "a.mp4", 20)
    draw(tmp_path, "a.png")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    records = [
        make_record("<image>", "A.", id=name) | {"video": name} for name in ("gone.mp4", "cut.mp4", "text.mp4", "a.mp4")
    ]
    records.append(make_record("<image><image>", "A.", image="a.png", id="both") | {"video": "a.mp4"})
    records.append(make_record("<image><image>", "A.", id="marks") | {"video": "a.mp4"})
    found = list(make_dataset(records, tmp_path, video_frames=2))
    reasons = {sample.id: sample.reason for sample in found if isinstance(sample, BadSample)}
    assert reasons.keys() == {"gone.mp4", "cut.mp4", "text.mp4", "both", "marks"}
    assert "video file not found" in reasons["gone.mp4"]
    assert "cannot read video" in reasons["cut.mp4"]
    assert "cannot read video" in reasons["text.mp4"]
    assert "images and videos" in reasons["both"]


def test_videos_without_a_decoder_stop_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"the data has videos.*pip install 'llava-comp\[video\]'"):
        make_dataset([make_record("<image>", "A.") | {"video": "a.mp4"}], tmp_path)
    make_dataset([make_record("<image>", "A.", image="a.png")], tmp_path)


def test_videos_have_a_folder_of_their_own(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos/a.mp4", 5)
    record = make_record("<image>\nWhat happens?", "It brightens.") | {"video": "a.mp4"}
    for image_folder in (None, tmp_path):
        dataset = make_dataset([record], image_folder, video_folder=str(tmp_path / "videos"), video_frames=2)
        assert len(dataset[0]["image_grid_thw"]) == 2
    assert "video file not found" in make_dataset([record], tmp_path)[0].reason
    with pytest.raises(FileNotFoundError, match="--video_folder nowhere: no such folder"):
        make_dataset([record], tmp_path, video_folder="nowhere")
