"""Held-out evaluation with real tiny models."""

import json

import pytest
import torch

from llava.conversation import conv_templates
from llava.data.encoding import ConversationEncoder
from llava.data.records import build_conversation
from llava.eval import held_out
from llava.eval.answering import Answerer
from llava.eval.held_out import main
from llava.eval.items import make_item
from llava.eval.models import load_checkpoint, load_untrained, randomise
from llava.eval.results import read_rows, summary_path
from llava.eval.scoring import accuracy, fact_hits, is_exact_match, is_large
from llava.inference import prompt_ids
from llava.mm_utils import load_image
from tests.llava import tiny

pytest_plugins = ["tests.llava.eval_parts"]


def evaluate(model, colours, tmp_path, *flags, task="captions"):
    """Run the command; returns its rows."""
    output = tmp_path / "out.jsonl"
    file = ["--model-path", str(model), f"--{task}", str(colours / "data.json")]
    main([*file, "--image-folder", str(colours / "images"), "--output", str(output), *flags])
    return read_rows(output)


def test_a_trained_model_reads_its_images_and_only_by_looking(run, colours, tmp_path):
    seen = accuracy(evaluate(run / "stage2_native", colours, tmp_path))["accuracy"]
    blank = accuracy(evaluate(run / "stage2_native", colours, tmp_path, "--blank"))["accuracy"]
    noise = accuracy(evaluate(run / "stage2_native", colours, tmp_path, "--random-tower"))["accuracy"]
    assert seen == 1.0
    assert blank <= 0.5
    assert noise <= 0.5


def test_rows_and_summary_say_what_was_asked_answered_and_right(run, colours, tmp_path, capsys):
    flags = ["--conv-mode", "plain", "--limit", "6", "--fixed-size", "40"]
    rows = evaluate(run / "stage2_native", colours, tmp_path, *flags, task="questions")
    assert rows[5] == {
        "id": "c5", "kind": "cold", "image": "5.png", "width": 32, "height": 64, "question": tiny.QUESTION,
        "answer": "green", "prediction": "green", "correct": True,
    }  # fmt: skip
    summary = json.loads(summary_path(tmp_path / "out.jsonl").read_text())
    assert (summary["task"], summary["n"], summary["accuracy"]) == ("questions", 6, 1.0)
    assert summary["large"] == {"n": 4, "scored": 4, "accuracy": 1.0, "fixed_size": 40}  # 64×48; 32×64 is too small
    assert summary["kinds"]["warm"] == {"n": 3, "scored": 3, "accuracy": 1.0}
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "6", "100.0", "%"]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_stage_1_folder_and_the_untrained_start_can_be_evaluated(run, llm, siglip, colours, tmp_path):
    assert len(evaluate(run / "stage1", colours, tmp_path, "--max-new-tokens", "4", task="questions")) == 16
    start = [
        "--untrained",
        "--vision-tower",
        f"comp-siglip:{siglip}",
        "--max-new-tokens",
        "4",
        "--max-num-vistoken",
        "9",
    ]
    first = evaluate(llm, colours, tmp_path, *start, task="questions")
    assert first == evaluate(llm, colours, tmp_path, *start, task="questions")  # seeded


def test_a_question_is_put_in_a_template_that_has_a_place_for_it(run, colours, tmp_path):
    """`plain`, which Stage I trains with, would drop its words."""

    def template(task):
        evaluate(run / "stage1", colours, tmp_path, "--max-new-tokens", "1", "--limit", "1", task=task)
        return json.loads(summary_path(tmp_path / "out.jsonl").read_text())["template"]

    assert template("questions") == "qwen_2_5"
    assert template("captions") == "plain"


