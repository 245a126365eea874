"""LLaVA JSON records of pictures."""

from playground.content import Question
from playground.generate import Picture

CAPTION_PROMPT = "Describe the image."


def caption_record(name: str, file: str, picture: Picture) -> dict:
    """A record of Stages I and II: the caption is the one answer."""
    return {"id": name, "image": file, "conversations": _turns([(CAPTION_PROMPT, picture.content.caption())])}


def question_record(name: str, file: str, questions: list[Question]) -> dict:
    """A record of Stage III: one turn per question, the image in the first."""
    return {"id": name, "image": file, "conversations": _turns([(q.text, q.answer) for q in questions])}


def heldout_caption_record(name: str, file: str, picture: Picture) -> dict:
    """A caption record with what an evaluation needs: kind, facts and size."""
    record = caption_record(name, file, picture)
    width, height = picture.image.size
    return record | {"kind": picture.kind, "facts": picture.content.facts(), "width": width, "height": height}


def heldout_question_records(name: str, file: str, picture: Picture, questions: list[Question]) -> list[dict]:
    """One record per question; `kind` is the task's."""
    width, height = picture.image.size
    return [
        question_record(f"{name}-{number}", file, [question])
        | {"kind": question.kind, "width": width, "height": height}
        for number, question in enumerate(questions)
    ]


def _turns(pairs: list[tuple[str, str]]) -> list[dict]:
    turns = []
    for asked, answered in pairs:
        mark = "<image>\n" if not turns else ""
        turns += [{"from": "human", "value": mark + asked}, {"from": "gpt", "value": answered}]
    return turns
