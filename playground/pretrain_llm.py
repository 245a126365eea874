"""Pre-trains the embedded default's LLM on text alone.

`python -m playground.pretrain_llm --output playground/models/llm`

It learns to say captions and to answer questions from a caption (corpus.py). The tokenizer must be in the folder
already (train_tokenizer). Half-made weights stay in OUTPUT/checkpoint.pt; the finished model is saved as bfloat16.
"""

import argparse
import itertools
import random
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from playground.corpus import MOST_FACTS, TURN_END, Span, chat_text, training_texts
from playground.generate import COMPOSERS, choose_size
from playground.lookup_init import wire_for_lookup
from playground.pretraining import pretrain
from playground.splits import TRAIN

STEPS, BATCH, PEAK_LR = 3000, 16, 1e-3
IGNORE = -100
_PROBES = 150
# Up to this share of the steps the captions of a text have at most one of so many facts.
CURRICULUM = ((0.2, (2, 3, 5, MOST_FACTS)), (1.0, (5, MOST_FACTS)))


def llm_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """A Qwen2 of 1 M parameters, input and output embeddings tied."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.03,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of a text and its labels, IGNORE where the text is not trained on."""
    ids, labels = [], []
    for text, trained in spans:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if trained else [IGNORE] * len(piece)
    return ids, labels


def most_facts(step: int, steps: int) -> int:
    """The curriculum: short captions first. Looking facts up is learned there and then stretches."""
    choices = next(choices for share, choices in CURRICULUM if step < share * steps)
    return choices[step % len(choices)]


def text_batch(seed: str, most: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """The texts of a step, padded on the right to the longest. Causal attention: the padding needs no mask."""
    texts = itertools.islice(training_texts(seed, most), BATCH)
    encoded = [encode(spans, tokenizer) for spans in texts]
    longest = max(len(ids) for ids, _ in encoded)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in encoded]),
        "labels": torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in encoded]),
    }


@torch.no_grad()
def answer_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Share of answers that are right to their last token, by task, on fresh chats of the training split."""
    model.eval()
    rng = random.Random("probe")
    right: dict[str, list[bool]] = {}
    for number in range(_PROBES):
        kind = tuple(COMPOSERS)[number % len(COMPOSERS)]
        content = COMPOSERS[kind](rng, TRAIN, choose_size(rng, TRAIN))
        question = rng.choice(content.questions(rng))
        ids, labels = (torch.tensor(x) for x in encode(chat_text(content.caption(), [question]), tokenizer))
        guess = model(input_ids=ids[None], use_cache=False).logits[0, :-1].argmax(-1)
        wrong = (guess != labels[1:]) & (labels[1:] != IGNORE)
        right.setdefault(question.kind, []).append(not wrong.any())
    everything = [answer for answers in right.values() for answer in answers]
    parts = {"all": everything, **right}
    return ", ".join(f"{kind} {sum(answers) / len(answers):.0%}" for kind, answers in parts.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m playground.pretrain_llm", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the LLM; holds its tokenizer already")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    if not (args.output / "tokenizer.json").exists():
        print(f"pretrain_llm: no tokenizer in {args.output}; run playground.train_tokenizer first", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    random.seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    model = Qwen2ForCausalLM(llm_config(tokenizer))
    wire_for_lookup(model)
    checkpoint = args.output / "checkpoint.pt"
    pretrain(
        model,
        lambda step: model(**text_batch(f"llm/{step}", most_facts(step, args.steps), tokenizer), use_cache=False).loss,
        checkpoint,
        steps=args.steps,
        peak=PEAK_LR,
        evaluate=lambda: answer_accuracy(model, tokenizer),
        evaluate_every=200,
    )
    model.to(torch.bfloat16).save_pretrained(args.output)
    checkpoint.unlink()
    print(f"{args.output}: LLM of {model.num_parameters():,} parameters saved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
