"""A git repository with the places that hooks stand beside, and a trainer that can start, in our own words."""

import subprocess
from pathlib import Path

FILES = {
    "llava/model/multimodal_encoder/builder.py": """
import os


def build_vision_tower(vision_tower_cfg, **kwargs):
    raise ValueError("none known")
""",
    "llava/model/multimodal_projector/builder.py": '''
import re


def build_vision_projector(config, delay_load=False, **kwargs):
    """Documented."""
    raise ValueError("none known")
''',
    "llava/model/llava_arch.py": """
import torch


class LlavaMetaModel:
    def __init__(self, config):
        super().__init__(config)

    def initialize_vision_modules(self, model_args, fsdp=None):
        vision_tower = model_args.vision_tower
        self.config.use_mm_proj = True


class LlavaMetaForCausalLM:
    def encode_images(self, images):
        return images

    def prepare_inputs_labels_for_multimodal(self, input_ids, images):
        if images is None:
            return input_ids
        if type(images) is list or images.ndim == 5:
            images = torch.cat(images)
        return self.encode_images(images)
""",
    "llava/train/train.py": """
from dataclasses import dataclass

from llava.train.llava_trainer import LLaVATrainer


@dataclass
class ModelArguments:
    vision_tower: str = ""


class LazySupervisedDataset:
    def process_image(self, image_file, overwrite_image_aspect_ratio=None):
        return image_file

    def __getitem__(self, i):
        while True:
            return self._get_item(i)

    def _get_item(self, i):
        data_dict = {}
        return data_dict


class DataCollatorForSupervisedDataset:
    def __call__(self, instances):
        batch = {}
        return batch


def make_supervised_data_module(data_args):
    return {}


def train():
    model, model_args, data_args = None, None, None
    data_module = make_supervised_data_module(data_args)
    LLaVATrainer(model, **data_module)
""",
    "llava/train/llava_trainer.py": """
class LLaVATrainer:
    def __init__(self, model):
        self.model = model
""",
}


def git(folder: Path, *arguments: str) -> str:
    """What git prints there."""
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def make_checkout(folder: Path, **changes: str | None) -> Path:
    """The repository with one commit; `changes` are other files' contents, by their stem, or None for a missing one."""
    for path, content in FILES.items():
        file = folder / path
        content = changes.get(file.stem, content)
        if content is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode())
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "upstream")
    return folder
