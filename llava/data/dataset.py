"""Records into samples. T = tokens of the sample, P = patches, N = images, A = tokens of its answers' bare text."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.utils.data import Dataset

from llava.conversation import Conversation
from llava.data.bad_samples import BadSample, BadSampleError
from llava.data.encoding import ConversationEncoder
from llava.data.records import build_conversation, check_image_paths, image_names, image_paths
from llava.mm_utils import load_image

TYPICAL_PHOTO = (640, 480)  # width, height


class LLaVADataset(Dataset):
    """One sample per record, or a `BadSample` where a record cannot be made into one.

    Args:
        records: What `llava.data.mixture.load_records` gives.
        image_processor: Gives `pixel_values` (P, patch_dim) and `image_grid_thw` (N, 3) for a list of images (an empty
            one too), and by `num_visual_tokens(width, height)` how many tokens the LLM sees.
        conversation: The chat template, one of `llava.conversation.conv_templates`.
        image_folder: Where images lie whose source names no folder of its own.
        label_mask: "answers" or "llava", see `llava.data.encoding`.
        model_max_length: Longest sample in tokens; a longer one is cut at the border of a turn.
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
        label_mask: str = "answers",
        model_max_length: int,
        align_text: bool = False,
    ) -> None:
        self.records = records
        self.image_processor = image_processor
        self.conversation = conversation
        self.image_folder = image_folder
        self.align_text = align_text
        self.encoder = ConversationEncoder(tokenizer, conversation, label_mask=label_mask, max_length=model_max_length)
        check_image_paths(records, image_folder)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict | BadSample:
        """`id`, `input_ids` (T,), `labels` (T,), `pixel_values` (P, patch_dim), `image_grid_thw` (N, 3) and, if asked
        for, `align_input_ids` (A,)."""
        record = self.records[index]
        try:
            return self._encode(record)
        except BadSampleError as error:
            return BadSample(record["id"], str(error))

    def _encode(self, record: dict) -> dict:
        conversation = build_conversation(record, self.conversation)
        images = self._load_images(record)
        tokens_per_image = [self.image_processor.num_visual_tokens(*image.size) for image in images]
        encoded = self.encoder(conversation, tokens_per_image)
        sample = {
            "id": record["id"],
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            **self._process_images(images[: encoded.num_images]),
        }
        if self.align_text:
            sample["align_input_ids"] = self.encoder.encode_text(" ".join(encoded.answers))
        return sample

    def _load_images(self, record: dict) -> list[Image.Image]:
        try:
            return [load_image(path) for path in image_paths(record, self.image_folder)]
        except (OSError, ValueError) as error:
            raise BadSampleError(str(error)) from error

    def _process_images(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        try:
            return self.image_processor(images)
        except ValueError as error:
            raise BadSampleError(f"its images cannot be processed: {error}") from error

    @property
    def modality_lengths(self) -> list[int]:
        """LLaVA's rough length per record, in words, negative for text-only ones, for `--group_by_modality_length`.

        An image counts as a 640×480 photograph's visual tokens (exact at a fixed resolution): reading the size of every
        file would take minutes before the first step.
        """
        tokens_per_image = self.image_processor.num_visual_tokens(*TYPICAL_PHOTO)
        return [_modality_length(record, tokens_per_image) for record in self.records]


def _modality_length(record: dict, tokens_per_image: int) -> int:
    texts = (turn.get("value", turn.get("content", "")) for turn in record["conversations"] if isinstance(turn, dict))
    num_words = sum(len(str(text).split()) for text in texts)
    num_images = len(image_names(record))
    return num_words + num_images * tokens_per_image if num_images else -max(num_words, 1)
