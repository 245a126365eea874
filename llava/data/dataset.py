"""Records into samples. T = tokens of the sample, P = patches, N = images, A = tokens of its answers' bare text."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.data.bad_samples import BadSample, BadSampleError
from llava.data.encoding import ConversationEncoder
from llava.data.mixture import Records
from llava.data.records import (
    build_conversation,
    check_paths,
    facts_of,
    repeat_placeholders,
    videos_of,
)
from llava.data.video import FrameRule, check_decoder
from llava.data.visuals import image_sizes, load_visuals
from llava.mm_utils import for_sample

TYPICAL_PHOTO = (640, 480)  # width, height, where no image's can be known
MEASURED_RECORDS = 256  # whose text is tokenised before the first step
MEASURED_IMAGES = 64  # records of each source whose images' sizes are looked at


class LLaVADataset(Dataset):
    """One sample per record, or a `BadSample` where a record cannot be made into one.

    Args:
        records: What `llava.data.mixture.load_records` gives.
        image_processor: Gives `pixel_values` (P, patch_dim) and `image_grid_thw` (N, 3) for a list of images (an empty
            one too), and by `num_visual_tokens(width, height)` how many tokens the LLM sees. One that has
            `num_video_tokens(frames, width, height)` also takes a list of frames in the place of an image.
        conversation: The chat template, one of `llava.conversation.conv_templates`.
        image_folder: Where images lie whose source names no folder of its own.
        video_folder: Likewise of videos; None is `image_folder`.
        label_mask: "answers" or "llava", see `llava.data.encoding`.
        model_max_length: Longest sample in tokens; a longer one is cut at the border of a turn.
        video_frames, video_fps, force_sample: Which frames stand for a video, see `llava.data.video.FrameRule`; each is
            an image to a native tower.
        align_text: Whether samples bring the answers' bare text, `align_input_ids`.

    Raises:
        FileNotFoundError: An image folder is missing.
        ValueError: An image path leads out of its folder.
    """

    def __init__(
        self,
        records: Sequence[dict],
        *,
        tokenizer,
        image_processor,
        conversation: Conversation,
        image_folder: str | None = None,
        video_folder: str | None = None,
        label_mask: str = "answers",
        model_max_length: int,
        video_frames: int = 8,
        video_fps: float | None = None,
        force_sample: bool = False,
        align_text: bool = False,
    ) -> None:
        self.records = records
        self.image_processor = image_processor
        self.conversation = conversation
        self.image_folder = image_folder
        self.video_folder = video_folder or image_folder
        self.frame_rule = FrameRule(video_frames, video_fps, force_sample)
        self.align_text = align_text
        self.encoder = ConversationEncoder(tokenizer, conversation, label_mask=label_mask, max_length=model_max_length)
        folder = image_folder or video_folder
        check_paths(records.to_check(folder) if isinstance(records, Records) else records, folder)
        if video_folder is not None and not os.path.isdir(video_folder):
            raise FileNotFoundError(f"--video_folder {video_folder}: no such folder.")
        if self._facts()["videos"].any():
            check_decoder()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict | BadSample:
        """`id`, `input_ids` (T,), `labels` (T,), `pixel_values` (P, patch_dim), `image_grid_thw` (N, 3) and, if asked
        for, `align_input_ids` (A,)."""
        record = self.records[index]
        try:
            return self._encode(record)
        except BadSampleError as error:
            return BadSample(record["id"], str(error), error.kind)

    def _encode(self, record: dict) -> dict:
        conversation = build_conversation(record, self.conversation)
        visuals = load_visuals(record, self.image_folder, self.video_folder, self.frame_rule)
        processor = for_sample(self.image_processor, len(visuals))
        if videos_of(record) and hasattr(processor, "num_video_tokens"):  # to it a video is one thing, as an image is
            images = visuals
            tokens_per_image = [processor.num_video_tokens(len(frames), *frames[0].size) for frames in visuals]
        else:
            repeat_placeholders(conversation, [len(pictures) for pictures in visuals])
            images = [picture for pictures in visuals for picture in pictures]
            tokens_per_image = self._tokens_of(images, processor)
        encoded = self.encoder(conversation, tokens_per_image)
        sample = {
            "id": record["id"],
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            **self._process_images(processor, images[: encoded.num_images]),
        }
        if self.align_text:
            sample["align_input_ids"] = self.encoder.encode_text(" ".join(encoded.answers))
        return sample

    @staticmethod
    def _tokens_of(images: list[Image.Image], processor) -> list[int]:
        try:
            return [processor.num_visual_tokens(*image.size) for image in images]
        except ValueError as error:
            raise BadSampleError(f"its images cannot be processed: {error}", kind="unusable image") from error

    @staticmethod
    def _process_images(processor, images: list) -> dict[str, torch.Tensor]:
        try:
            return processor(images)
        except ValueError as error:
            raise BadSampleError(f"its images cannot be processed: {error}", kind="unusable image") from error

    @property
    def modality_lengths(self) -> np.ndarray:
        """(records,) int64, LLaVA's name and sign: about how many tokens each sample has, negative for text-only ones.

        Opening every image would take minutes before the first step: one counts as its source's mean, which is exact at
        a fixed resolution. Text counts by its bytes, which holds for languages without spaces, too.
        """
        facts = self._facts()
        text_bytes = facts["text_bytes"].astype(np.int64)
        images, videos = facts["images"].astype(np.int64), facts["videos"].astype(np.int64)
        tokens = images * self._tokens_of_an_image() + videos * self._tokens_of_a_video()
        per_byte, of_template = self._tokens_of_text(text_bytes)
        tokens += np.rint(text_bytes * per_byte + of_template).astype(np.int64)
        tokens = tokens.clip(1, self.encoder.max_length)  # longer ones are cut
        return np.where(images + videos > 0, tokens, -tokens)

    def _tokens_of_a_video(self) -> int:
        if hasattr(self.image_processor, "num_video_tokens"):
            return self.image_processor.num_video_tokens(self.frame_rule.typical, *TYPICAL_PHOTO)
        return self.frame_rule.typical * self.image_processor.num_visual_tokens(*TYPICAL_PHOTO)

    def _tokens_of_an_image(self) -> np.ndarray:
        """(records,) how many visual tokens an image has that comes from where the record does, on average."""
        sizes = self.records.source_sizes() if isinstance(self.records, Records) else [len(self)]
        means = []
        for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            images = [
                image
                for number in _spread(size, MEASURED_IMAGES)
                for image in image_sizes(self.records[int(start) + number], self.image_folder)
            ]
            tokens = [self.image_processor.num_visual_tokens(*image) for image in images or [TYPICAL_PHOTO]]
            means.append(round(sum(tokens) / len(tokens)))
        return np.repeat(np.array(means, dtype=np.int64), sizes)

    def _tokens_of_text(self, text_bytes: np.ndarray) -> tuple[float, float]:
        """Tokens for each byte of text, and for any sample besides: fitted to some records from all over the data."""
        found = []
        for number in _spread(len(self), MEASURED_RECORDS):
            try:
                text = build_conversation(self.records[number], self.conversation).get_prompt()
            except BadSampleError:
                continue
            found.append((text_bytes[number], len(self.encoder.encode_text(text.replace(DEFAULT_IMAGE_TOKEN, "")))))
        num_bytes, num_tokens = np.array(found, dtype=float).reshape(-1, 2).T
        design = np.stack([num_bytes, np.ones_like(num_bytes)], axis=1)
        fit = np.linalg.lstsq(design, num_tokens)[0]
        return tuple(fit.round(4).tolist())  # beyond what processors differ in; the trainer compares what comes of it

    def _facts(self) -> np.ndarray:
        """`text_bytes`, `images` and `videos` of every record: noted in the cache, or counted now."""
        if isinstance(self.records, Records):
            return self.records.facts()
        names = ("text_bytes", "images", "videos")
        return np.array([facts_of(record)[:3] for record in self.records], [(name, np.int64) for name in names])


def _spread(size: int, count: int) -> list[int]:
    """At most `count` numbers below `size`, from all over it."""
    return np.unique(np.linspace(0, size - 1, count).round().astype(int)).tolist() if size else []
