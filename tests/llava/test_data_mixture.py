"""What is loaded for training, and how a mistake in it is told."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.mixture import load_records, sample_indices
from tests.llava.data_parts import make_record


def write_json(path, count: int, prefix: str = "r"):
    path.write_text(json.dumps([make_record("Hi", "Hello.", id=f"{prefix}{index}") for index in range(count)]))
    return path


def ids_of(records):
    return [record["id"] for record in records]


def test_a_json_list_loads_in_order_with_ids(tmp_path):
    path = tmp_path / "data.json"
    records = [make_record("Hi", "Hello."), make_record("Hi", "Hello.", id=7), make_record("Hi", "Hello.")]
    del records[2]["id"]
    path.write_text(json.dumps(records))
    assert ids_of(load_records(path)) == ["r", "7", "data[2]"]


def test_a_mixture_joins_its_sources_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write_json(tmp_path / "sub" / "a.json", 10, "a")
    write_json(tmp_path / "b.json", 3, "b")
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n"
        "  - json_path: sub/a.json\n    sampling_strategy: first:15%\n    image_folder: pictures\n"
        "  - json_path: b.json\n"
    )
    records = load_records(tmp_path / "mix.yaml")
    assert ids_of(records) == ["a0", "a1", "b0", "b1", "b2"]  # 15 % of 10 is rounded up to 2
    assert records[0]["image_folder"] == str(tmp_path / "pictures")
    assert "image_folder" not in records[2]


def test_data_cannot_name_its_own_image_folder(tmp_path):
    record = make_record("<image>", "Hello.", image="passwd") | {"image_folder": "/etc"}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    assert "image_folder" not in load_records(tmp_path / "data.json")[0]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("first:2", [0, 1]),
        ("first:50%", [0, 1, 2]),
        ("end:2", [3, 4]),
        ("end:0", []),
        ("end:0%", []),
        ("first:9", [0, 1, 2, 3, 4]),
        ("end:100%", [0, 1, 2, 3, 4]),
    ],
)
def test_strategies(strategy, expected):
    assert list(sample_indices(strategy, 5)) == expected


@given(st.integers(0, 300), st.integers(0, 100), st.integers(0, 5))
def test_random_draws_without_repetition_and_rounds_up(total, percent, seed):
    drawn = sample_indices(f"random:{percent}%", total, seed=seed)
    assert len(set(drawn)) == len(drawn) == math.ceil(total * percent / 100)
    assert all(0 <= index < total for index in drawn)
    assert drawn == sample_indices(f"random:{percent}%", total, seed=seed)


def test_random_follows_the_seed_and_only_its_own_source(tmp_path):
    """The same draw on every rank; a source that is added leaves the draws of the others alone."""
    write_json(tmp_path / "a.json", 50, "a")
    write_json(tmp_path / "b.json", 50, "b")
    source = "  - {{json_path: {}.json, sampling_strategy: 'random:10'}}\n"
    (tmp_path / "a.yaml").write_text("datasets:\n" + source.format("a"))
    (tmp_path / "ba.yaml").write_text("datasets:\n" + source.format("b") + source.format("a"))
    first = ids_of(load_records(tmp_path / "a.yaml", seed=1))
    assert first == ids_of(load_records(tmp_path / "a.yaml", seed=1))
    assert first != ids_of(load_records(tmp_path / "a.yaml", seed=2))
    assert first == ids_of(load_records(tmp_path / "ba.yaml", seed=1))[10:]


@pytest.mark.parametrize("strategy", ["some", "first", "first:x", "end:-1", "random:1.5", "first:120%", "random:%"])
def test_an_unknown_strategy_is_refused_with_file_and_known_ones(tmp_path, strategy):
    write_json(tmp_path / "a.json", 5)
    (tmp_path / "mix.yaml").write_text(f"datasets: [{{json_path: a.json, sampling_strategy: '{strategy}'}}]")
    with pytest.raises(ValueError, match=r"mix\.yaml, a\.json: sampling_strategy=.*first:N"):
        load_records(tmp_path / "mix.yaml")


BAD_FILES = {
    "data.json": {
        '[\n  {"id": 1, "conversations": [1]},\n  {"id": x}\n]': r"data\.json, line 3, column 10: malformed JSON",
        '[{"id": 1, "conversations": [1]}': r"data\.json, line 1, column 33: malformed JSON",
        "": r"data\.json, line 1, column 1: malformed JSON",
        '{"id": 1}': r"data\.json: expected a JSON list of records, found an object",
        "[3]": r"data\.json, record 0: expected an object with conversations, found a number",
        '[{"id": "x"}]': r"data\.json, record 0 \(id x\): has no conversations",
        '[{"id": "x", "conversations": []}]': r"record 0 \(id x\): has no conversations",
        "[]": r"data\.json: holds no records",
    },
    "mix.yaml": {
        "datasets: [\n  {json_path: a": r"mix\.yaml, line 2, column 16: malformed YAML",
        "data: []": r"mix\.yaml: expected `datasets:`",
        "- a.json": r"mix\.yaml: expected `datasets:`",
        "datasets: [{sampling_strategy: all}]": r"source 0 of `datasets`: has no json_path",
        "datasets: [{json_path: a.json, sampling: all}]": r"source 0 of `datasets`: unknown key 'sampling'",
        "datasets: [{json_path: a.json, sampling_strategy: 3}]": r"sampling_strategy should be text, found a number",
        "datasets: []": r"mix\.yaml: holds no records",
    },
}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [(name, text, message) for name, cases in BAD_FILES.items() for text, message in cases.items()],
)
def test_a_malformed_file_is_one_line_with_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_records(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data file not found: .*gone\.json"):
        load_records(tmp_path / "gone.json")
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: gone.json}]")
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        load_records(tmp_path / "mix.yaml")
    with pytest.raises(ValueError, match=r"expected a \.json list of records or a \.yaml mixture"):
        load_records(tmp_path / "data.csv")
    (tmp_path / "latin.json").write_bytes('["caf\xe9"]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json, byte 5: not UTF-8"):
        load_records(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("weight", "times"), [(1, (1, 1)), (2, (2, 2)), (0.25, (0, 1)), (1.5, (1, 2)), (3.0, (3, 3)), (0.001, (0, 0))]
)
def test_a_weight_says_how_often_records_come(tmp_path, weight, times):
    write_json(tmp_path / "a.json", 40, "a")
    (tmp_path / "mix.yaml").write_text(
        f"datasets: [{{json_path: a.json, sampling_strategy: 'random:20', weight: {weight}}}, {{json_path: a.json}}]"
    )
    (tmp_path / "plain.yaml").write_text("datasets: [{json_path: a.json, sampling_strategy: 'random:20'}]")
    drawn = ids_of(load_records(tmp_path / "plain.yaml", seed=3))
    weighted = ids_of(load_records(tmp_path / "mix.yaml", seed=3))[:-40]
    assert len(weighted) == round(20 * weight)
    assert {weighted.count(name) for name in drawn} == set(times)
    assert set(weighted) <= set(drawn)  # the same draw as without a weight
    assert weighted == ids_of(load_records(tmp_path / "mix.yaml", seed=3))[:-40]
    if weight == 1.5:
        assert weighted[20:] != ids_of(load_records(tmp_path / "mix.yaml", seed=4))[20:-40]


@pytest.mark.parametrize(
    ("weight", "message"),
    [("0", "above 0"), ("-1", "above 0"), (".inf", "above 0"), ("a", "number"), ("true", "number")],
)
def test_a_weight_that_is_none_is_refused(tmp_path, weight, message):
    (tmp_path / "mix.yaml").write_text(f"datasets: [{{json_path: a.json, weight: {weight}}}]")
    with pytest.raises(ValueError, match=rf"source 0 of `datasets`.*weight.*{message}"):
        load_records(tmp_path / "mix.yaml")
