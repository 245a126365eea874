"""Paired tests against numbers worked by hand."""

import json

import pytest

from llava.eval.paired import compare, large_only, main, two_sided_binomial
from llava.eval.results import write_rows


def caption(number, hits, *, size=(400, 200)):
    facts = [f"fact {place}" for place in range(len(hits))]
    return {
        "id": f"i{number}", "kind": "chart", "image": f"{number}.png", "width": size[0], "height": size[1],
        "question": "", "answer": "; ".join(facts), "prediction": "", "facts": facts, "hits": hits,
    }  # fmt: skip


def question(number, correct, image):
    return {
        "id": f"q{number}", "kind": "count", "image": image, "width": 64, "height": 64, "question": "How many?",
        "answer": "3", "prediction": "", "correct": correct,
    }  # fmt: skip


def test_the_binomial_by_hand():
    assert two_sided_binomial(1, 5) == 2 * (1 + 6) / 64
    assert two_sided_binomial(5, 1) == 2 * (1 + 6) / 64
    assert two_sided_binomial(0, 10) == 2 / 1024
    assert two_sided_binomial(3, 3) == 1.0
    assert two_sided_binomial(0, 0) == 1.0
    assert two_sided_binomial(400, 600) < 1e-9  # whole numbers do not overflow


def test_facts_are_paired_within_images():
    a = [caption(0, [True, False, False]), caption(1, [False, True]), caption(2, [True])]
    b = [caption(2, [True]), caption(0, [True, True, True]), caption(1, [True, False])]
    result = compare(a, b)
    assert (result.num_images, result.num_scored) == (3, 6)
    assert (result.accuracy_a, result.accuracy_b) == (3 / 6, 5 / 6)
    assert (result.only_a, result.only_b, result.mcnemar_p) == (1, 3, 2 * (1 + 4) / 16)
    assert (result.images_a, result.images_b, result.sign_p) == (0, 1, 1.0)
    assert result.difference == pytest.approx(1 / 3)
    assert result.interval[0] <= result.difference <= result.interval[1]
    assert compare(a, b) == result  # the bootstrap is seeded


def test_the_interval_of_equal_models_is_zero():
    rows = [caption(number, [True, False]) for number in range(5)]
    assert compare(rows, rows).interval == (0.0, 0.0)


def test_questions_of_one_image_count_once_in_the_sign_test():
    a = [question(number, False, "same.png") for number in range(4)]
    b = [question(number, True, "same.png") for number in range(4)]
    result = compare(a, b)
    assert (result.only_b, result.mcnemar_p) == (4, 2 / 16)
    assert (result.num_images, result.images_b, result.sign_p) == (1, 1, 1.0)


def test_different_records_are_refused():
    with pytest.raises(ValueError, match="1 ids are in one alone, the first i1"):
        compare([caption(0, [True]), caption(1, [True])], [caption(0, [True])])
    with pytest.raises(ValueError, match="i0 has another answer"):
        compare([caption(0, [True])], [caption(0, [True, True])])
    with pytest.raises(ValueError, match="each once"):
        compare([caption(0, [True])] * 2, [caption(0, [True])] * 2)


def test_the_command_compares_the_large_images(tmp_path, capsys):
    small = caption(9, [True], size=(64, 32))
    write_rows(tmp_path / "a.jsonl", [caption(0, [False, False]), small])
    write_rows(tmp_path / "b.jsonl", [caption(0, [True, True]), small | {"hits": [False]}])
    assert [row["id"] for row in large_only([small, caption(0, [True])], 192)] == ["i0"]
    arguments = ["--a", str(tmp_path / "a.jsonl"), "--b", str(tmp_path / "b.jsonl"), "--subset", "large"]
    main([*arguments, "--output", str(tmp_path / "paired.json")])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "n = 1 images, 2 facts or questions"
    assert "A 0.0 %   B 100.0 %   B - A +100.0 points" in out
    assert json.loads((tmp_path / "paired.json").read_text())["mcnemar_p"] == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ('{"id": 1', "line 1: malformed"), ('{"id": 1}', "no row of"), ("", "holds no rows")],
)
def test_a_bad_result_file_is_one_line(tmp_path, content, message):
    write_rows(tmp_path / "a.jsonl", [caption(0, [True])])
    if content is not None:
        (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        main(["--a", str(tmp_path / "a.jsonl"), "--b", str(tmp_path / "b.jsonl")])
    assert message in exit_info.value.code
    assert "\n" not in exit_info.value.code
