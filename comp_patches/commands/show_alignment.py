"""Draw an image under the words nearest to its tokens: `python -m comp_patches.show_alignment MODEL IMAGE OUT.png`.

What the alignment loss pulls together, looked at: by cosine between the adapter's output and the LLM's word embeddings.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch

from comp_patches.commands.alignment_picture import Lettering, draw, missing_letters


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, look, draw."""
    from llava.utils import mistakes_in_one_line, positive_int

    parser = argparse.ArgumentParser(
        prog="python -m comp_patches.show_alignment", description=__doc__.partition(":")[0]
    )
    parser.add_argument("model", help="folder of a trained LLaVA checkpoint of this project, any stage's")
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("out", type=Path, help="picture to write, a .png")
    parser.add_argument("--word", help="also a heat map of every visual token's cosine with this word")
    parser.add_argument(
        "--top", type=positive_int, default=1, help="words per visual token, nearest first (default: 1)"
    )
    parser.add_argument("--max-num-vistoken", type=positive_int, help="most visual tokens; default: the checkpoint's")
    parser.add_argument(
        "--font", type=Path, help="font file; default: DejaVu Sans if matplotlib is there, else ASCII only"
    )
    parser.add_argument("--device", help="default: the accelerator if there is one")
    options = parser.parse_args(arguments)
    with mistakes_in_one_line():
        run(options)


def run(options: argparse.Namespace) -> None:
    """What is wrong with the flags and the image is found before the model's weights are loaded."""
    from transformers import AutoTokenizer

    from llava.eval.models import load_checkpoint
    from llava.inference import check_model_path
    from llava.inspection import as_seen, check_known, vocabulary, word_map
    from llava.mm_utils import load_image
    from llava.model.multimodal_encoder.builder import checkpoint_image_processor
    from llava.utils import write_atomically

    check_picture_name(options.out)
    check_device(options.device)
    lettering = Lettering(options.font)
    image = load_image(options.image)
    check_model_path(options.model)
    words = vocabulary(AutoTokenizer.from_pretrained(options.model))
    if options.word is not None:
        check_known(options.word, words[1])
    loaded = load_checkpoint(options.model, device=options.device)
    bound = {} if options.max_num_vistoken is None else {"max_num_vistoken": options.max_num_vistoken}
    processor = checkpoint_image_processor(loaded.model.config, **bound)
    found = word_map(loaded.model, processor, image, words, top=options.top, word=options.word)
    picture = draw(
        as_seen(image, processor),
        found.words,
        lettering,
        title=f"{options.image.name}  ·  {options.model}",
        word=options.word,
        cosines=found.cosines,
    )
    write_atomically(options.out, lambda file: picture.save(file, format="PNG"))
    print(summary(options.out, found.words, options.word, found.cosines))  # noqa: T201
    if missing := missing_letters(found.words, lettering):
        print(f"The font has no letters for {missing} of the words, drawn as boxes: give one with --font.")  # noqa: T201


def check_picture_name(out: Path) -> None:
    """Refuses what cannot become a picture."""
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f"OUT {out} is no name for a picture: expected a file name that ends in .png.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"OUT {out} would lie below {above}, which is a file. Name another folder.")


def check_device(device: str | None) -> None:
    """Refuses a device that this machine does not have; torch says so in several kinds of error."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        found = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} is not to be had: {found}. Leave it out, or say cpu.") from error


def summary(
    out: Path, words: list[list[list[tuple[str, float]]]], word: str | None, cosines: list[list[float]] | None
) -> str:
    """The picture in a line or two of text."""
    nearest = Counter(cell[0][0] for line in words for cell in line)
    often = ", ".join(f"{text} {count}" for text, count in nearest.most_common(5))
    lines = [f"{out}: {len(words)} rows x {len(words[0])} columns of visual tokens; nearest words: {often}"]
    if cosines is not None:
        flat = [(value, row, column) for row, line in enumerate(cosines) for column, value in enumerate(line)]
        best, row, column = max(flat)
        lines.append(
            f"cosine with {word!r}: {min(flat)[0]:.3f} to {best:.3f}, highest in row {row + 1}, column {column + 1}"
        )
    return "\n".join(lines)
