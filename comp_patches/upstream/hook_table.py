"""Every line that `apply` adds to upstream's files, and where. Nothing of theirs is changed or removed.

A line ends in MARKER, so that taking the hooks out is removing the lines that do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from comp_patches.upstream.anchors import (
    Anchor,
    NoSuchPlaceError,
    after_definition,
    after_imports,
    before_assignment,
    before_condition,
    before_return,
    either,
    holds,
    parse,
    start_of,
)

MARKER = "  # comp_patches hook"
IMPORT = "from llava.comp_patches.upstream import hooks as comp_hooks"


@dataclass(frozen=True)
class Hook:
    """One line at one place.

    Attributes:
        anchor: the place.
        line: without indentation and marker.
        only_if: a function or class without which the checkout needs no such hook.
    """

    anchor: Anchor
    line: str
    only_if: str = ""


def with_hooks(source: str, hooks: tuple[Hook, ...]) -> str:
    """The source with its hooks, line ends as they are.

    Raises:
        NoSuchPlaceError: a hook's place is not there.
    """
    tree, lines = parse(source), _lines(source)
    line_end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    added: dict[int, list[str]] = {}
    for hook in hooks:
        if not hook.only_if or holds(tree, hook.only_if):
            place = hook.anchor(tree)
            if place.before > len(lines) and not source.endswith("\n"):
                raise NoSuchPlaceError("a line's end at the end of the file")
            added.setdefault(place.before, []).append(" " * place.indent + hook.line + MARKER + line_end)
    return "".join(
        line for number in range(1, len(lines) + 2) for line in (*added.get(number, ()), *lines[number - 1 : number])
    )


def without_hooks(source: str) -> str:
    """The source as it was before."""
    return "".join(line for line in _lines(source) if not line.rstrip().endswith(MARKER.strip()))


def _lines(source: str) -> list[str]:
    """With their ends, as the syntax tree counts them: str.splitlines knows more ends than Python."""
    return re.findall(r"[^\n]*\n|[^\n]+", source)


BUILDER = "llava/model/multimodal_encoder/builder.py"
PROJECTOR = "llava/model/multimodal_projector/builder.py"
ARCH = "llava/model/llava_arch.py"
TRAIN = "llava/train/train.py"
TRAINER = "llava/train/llava_trainer.py"  # no hook; `check` looks whether it can start

HOOKS: Mapping[str, tuple[Hook, ...]] = {
    BUILDER: (
        Hook(after_imports, IMPORT),
        Hook(
            start_of("build_vision_tower"),
            "if comp_hooks.names_comp_tower(vision_tower_cfg): return comp_hooks.build_tower(vision_tower_cfg)",
        ),
    ),
    PROJECTOR: (
        Hook(after_imports, IMPORT),
        Hook(
            start_of("build_vision_projector"),
            "if comp_hooks.merges_patches(config): return comp_hooks.build_projector(config)",
        ),
    ),
    ARCH: (
        Hook(after_imports, IMPORT),
        Hook(start_of("LlavaMetaModel.__init__"), "comp_hooks.fit_config(config)"),
        Hook(
            before_assignment("LlavaMetaModel.initialize_vision_modules", "use_mm_proj"),
            "comp_hooks.describe_tower(self.config, vision_tower, model_args)",
        ),
        Hook(
            start_of("LlavaMetaForCausalLM.encode_images"),
            "if comp_hooks.has_comp_tower(self): return comp_hooks.encode_images(self, images)",
        ),
        Hook(
            before_condition("LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal", "ndim"),
            "images = comp_hooks.native_images(self, images)",
        ),
    ),
    TRAIN: (
        Hook(after_imports, IMPORT),
        Hook(after_imports, "LLaVATrainer = comp_hooks.with_named_losses(LLaVATrainer)"),
        Hook(after_definition("ModelArguments"), "ModelArguments = comp_hooks.with_flags(ModelArguments)"),
        Hook(
            start_of("LazySupervisedDataset.process_image"),
            "overwrite_image_aspect_ratio = comp_hooks.aspect_ratio(self.data_args, overwrite_image_aspect_ratio)",
            only_if="LazySupervisedDataset.process_image",
        ),
        Hook(
            either(
                before_return("LazySupervisedDataset._get_item"), before_return("LazySupervisedDataset.__getitem__")
            ),
            "comp_hooks.add_answers(self, i, data_dict)",
        ),
        Hook(
            before_return("DataCollatorForSupervisedDataset.__call__"), "comp_hooks.collate_answers(instances, batch)"
        ),
        Hook(
            before_assignment("train", "make_supervised_data_module"),
            "comp_hooks.prepare_training(model, model_args, data_args)",
        ),
    ),
}
