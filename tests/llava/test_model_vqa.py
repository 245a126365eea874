"""Questions of a file are answered one line each, again and again, whatever its images are like."""

import json

import pytest

from llava.eval.model_vqa import chunk, main, read_question
from llava.model import LlavaLlamaForCausalLM
from tests.llava.upstream import photo, save_release


@pytest.fixture(scope="module")
def release(tmp_path_factory, llm):
    return save_release(tmp_path_factory.mktemp("vqa") / "v15", "v15", llm)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        photo(30, 20).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def ask(release, folder, records, *more):
    file = folder / ("questions.jsonl" if "question_id" in records[0] else "questions.json")
    lines = "\n".join(map(json.dumps, records)) if file.suffix == ".jsonl" else json.dumps(records)
    file.write_text(lines)
    flags = {"--model-path": release, "--question-file": file, "--image-folder": folder, "--answers-file": folder / "a"}
    words = [str(word) for pair in flags.items() for word in pair]
    main([*words, "--conv-mode", "qwen_2", "--max-new-tokens", "4", *more])
    return [json.loads(line) for line in (folder / "a").read_text().splitlines()]


def of_llava(number, image="a.png"):
    return {"question_id": number, "image": image, "text": f"What is {number}?"}


def test_a_line_for_every_question_even_of_a_broken_a_missing_and_a_forbidden_image(release, folder):
    images = ["a.png", "broken.png", "missing.png", "../a.png", "b.png"]
    answers = ask(release, folder, [of_llava(number, image) for number, image in enumerate(images)])
    assert [line["question_id"] for line in answers] == list(range(5))
    assert {"prompt", "text", "answer_id", "model_id", "metadata"} <= answers[0].keys()
    assert [line.get("error", "")[:17] for line in answers] == [
        "",
        "cannot read image",
        "image file not fo",
        "image path '../a.",
        "",
    ]
    assert len({line["answer_id"] for line in answers}) == 5
    assert answers[0]["text"] != ""
    assert answers[1]["text"] == ""


def test_a_run_goes_on_after_the_last_whole_line(release, folder):
    records = [of_llava(number) for number in range(4)]
    first = ask(release, folder, records, "--test_size", "2")
    assert len(first) == 2
    with (folder / "a").open("a") as file:
        file.write('{"question_id": 2, "te')  # killed while writing
    again = ask(release, folder, records)
    assert [line["question_id"] for line in again] == [0, 1, 2, 3]
    assert again[:2] == first


def test_next_turns_follow_on_the_models_own_answers_and_several_images_are_read(release, folder):
    turns = [("human", "<image><image>\nSame?"), ("gpt", "Yes."), ("human", "Sure?"), ("gpt", "No.")]
    record = {
        "sample_id": 7,
        "image": ["a.png", "b.png"],
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "metadata": {"dataset": "d", "question_type": "open"},
    }
    answers = ask(release, folder, [record])
    assert [(line["sample_id"], line["turn"], line["gt_response"]) for line in answers] == [
        (7, 0, "Yes."),
        (7, 1, "No."),
    ]
    assert {"dataset", "prompt", "pred_response", "shortuuid", "model_id", "question_type"} <= answers[0].keys()
    assert "error" not in answers[1]
    assert ask(release, folder, [record]) == answers


def test_chunks_share_the_questions_in_order():
    questions = [read_question(of_llava(number), "q") for number in range(7)]
    parts = [chunk(questions, 3, number) for number in range(3)]
    assert [asked for part in parts for asked in part] == questions
    assert [len(part) for part in parts] == [3, 3, 1]


def test_a_record_of_another_kind_is_one_line_that_names_it(release, folder):
    with pytest.raises(SystemExit, match=r"questions.json\[0\]: expected question_id and text"):
        ask(release, folder, [{"id": 1}])


def test_beams_and_nucleus_reach_the_model(release, folder, monkeypatch):
    seen = []
    generate = LlavaLlamaForCausalLM.generate
    monkeypatch.setattr(
        LlavaLlamaForCausalLM,
        "generate",
        lambda *args, **options: (seen.append(options), generate(*args, **options))[1],
    )
    answers = ask(release, folder, [of_llava(0)], "--num_beams", "2", "--temperature", "0.2", "--top_p", "0.7")
    assert "error" not in answers[0]
    assert (seen[0]["num_beams"], seen[0]["temperature"], seen[0]["top_p"]) == (2, 0.2, 0.7)


def test_top_p_without_sampling_is_refused(release, folder):
    with pytest.raises(SystemExit, match=r"--top_p 0.7 .*--temperature"):
        ask(release, folder, [of_llava(0)], "--top_p", "0.7")
