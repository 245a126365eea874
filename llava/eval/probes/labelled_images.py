"""Images with a class each: folders, or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava.eval.probes.augment import BICUBIC, central_box, classification_crop
from llava.eval.probes.frozen import prepare
from llava.eval.probes.stream import Key, generator_of
from llava.mm_utils import load_image
from llava.model.multimodal_encoder.base import ImageProcessor

HF = "hf:"
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Folder:
    """DIR/SPLIT/CLASS/IMAGE: classes in alphabetical order, as ImageNet's numbers go."""

    classes: list[str]
    files: list[tuple[str, int]]

    @classmethod
    def open(cls, root: Path, split: str) -> Folder:
        place = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
        if place is None:
            raise FileNotFoundError(
                f"--data {root} has no folder {' or '.join(SPLITS[split])}. Expected {root}/train/CLASS/IMAGE and "
                f"{root}/val/CLASS/IMAGE, or {HF}NAME for a Hugging Face data set."
            )
        classes = sorted(each.name for each in place.iterdir() if each.is_dir())
        files = [
            (str(file), number)
            for number, name in enumerate(classes)
            for file in sorted((place / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not files:
            raise ValueError(f"{place} holds no images in folders that are named after classes.")
        return cls(classes, files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return load_image(path), label


@dataclass(frozen=True)
class HuggingFace:
    """Columns `image` and `label` of a data set on the hub, or of one that `save_to_disk` wrote."""

    classes: list[str]
    rows: Any

    @classmethod
    def open(cls, name: str, split: str) -> HuggingFace:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"--data {HF}{name} needs the package datasets: pip install -e '.[eval]'.") from error
        is_saved = (Path(name) / "dataset_dict.json").is_file()
        whole = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
        found = next((each for each in SPLITS[split] if each in whole), None)
        if found is None or not {"image", "label"} <= set(whole[found].column_names):
            raise ValueError(
                f"--data {HF}{name} has the splits {sorted(whole)}; expected {' or '.join(SPLITS[split])} with the "
                "columns image and label."
            )
        rows = whole[found]
        names = getattr(rows.features["label"], "names", None)
        return cls(names or [str(number) for number in sorted(set(rows["label"]))], rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        return row["image"], row["label"]


def open_split(data: str, split: str) -> Folder | HuggingFace:
    """`--data`: a folder, or `hf:` and a data set's name or path."""
    return HuggingFace.open(data.removeprefix(HF), split) if data.startswith(HF) else Folder.open(Path(data), split)


@dataclass
class LabelledImages(Dataset):
    """Samples as the tower reads them, by key: augmented with an epoch, the central part without one."""

    source: Folder | HuggingFace
    processor: ImageProcessor
    size: int
    central_share: float
    seed: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, tuple[int, ...], int]:
        image, label = self.source[key[1]]
        image = image.convert("RGB")
        if key[0] is None:
            image = central_box(*image.size, self.central_share).cut(image, self.size, BICUBIC)
        else:
            image = classification_crop(image, self.size, generator_of(self.seed, key))
        return *prepare(self.processor, image), label


def collate(samples: Sequence[tuple[Tensor, tuple[int, ...], int]]) -> tuple[Tensor, list[tuple[int, ...]], Tensor]:
    """Patches end to end, grids as plain numbers, labels (B,)."""
    pixels, grids, labels = zip(*samples, strict=True)
    return torch.cat(pixels), list(grids), torch.tensor(labels)
