"""JSON, JSONL, Parquet and folders of Hugging Face datasets give the same records."""

import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from llava.data.mixture import load_records
from tests.llava.data_parts import draw, make_dataset, make_record

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]


def png(size: tuple[int, int] = (24, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format="PNG")
    return file.getvalue()


def one_image(count: int = 3) -> list[dict]:
    """Rows as LLaVA-OneVision-Data has them."""
    images = [{"bytes": png((24, 16 + 8 * number)), "path": f"{number}.png"} for number in range(count)]
    return [
        {"id": f"r{number}", "image": image, "conversations": TURNS, "data_source": "made"}
        for number, image in enumerate(images)
    ]


def write_parquet(path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def save_to_disk(folder, rows: list[dict]):
    """What `datasets` 5 writes: Arrow streams and, beside others, the list of them."""
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    files = []
    for number, part in enumerate((table.slice(0, 2), table.slice(2))):
        files.append({"filename": f"data-{number:05d}-of-00002.arrow"})
        with pyarrow.ipc.new_stream(str(folder / files[-1]["filename"]), table.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))
    return folder


def test_jsonl_is_a_record_a_line(tmp_path):
    records = [make_record("Hi", "Caf\u00e9\u2028.", id=str(number)) for number in range(3)]
    lines = [json.dumps(record, ensure_ascii=number == 1) for number, record in enumerate(records)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8")
    assert list(load_records(tmp_path / "a.jsonl")) == records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}\n{"id": x}\n', r"a\.jsonl, record 0 \(id 1\): has no conversations"),
        ('\n{"id": x}\n', r"a\.jsonl, line 2, column 8: malformed JSON: .*one record per line"),
        ("[1]\n", r"a\.jsonl, record 0: expected an object with conversations, found a list"),
        ("\n", r"a\.jsonl: holds no records"),
    ],
)
def test_a_malformed_line_is_told_by_its_place(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path / "a.jsonl")


def test_odd_fields_come_back_as_they_were(tmp_path):
    odd = [
        make_record("Hi", "Hello.") | {"meta": {"é": [1, None, 2.5, "x" * 10, {"b": []}]}, "score": 10**30},
        make_record("Hi", "Hello.") | {"half": "\ud83d", "image": None},
        make_record("Hi", "Hello.") | {"id": 7, "conversations": [{"role": "user", "content": "Hi", "weight": 0}]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(odd, indent=2))
    assert list(load_records(tmp_path / "a.json")) == [*odd[:2], odd[2] | {"id": "7"}]


def test_parquet_brings_its_images_with_it(tmp_path):
    rows = one_image()
    records = load_records(write_parquet(tmp_path / "a.parquet", rows))
    assert list(records) == rows
    dataset = make_dataset(records)
    assert [dataset[number]["image_grid_thw"].tolist() for number in range(3)] == [
        [[1, 4, 6]],
        [[1, 6, 6]],
        [[1, 8, 6]],
    ]


def test_a_row_may_have_a_list_of_images_or_none_or_paths(tmp_path):
    draw(tmp_path, "a.png", (8, 8))
    inside = {"bytes": png(), "path": None}
    turns = [{"from": "human", "value": "<image><image>"}, TURNS[1]]
    rows = [
        {"id": "two", "image": [inside, {"bytes": None, "path": "a.png"}], "conversations": turns},
        {"id": "none", "image": None, "conversations": [{"from": "human", "value": "Hi"}, TURNS[1]]},
    ]
    dataset = make_dataset(load_records(write_parquet(tmp_path / "a.parquet", rows)), tmp_path)
    assert dataset[0]["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 2]]
    assert len(dataset[1]["image_grid_thw"]) == 0


def test_a_column_of_bytes_alone_is_an_image(tmp_path):
    rows = [{"id": "r", "image": png(), "conversations": TURNS}]
    dataset = make_dataset(load_records(write_parquet(tmp_path / "a.parquet", rows)))
    assert dataset[0]["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_bytes_that_are_no_image_cost_their_sample(tmp_path):
    rows = one_image(2)
    rows[0]["image"]["bytes"] = rows[0]["image"]["bytes"][:50]
    dataset = make_dataset(load_records(write_parquet(tmp_path / "a.parquet", rows)))
    assert "cannot read image 0.png" in dataset[0].reason
    assert dataset[1]["id"] == "r1"


def test_json_cannot_claim_bytes_that_follow_it(tmp_path):
    record = make_record("<image>", "A square.") | {"image": {"bytes": 10, "path": "a.png"}}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=r"a\.json, record r: `image` should be a path or a list of paths"):
        load_records(tmp_path / "a.json")


@pytest.mark.parametrize("listed", [False, True])
def test_a_path_in_an_object_is_a_path(tmp_path, listed):
    draw(tmp_path, "a.png")
    image = {"path": "a.png"}
    (tmp_path / "a.json").write_text(json.dumps([make_record("<image>", "A.", image=[image] if listed else image)]))
    assert make_dataset(load_records(tmp_path / "a.json"), tmp_path)[0]["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_a_folder_of_parquet_files_in_their_order_train_split_only(tmp_path):
    rows = one_image(4)
    for number, row in enumerate(rows):
        write_parquet(tmp_path / "hub" / f"part{number // 2}" / f"train-0000{number % 2}-of-00002.parquet", [row])
    write_parquet(tmp_path / "hub" / "part0" / "test-00000-of-00001.parquet", one_image(1))
    assert list(load_records(tmp_path / "hub")) == rows


def test_a_saved_dataset_is_read_from_its_folder(tmp_path):
    rows = one_image(5)
    save_to_disk(tmp_path / "saved", rows)
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: saved, sampling_strategy: 'end:2'}]")
    assert list(load_records(tmp_path / "mix.yaml")) == rows[3:]


def test_what_datasets_itself_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    rows = one_image(3)
    datasets.disable_progress_bars()
    features = {"id": datasets.Value("string"), "image": datasets.Image(decode=False)}
    table = datasets.Dataset.from_list([{"id": row["id"], "image": row["image"]} for row in rows])
    table = table.cast(datasets.Features(features)).add_column("conversations", [TURNS] * 3)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    found = load_records(tmp_path / "saved" / "train")
    assert [(row["id"], row["image"]) for row in found] == [(row["id"], row["image"]) for row in rows]
    assert [row["conversations"] for row in found] == [TURNS] * 3
    with pytest.raises(ValueError, match=r"saved: holds several splits. Name the folder of one, .*train"):
        load_records(tmp_path / "saved")


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as Parquet"):
        load_records(tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: a folder without Parquet files"):
        load_records(tmp_path / "empty")
    (tmp_path / "a.csv").write_text("id")
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: a.csv}]")
    with pytest.raises(ValueError, match=r"a\.csv: expected \.json, \.jsonl, \.parquet, or a folder"):
        load_records(tmp_path / "mix.yaml")
