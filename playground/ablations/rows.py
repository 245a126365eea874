"""What is compared: every row that can be trained, and the tables that rows stand in. Data, no code that runs."""

from playground.ablations.runner import ROOT, Row

TOWER_WITHOUT_TEXT = ROOT / "runs/ablations/tower_without_text"  # made when a row first asks for it
WITHOUT_TEXT = f"comp-dinov2:{TOWER_WITHOUT_TEXT}"
WITH_TEXT = "comp-siglip:playground/models/tower"

NO_LOSS = ("--use_alignment_loss", "False")
ROPE_IN_STAGE1 = {"stage1": ("--use_rope", "True")}
NO_ROPE = dict.fromkeys(("stage2_fixed", "stage2_native"), ("--use_rope", "False"))
LLM_FROZEN = dict.fromkeys(("stage2_fixed", "stage2_native"), ("--mm_tunable_parts", "mm_vision_tower,mm_mlp_adapter"))
# Without the learned positions Stage I would have none at all, so RoPE-2D turns from the start.
ROPE_ONLY = ("--position_embedding_kind", "none")


def fixed(size: int) -> dict[str, tuple[str, ...]]:
    """Stage II at one size throughout: its second half goes on like the first, for as many steps as the native one."""
    return dict.fromkeys(("stage2_fixed", "stage2_native"), ("--force_resize", str(size)))


def in_stages(*changes: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Several changes at once."""
    return {stage: sum((change.get(stage, ()) for change in changes), ()) for change in changes for stage in change}


def sinkhorn(row_strength: float) -> tuple[str, ...]:
    return ("--alignment_mode", "sinkhorn", "--alignment_row_strength", str(row_strength))


def of_positions(name: str, *flags: str, **in_stage: tuple[str, ...]) -> Row:
    """The embedded default's own tower, without the alignment loss: what is left is where patches are told to stand."""
    return Row(name, WITH_TEXT, (*NO_LOSS, *flags), in_stage)


ROWS = {
    row.name: row
    for row in (
        of_positions("learned, 128 px", **in_stages(fixed(128), NO_ROPE)),
        of_positions("learned, 192 px", **in_stages(fixed(192), NO_ROPE)),
        of_positions("RoPE-2D, 192 px", *ROPE_ONLY, **in_stages(fixed(192), ROPE_IN_STAGE1)),
        of_positions("C-RoPE, 192 px", **fixed(192)),
        of_positions("learned, native", **NO_ROPE),
        of_positions("RoPE-2D, native", *ROPE_ONLY, **ROPE_IN_STAGE1),
        of_positions("C-RoPE, native"),
        of_positions("C-RoPE, native, raster order", "--position_embedding_order", "raster"),
        of_positions("C-RoPE, native, bicubic", "--position_interpolation", "bicubic"),
        of_positions("C-RoPE from Stage I, 192 px", **in_stages(fixed(192), ROPE_IN_STAGE1)),
        of_positions("C-RoPE, 192 px, LLM frozen", **in_stages(fixed(192), LLM_FROZEN)),
        Row("no loss", WITHOUT_TEXT, NO_LOSS),
        Row("loss until II fixed", WITHOUT_TEXT, in_stage={"stage2_native": NO_LOSS}),
        Row("prior_softmax", WITHOUT_TEXT),
        Row("uniform prior", WITHOUT_TEXT, ("--word_prior", "uniform")),
        Row("learnable prototypes", WITHOUT_TEXT, ("--alignment_prototypes", "learnable")),
        Row("contrastive", WITHOUT_TEXT, ("--auxiliary_loss", "contrastive")),
        Row("sinkhorn", WITHOUT_TEXT, sinkhorn(1.0)),
        Row("sinkhorn row_strength 0.67", WITHOUT_TEXT, sinkhorn(0.67)),
        Row("sinkhorn row_strength 0.33", WITHOUT_TEXT, sinkhorn(0.33)),
        Row("sinkhorn row_strength 0", WITHOUT_TEXT, sinkhorn(0.0)),
        Row("C-RoPE, native, prior_softmax", WITH_TEXT),
    )
}

# A table's rows, in its order. Rows stand in several tables and are trained once.
TABLES = {
    "tab5a": (
        "learned, 128 px",
        "learned, 192 px",
        "RoPE-2D, 192 px",
        "C-RoPE, 192 px",
        "learned, native",
        "RoPE-2D, native",
        "C-RoPE, native",
        "C-RoPE, native, raster order",
        "C-RoPE, native, bicubic",
    ),
    "tab4": (
        "learned, 192 px",
        "C-RoPE from Stage I, 192 px",
        "C-RoPE, 192 px",
        "C-RoPE, 192 px, LLM frozen",
        "C-RoPE, native",
    ),
    # The last two: the same question to a tower that was contrasted with text.
    "tab6": ("no loss", "loss until II fixed", "prior_softmax", "C-RoPE, native", "C-RoPE, native, prior_softmax"),
    "tab5b": (
        "contrastive",
        "prior_softmax",
        "uniform prior",
        "learnable prototypes",
        "sinkhorn row_strength 0",
        "sinkhorn row_strength 0.33",
        "sinkhorn row_strength 0.67",
        "sinkhorn",
        "no loss",
    ),
}
# Native against fixed for the same steps: who is right on the same facts of the same pictures.
PAIRS = (("C-RoPE, 192 px", "C-RoPE, native"), ("learned, native", "C-RoPE, native"))
