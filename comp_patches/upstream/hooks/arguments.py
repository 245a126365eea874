"""The training flags of the method, as this project names them, added to upstream's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TOWER_OPTIONS = ("use_rope", "position_embedding_kind", "position_interpolation", "position_embedding_order")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class CompArguments:
    """Names and defaults are those of this project's own arguments; all of it is off unless asked for."""

    use_rope: bool | None = field(default=None, metadata=_help("RoPE-2D in the tower; unset = the checkpoint's."))
    position_embedding_kind: str | None = field(default=None, metadata=_help("learned | sincos | none."))
    position_interpolation: str | None = field(
        default=None, metadata=_help("bilinear | bicubic, each also with _antialias.")
    )
    position_embedding_order: str | None = field(default=None, metadata=_help("block | raster."))
    min_num_vistoken: int | None = field(default=None, metadata=_help("Fewest visual tokens of an image."))
    max_num_vistoken: int | None = field(default=None, metadata=_help("Most visual tokens of an image."))
    force_resize: str | None = field(
        default=None, metadata=_help("Squash every image to a square of this side in px; pretrained | none = native.")
    )
    use_alignment_loss: bool = field(default=False, metadata=_help("Add CoMP's alignment loss."))
    alignment_weight: float = field(default=0.05, metadata=_help("Its weight in the total."))
    alignment_mode: str = field(default="prior_softmax", metadata=_help("Target rule: prior_softmax | sinkhorn."))
    alignment_row_strength: float = field(default=1.0, metadata=_help("sinkhorn only: 1 = the paper's equation."))
    alignment_temperature: float = field(default=0.005, metadata=_help("Of the visual side's softmax."))
    alignment_epsilon: float = field(default=0.005, metadata=_help("Of the text side."))
    alignment_prior_temperature: float = field(default=0.05, metadata=_help("prior_softmax only: of the prior."))
    word_prior: str | None = field(
        default=None, metadata=_help("File made by python -m comp_patches.word_prior; uniform = without a prior.")
    )
    unfreeze_mm_vision_tower: bool = field(default=False, metadata=_help("Train the tower, a comp-* one."))

    def __post_init__(self):
        if self.use_alignment_loss and self.word_prior is None:
            raise ValueError(
                "--use_alignment_loss needs --word_prior FILE, which python -m comp_patches.word_prior of the CoMP "
                "project makes, or --word_prior uniform."
            )
        side = self.force_resize
        if side not in (None, "none", "pretrained") and not side.isdigit():
            raise ValueError(f"--force_resize {side!r}: expected a side in px, `pretrained` or `none`.")


def with_flags(arguments: type) -> type:
    """Upstream's dataclass of model arguments with the method's beside its own, which win where both have one."""
    return dataclass(type(arguments.__name__, (arguments, CompArguments), {"__module__": arguments.__module__}))


def tower_options(arguments: Any) -> dict[str, Any]:
    """The tower's switches that were set; the rest is the checkpoint's to say."""
    return _given(arguments, TOWER_OPTIONS)


def processor_options(arguments: Any) -> dict[str, Any]:
    """The image processor's options that were set."""
    options = _given(arguments, ("min_num_vistoken", "max_num_vistoken", "force_resize"))
    if options.get("force_resize", "pretrained") != "pretrained":
        options["force_resize"] = None if options["force_resize"] == "none" else int(options["force_resize"])
    return options


def alignment_options(arguments: Any, config: Any) -> dict[str, Any]:
    """The alignment loss's options for an LLM of this config."""
    return {
        "prior": None if arguments.word_prior == "uniform" else arguments.word_prior,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "mode": arguments.alignment_mode,
        "row_strength": arguments.alignment_row_strength,
        "temperature": arguments.alignment_temperature,
        "epsilon": arguments.alignment_epsilon,
        "prior_temperature": arguments.alignment_prior_temperature,
    }


def _given(arguments: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
