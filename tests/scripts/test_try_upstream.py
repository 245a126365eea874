"""scripts/try_upstream.sh on a real checkout of LLaVA-NeXT, and what trains there against this project.

LLAVA_NEXT_CHECKOUT=PATH names a clone at a commit that can train (b42941c), LLAVA_NEXT_PYTHON the Python of its
environment. The checkout is cloned, so it stays as it is.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT, PYTHON = (os.environ.get(f"LLAVA_NEXT_{name}") for name in ("CHECKOUT", "PYTHON"))
TINY = ROOT / "scripts/upstream/tiny.py"
TILES = ("--image_grid_pinpoints", "[[32,64],[64,32],[64,64]]", "--mm_patch_merge_type", "spatial_unpad")
TOKENIZER_FILES = ("tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHECKOUT and PYTHON), reason="LLAVA_NEXT_CHECKOUT and LLAVA_NEXT_PYTHON name no checkout and its Python"
    ),
]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a command prints, which must succeed."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream") / "next"
    run("git", "clone", "-q", CHECKOUT, folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def tried(checkout, tmp_path_factory):
    """The script's work folder and output; afterwards the method is in the checkout again."""
    work = tmp_path_factory.mktemp("tried")
    output = run("bash", "scripts/try_upstream.sh", checkout, cwd=ROOT, UPSTREAM_PYTHON=PYTHON, WORK=str(work))
    assert run("git", "status", "--porcelain", cwd=checkout) == ""
    run(sys.executable, "-m", "comp_patches.upstream", "apply", checkout, cwd=ROOT)
    return work, output


def answers(output: str) -> list[str]:
    return re.findall(r"answer about .*|next token's .*", output)


def numbers(text: str) -> list[float]:
    return [float(each) for each in re.search(r"\[(.*)\]", text).group(1).split(",")]


def test_one_step_with_both_losses_named_one_answer_and_no_trace(tried):
    _, output = tried
    log = {name: float(value) for name, value in re.findall(r"'(\w+)': '?([\d.e-]+)", output)}
    assert log["loss"] == pytest.approx(log["loss_decoding"] + 0.05 * log["loss_alignment"], rel=1e-3)
    assert log["alignment_sample_share"] == 0.75  # one of four is text alone
    assert "image tensor (3, 32, 96)" in output  # 96x40, at its own size
    assert "image tensor (3, 64, 32)" in output
    assert output.rstrip().endswith("== git status is what it was before")


def test_this_project_answers_the_same_from_what_trained_there(tried):
    work, output = tried
    tokenizer, model, processor, _ = load_pretrained_model(
        str(work / "llava_qwen_out"), device="cpu", torch_dtype=torch.float32
    )
    ids = tokenizer_image_token("<image>\nWhich colour is the square?", tokenizer, return_tensors="pt")
    found = answers(output)
    for number, name in enumerate(("wide", "tall")):
        batch = processor([Image.open(work / f"images/{name}.png")])
        tokens = model.generate([ids], **batch, do_sample=False, max_new_tokens=8)[0].tolist()
        assert tokens == numbers(found[2 * number])
        embeddings, _ = model.embed_multimodal(expanded(ids, model, batch)[None], **batch)
        logits = model(inputs_embeds=embeddings).logits[0, -1, :4]
        torch.testing.assert_close(logits, torch.tensor(numbers(found[2 * number + 1])), atol=2e-3, rtol=1e-3)


def expanded(ids: torch.Tensor, model, batch) -> torch.Tensor:
    """The placeholder as often as the image has tokens."""
    (tokens,) = model.get_model().tokens_per_image(batch["image_grid_thw"])
    return torch.cat([each.expand(tokens) if each < 0 else each[None] for each in ids])


def test_upstream_answers_the_same_from_what_this_project_saves(tried, checkout):
    work, output = tried
    _, model, _, _ = load_pretrained_model(str(work / "llava_qwen_out"), device="cpu", torch_dtype=torch.bfloat16)
    del model.config.image_aspect_ratio  # this project's own trainings know no such key
    model.save_pretrained(work / "llava_qwen_back")
    for name in TOKENIZER_FILES:  # what newer tokenizers write, older ones cannot read
        if (work / "llm_qwen" / name).exists():
            shutil.copy(work / "llm_qwen" / name, work / "llava_qwen_back")
    again = run(PYTHON, TINY, "answer", work, "llava_qwen_back", cwd=checkout)
    assert answers(again) == answers(output)


@pytest.mark.parametrize(
    "flags",
    [
        ("--image_aspect_ratio", "pad"),
        ("--image_aspect_ratio", "anyres", *TILES),
        ("--image_aspect_ratio", "anyres_max_2", *TILES, "--mm_projector_type", "mlp2x_gelu"),
        ("--mm_tunable_parts", "mm_mlp_adapter", "--use_rope", "False", "--max_num_vistoken", "4"),
        ("--lora_enable", "True"),
    ],
    ids=lambda flags: " ".join(flags[:2]).replace("--", ""),
)
def test_upstream_s_modes_train_and_those_that_save_a_model_answer(tried, checkout, flags):
    work, _ = tried
    shutil.rmtree(work / "llava_qwen_mode", ignore_errors=True)
    output = run(PYTHON, TINY, "train", work, *flags, "--output_dir", "llava_qwen_mode", cwd=checkout)
    assert "'loss': " in output
    if "--image_aspect_ratio" in flags:
        assert len(answers(run(PYTHON, TINY, "answer", work, "llava_qwen_mode", cwd=checkout))) == 4


def test_the_command_line_chat_answers(tried, checkout):
    work, _ = tried
    assert "<|im_start|>assistant" in run(PYTHON, TINY, "chat", work, cwd=checkout)