def test_the_untrained_start_is_the_tower_as_it_was_and_an_adapter_by_the_seed(llm, siglip):
    def start(seed):
        loaded = load_untrained(
            str(llm), f"comp-siglip:{siglip}", mm_projector_type="downsample_mlp", seed=seed, device="cpu"
        )
        return loaded.model.get_model()

    state = torch.random.get_rng_state()
    first, other = start(1), start(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.vision_tower.config.use_rope is False
    assert not torch.equal(first.mm_projector.state_dict()["0.weight"], other.mm_projector.state_dict()["0.weight"])


def test_flags_reach_the_answering(run, colours, tmp_path, monkeypatch):
    seen = []

    class Watched(Answerer):
        def __call__(self, items, **kwargs):
            seen.append(self)
            return super().__call__(items, **kwargs)

    monkeypatch.setattr(held_out, "Answerer", Watched)
    flags = ["--batch-size", "5", "--max-new-tokens", "7", "--force-resize", "32", "--blank"]
    evaluate(run / "stage2_native", colours, tmp_path, *flags)
    evaluate(run / "stage2_native", colours, tmp_path)
    assert (seen[0].batch_size, seen[0].max_new_tokens, seen[0].force_resize, seen[0].blank) == (5, 7, 32, True)
    assert (seen[1].batch_size, seen[1].max_new_tokens, seen[1].force_resize, seen[1].blank) == (32, 192, None, False)


def test_greedy_is_greedy_whatever_the_checkpoint_says(run, colours):
    """Qwen2.5's generation_config.json asks for sampling and a repetition penalty."""
    loaded = load_checkpoint(str(run / "stage2_native"), device="cpu")
    loaded.model.generation_config.update(do_sample=True, temperature=50.0, top_k=50, repetition_penalty=9.0)
    record = json.loads((colours / "data.json").read_text())[1]
    template = conv_templates["plain"]
    item = make_item(record, template, loaded.tokenizer, str(colours / "images"), with_facts=False)
    answerer = Answerer(loaded.model, loaded.tokenizer, loaded.image_processor, template, max_new_tokens=8)
    assert [answerer([item])[0].text for _ in range(3)] == ["green"] * 3


def test_forced_squash_gives_other_answers_than_the_checkpoints_own_size(run, colours):
    loaded = load_checkpoint(str(run / "stage2_native"), device="cpu")
    image = load_image(colours / "images" / "0.png")
    native = loaded.image_processor([image], force_resize=None)["image_grid_thw"]
    assert native.tolist() == [[1, 6, 8]]
    assert loaded.image_processor([image], force_resize=32)["image_grid_thw"].tolist() == [[1, 4, 4]]
    fixed = load_checkpoint(str(run / "stage1"), device="cpu").image_processor
    assert fixed([image], force_resize=None)["image_grid_thw"].tolist() == [[1, 4, 4]]  # as it was trained


def test_the_answering_squashes_where_it_is_told_to(run, colours):
    loaded = load_checkpoint(str(run / "stage2_native"), device="cpu")
    sides = []

    def image_processor(images, force_resize=None):
        sides.append(force_resize)
        return loaded.image_processor(images, force_resize=force_resize)

    record = json.loads((colours / "data.json").read_text())[1]
    template = conv_templates["plain"]
    item = make_item(record, template, loaded.tokenizer, str(colours / "images"), with_facts=False)
    for side in (None, 32):
        Answerer(loaded.model, loaded.tokenizer, image_processor, template, 8, force_resize=side)([item])
    assert sides == [None, 32]


def test_answers_in_batches_are_those_of_one_by_one(run, colours):
    loaded = load_checkpoint(str(run / "stage2_native"), device="cpu")
    template = conv_templates["plain"]
    items = [
        make_item(record, template, loaded.tokenizer, str(colours / "images"), with_facts=False)
        for record in json.loads((colours / "data.json").read_text())
    ]
    parts = (loaded.model, loaded.tokenizer, loaded.image_processor, template)
    batched = Answerer(*parts, max_new_tokens=8, batch_size=5)(items)
    alone = Answerer(*parts, max_new_tokens=8, batch_size=1)(items)
    assert batched == alone
    assert {answer.text for answer in batched} == set(tiny.COLOURS)
    assert [(answer.width, answer.height) for answer in batched[3:5]] == [(64, 48), (32, 64)]


@pytest.mark.parametrize("version", sorted(set(conv_templates) - {"llava_llama_3"}))  # whose marks are no tokens here
def test_the_prompt_is_the_unsupervised_beginning_of_the_training_text(run, version):
    tokenizer = load_checkpoint(str(run / "stage2_native"), device="cpu").tokenizer
    conversation = build_conversation(tiny.record("r", "0.png", "red"), conv_templates[version])
    encoder = ConversationEncoder(tokenizer, conv_templates[version], label_mask="answers", max_length=512)
    encoded = encoder(conversation, [1])
    length = int((encoded.labels >= 0).nonzero()[0])
    conversation.messages[1][1] = None
    assert torch.equal(prompt_ids(conversation, tokenizer), encoded.input_ids[:length])


def test_a_random_tower_forgets_all_but_the_scale_of_its_weights(run, colours):
    loaded = load_checkpoint(str(run / "stage2_native"), device="cpu")
    inputs = loaded.image_processor([load_image(colours / "images" / "0.png")])
    before = loaded.model.get_model().encode_images(**inputs)
    weight = next(p for p in loaded.model.get_vision_tower().parameters() if p.dim() == 2)
    std = weight.std().item()
    randomise(loaded.model.get_vision_tower(), seed=0)
    after = loaded.model.get_model().encode_images(**inputs)
    assert not torch.allclose(before, after, atol=0.1)
    assert weight.std().item() == pytest.approx(std, rel=0.2)


@pytest.mark.parametrize(
    ("fact", "caption", "stands"),
    [
        ("red square", "A scene. Red square, blue circle", True),
        ("red: 4", "red: 42; blue: 4", False),
        ("blue: 4", "red: 42; blue: 4", True),
        ("total: 4", "total: 4.", True),
        ("total: 4", "total: 4.5", False),
        ("4", "14 or 3.4", False),
        ("a.b", "axb", False),
    ],
)
def test_a_fact_counts_where_it_stands_verbatim(fact, caption, stands):
    assert fact_hits([fact], caption) == [stands]


def test_exact_match_forgives_case_white_space_and_a_period():
    assert is_exact_match(" Red.\n", "red")
    assert not is_exact_match("dark red", "red")
    assert not is_exact_match("", "red")


def test_large_is_neither_square_nor_within_one_and_a_half_times_the_fixed_area():
    assert is_large({"width": 384, "height": 160}, 192)
    assert not is_large({"width": 288, "height": 192}, 192)  # exactly 1.5 times
    assert not is_large({"width": 300, "height": 300}, 192)


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({}, ["--model-path", "nowhere/at/all"], "nowhere/at/all"),
        ({}, ["--model-path", "{run}"], "stage2_native"),
        ({}, ["--untrained"], "--vision-tower"),
        ({}, ["--vision-tower", "comp-siglip"], "--untrained"),
        ({"facts": None}, [], "facts"),
        ({"image": "missing.png"}, [], "missing.png"),
        ({"image": "../data.json"}, [], "outside"),
        ({"conversations": tiny.record("x", "0.png", "red")["conversations"] * 2}, [], "one exchange"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(run, colours, tmp_path, capsys, change, flags, message):
    records = json.loads((colours / "data.json").read_text())
    records[3] |= change
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = [flag.format(run=run) for flag in flags]
    with pytest.raises(SystemExit) as exit_info:
        main(
            ["--model-path", str(run / "stage2_native"), "--captions", str(tmp_path / "data.json"),
             "--image-folder", str(colours / "images"), "--output", str(tmp_path / "out.jsonl"), *flags]
        )  # fmt: skip
    assert message in exit_info.value.code
    assert "\n" not in exit_info.value.code
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out.jsonl").exists()
