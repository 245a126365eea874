"""How large a stage's micro-batches are and how many steps it takes: asked of its data, where they are there."""

from __future__ import annotations

import math

from llava.data.dataset import TYPICAL_PHOTO
from llava.data.mixture import Records, load_records
from llava.model.multimodal_encoder.base import ImageProcessor
from llava.train.planning.live import MicroBatch
from llava.train.planning.model import Stage

TEXT_BYTES = 500  # of a sample, beside one image, where there are no data to be asked
BYTES_PER_TOKEN = 4  # of English; the run itself asks its tokenizer
LARGE_PHOTO = (4096, 4096)  # px; more than any bound on visual tokens lets through


def records_of(stage: Stage) -> Records | None:
    """The stage's data; None where they are not on this machine."""
    try:
        return load_records(stage.data.data_path, seed=stage.training.seed)
    except FileNotFoundError:
        return None


def num_steps(stage: Stage, records: Records | None) -> int | None:
    """Optimizer steps, as the Trainer counts them; None where that needs data that are not there, or packs, which are
    made of the data's lengths at the start."""
    training = stage.training
    if training.max_steps > 0:
        return training.max_steps
    if records is None or training.pack_to_max_length:
        return None
    batches = len(records) / (training.per_device_train_batch_size * stage.world_size)
    batches = math.floor(batches) if training.dataloader_drop_last else math.ceil(batches)
    return math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))


def typical_batch(stage: Stage, processor: ImageProcessor, records: Records | None) -> MicroBatch:
    """Samples of the data's mean text and number of images, each image a photograph of TYPICAL_PHOTO; or full packs."""
    text_bytes, images = TEXT_BYTES, 1.0
    if records is not None:
        facts = records.facts()
        text_bytes = float(facts["text_bytes"].mean())
        images = float(facts["images"].mean() + facts["videos"].mean() * stage.data.frame_rule().typical)
    text = math.ceil(text_bytes / BYTES_PER_TOKEN)
    samples = stage.training.per_device_train_batch_size
    if stage.training.pack_to_max_length:
        length = text + images * processor.num_visual_tokens(*TYPICAL_PHOTO)
        samples *= max(math.floor(stage.training.model_max_length / length), 1)
    return _batch(samples, processor, TYPICAL_PHOTO, text, images)


def largest_batch(stage: Stage, processor: ImageProcessor) -> MicroBatch:
    """Every sample has `--model_max_length` tokens, of images as many as fit, each of the most visual tokens."""
    visual = processor.num_visual_tokens(*LARGE_PHOTO)
    images = max((stage.training.model_max_length - 1) // visual, 1)  # a token has to be learnt
    text = max(stage.training.model_max_length - images * visual, 1)
    return _batch(stage.training.per_device_train_batch_size, processor, LARGE_PHOTO, text, images)


def _batch(samples: int, processor: ImageProcessor, photo: tuple[int, int], text: int, images: float) -> MicroBatch:
    count = max(round(samples * images), 1)
    tokens = processor.num_visual_tokens(*photo)
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)  # memory minds no proportions
    grid = [1, processor.merge_size * rows, processor.merge_size * (tokens // rows)]
    visual = [tokens * (count // samples + (number < count % samples)) for number in range(samples)]
    return MicroBatch(
        grids=[grid] * count,
        lengths=[text + here for here in visual],
        visual=sum(visual),
        supervised=text * samples,
    )
