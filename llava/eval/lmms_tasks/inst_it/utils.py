"""Inst-It Bench, image split, multiple choice. Read by lmms-eval through inst_it.yaml."""

import re

LETTERS = "ABCD"


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs):
    choices = "\n".join(f"{letter}. {doc[f'choice_{letter.lower()}']}" for letter in LETTERS)
    prompts = lmms_eval_specific_kwargs
    return f"{prompts['pre_prompt']}\n{doc['question']}\n{choices}\n{prompts['post_prompt']}"


def process_results(doc, results):
    said = results[0].strip()
    return {"inst_it_accuracy": {"said": said, "chosen": chosen_letter(said), "answer": doc["answer"].strip()}}


def chosen_letter(answer):
    """The first of A to D that stands alone, else the first at all; None without any."""
    found = re.search(r"\b[ABCD]\b", answer) or re.search(r"[ABCD]", answer)
    return found[0] if found else None


def accuracy(results):
    """Share of right answers among those that name a letter, as the benchmark's own script counts; 0 if none does.

    No answer at all, where the image or the generation failed, is a wrong one.
    """
    named = [result for result in results if result["chosen"] or not result["said"]]
    return sum(result["chosen"] == result["answer"] for result in named) / len(named) if named else 0.0
