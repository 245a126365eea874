"""The drawn data set: the same for the same seed, valid LLaVA JSON, and nothing shared by its two splits."""

import itertools
import json
import random
import re
import shutil
from collections import Counter

import pytest
import yaml
from PIL import Image

from llava.data.mixture import load_records
from playground import fonts, make_data, sizes, tables
from playground.corpus import training_texts
from playground.generate import COMPOSERS, make_picture
from playground.splits import HELDOUT, TRAIN

SETTINGS = {"seed": 3, "train_images": 60, "heldout_images": 30}
LISTS = ("stage1", "stage2", "stage3", "heldout_captions", "heldout_qa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("playground") / "data"
    assert make_data.make_data(output, **SETTINGS)
    return output


def records(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_same_seed_same_files(folder, tmp_path):
    make_data.make_data(tmp_path / "again", **SETTINGS)
    for path in sorted((folder / "images").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / "images" / path.name).read_bytes()
    for name in LISTS:
        assert records(folder, name) == records(tmp_path / "again", name)


def test_another_seed_another_picture():
    assert make_picture(TRAIN, 0, 1).content != make_picture(TRAIN, 1, 1).content


def test_finished_folder_is_kept_and_other_settings_are_refused(folder, capsys):
    before = (folder / "stage1.json").stat().st_mtime_ns
    command = ["--output", str(folder), "--seed", "3", "--train-images", "60", "--heldout-images", "30"]
    assert make_data.main(command) == 0
    assert "kept" in capsys.readouterr().out
    assert (folder / "stage1.json").stat().st_mtime_ns == before
    assert make_data.main([*command[:2], "--seed", "4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", LISTS)
def test_records_are_llava_json_with_images_that_exist(folder, name):
    listed = records(folder, name)
    assert listed
    assert len({record["id"] for record in listed}) == len(listed)
    for record in listed:
        with Image.open(folder / record["image"]) as image:
            image.load()
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
        assert all(turn["value"].strip() for turn in turns)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_mixtures_are_their_lists_wherever_the_folder_lies(folder, tmp_path, stage):
    mixture = yaml.safe_load((folder / f"stage{stage}.yaml").read_text())
    assert mixture == {"datasets": [{"json_path": f"stage{stage}.json", "sampling_strategy": "all"}]}
    for ending in ("json", "yaml"):
        shutil.copy(folder / f"stage{stage}.{ending}", tmp_path)
    assert list(load_records(tmp_path / f"stage{stage}.yaml")) == records(folder, f"stage{stage}")


def test_heldout_captions_hold_every_fact_and_the_true_size(folder):
    for record in records(folder, "heldout_captions"):
        assert record["facts"]
        assert all(fact in record["conversations"][1]["value"] for fact in record["facts"])
        with Image.open(folder / record["image"]) as image:
            assert image.size == (record["width"], record["height"])


def test_splits_share_no_font_table_or_size():
    assert not set(fonts.TRAIN_FACES) & set(fonts.HELDOUT_FACES)
    assert not {column.table for column in tables.TRAIN_COLUMNS} & {column.table for column in tables.HELDOUT_COLUMNS}
    assert not set(sizes.TRAIN_SIZES) & set(sizes.HELDOUT_SIZES)


def test_splits_share_no_content():
    rng = random.Random(0)
    drawn = {}
    for split in (TRAIN, HELDOUT):
        contents = [compose(rng, split, split.sizes[1]) for compose in COMPOSERS.values() for _ in range(300)]
        drawn[split.name] = {frozenset(content.facts()) for content in contents}
    assert not drawn["train"] & drawn["heldout"]


def test_no_content_belongs_to_both_splits_and_some_to_none():
    captions = [f"A chart. red: {value}; largest: red" for value in range(200)]
    owners = [[split.name for split in (TRAIN, HELDOUT) if split.owns(c, c[9:].split("; "))] for c in captions]
    assert all(len(names) < 2 for names in owners)
    assert {*map(tuple, owners)} == {(), ("train",), ("heldout",)}


def test_text_only_corpus_never_tells_a_heldout_caption():
    for spans in itertools.islice(training_texts("test"), 300):
        text = "".join(piece for piece, _ in spans)
        caption = next(line for line in text.split("\n") if line.startswith("A "))
        facts = re.split("[;,] ", caption.split(". ", 1)[1])
        assert TRAIN.owns(caption, list(dict.fromkeys(facts)))


def test_many_heldout_pictures_are_wide_or_tall():
    drawn = [make_picture(HELDOUT, 0, number).image.size for number in range(200)]
    assert sum(w != h and w * h > 1.5 * 192 * 192 for w, h in drawn) >= 0.35 * len(drawn)


def test_no_answer_can_be_guessed():
    answers = {}
    for number in range(400):
        picture = make_picture(HELDOUT, 1, number)
        for question in picture.content.questions(picture.rng)[:3]:
            answers.setdefault(question.kind, Counter())[question.answer] += 1
    assert len(answers) == 6
    for kind, counts in answers.items():
        assert counts.most_common(1)[0][1] <= 0.32 * counts.total(), kind


@pytest.mark.parametrize(
    "arguments",
    [["--output", "x", "--train-images", "0"], ["--output", "x", "--heldout-images", "many"], []],
)
def test_bad_arguments_end_with_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        make_data.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_output_that_cannot_be_made_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    for output in ("file", "file/below", "full"):
        assert make_data.main(["--output", str(tmp_path / output)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
