"""What the labels are: the answers and their turns' ends, nothing else; or LLaVA's own mask, for parity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import IM_END, IM_START, conv_templates
from llava.data.bad_samples import BadSampleError
from llava.data.encoding import ConversationEncoder
from llava.data.records import build_conversation, place_image
from llava.mm_utils import tokenizer_image_token
from tests.llava.data_parts import make_record, make_tokenizer

FITTING = sorted(conv_templates.keys() - {"llava_llama_3"})  # its markers are no tokens of the test's tokenizer
TEXT = st.text(
    st.sampled_from(list("aeT. \n!?'1é日🙂<|>")),
    max_size=12,
).filter(lambda text: not any(special in text for special in ("<image>", IM_START, IM_END)))
ANSWER = TEXT.filter(str.strip)
EXCHANGES = st.lists(st.tuples(TEXT, ANSWER, st.lists(st.integers(1, 4), max_size=2)), min_size=1, max_size=4)


def encode(record, template="qwen_2_5", tokens_per_image=(), *, tokenizer=None, label_mask="answers", max_length=10**6):
    conversation = conv_templates[template]
    encoder = ConversationEncoder(
        tokenizer or make_tokenizer(), conversation, label_mask=label_mask, max_length=max_length
    )
    return encoder(build_conversation(record, conversation), tokens_per_image)


def decode(ids, tokenizer=None):
    return (tokenizer or make_tokenizer()).decode(list(ids), clean_up_tokenization_spaces=False)


def record_of(exchanges):
    texts = [text for question, answer, images in exchanges for text in ("<image>" * len(images) + question, answer)]
    return make_record(*texts), [tokens for *_, images in exchanges for tokens in images]


@settings(max_examples=60, deadline=None)
@given(EXCHANGES, st.sampled_from(["qwen_1_5", "qwen_2", "qwen_2_5"]), st.booleans())
def test_chatml_labels_decode_to_the_answers_each_with_its_end_token(exchanges, template, bos):
    tokenizer = make_tokenizer(bos=bos)
    record, tokens_per_image = record_of(exchanges)
    encoded = encode(record, template, tokens_per_image, tokenizer=tokenizer)
    supervised = encoded.labels != IGNORE_INDEX
    assert (encoded.labels[supervised] == encoded.input_ids[supervised]).all()
    expected = "".join(answer + IM_END for _, answer, _ in exchanges)
    assert decode(encoded.labels[supervised], tokenizer) == expected
    assert encoded.answers == [answer for _, answer, _ in exchanges]


@settings(max_examples=60, deadline=None)
@given(EXCHANGES, st.booleans())
def test_plain_labels_are_the_captions_with_their_newlines(exchanges, bos):
    tokenizer = make_tokenizer(bos=bos)
    record, tokens_per_image = record_of([(question, answer, images or [2]) for question, answer, images in exchanges])
    encoded = encode(record, "plain", tokens_per_image, tokenizer=tokenizer)
    captions = "".join(f"{answer}\n" for _, answer, _ in exchanges)
    assert decode(encoded.labels[encoded.labels != IGNORE_INDEX], tokenizer) == captions
    # The questions' words are gone: besides BOS, all that is not learned is visual.
    assert (encoded.labels == IGNORE_INDEX).sum() == sum(tokens_per_image) + bos


@settings(max_examples=60, deadline=None)
@given(EXCHANGES, st.sampled_from(FITTING), st.sampled_from(["answers", "llava"]), st.booleans())
def test_a_sample_is_tokenised_as_the_prompt_is_when_serving(exchanges, template, label_mask, bos):
    """Token for token, but for answers that begin with white space, whose first token the mask's border decides."""
    tokenizer = make_tokenizer(bos=bos)
    record, tokens_per_image = record_of([(question, answer.strip(), images) for question, answer, images in exchanges])
    encoded = encode(record, template, tokens_per_image, tokenizer=tokenizer, label_mask=label_mask)
    prompt = build_conversation(record, conv_templates[template]).get_prompt()
    places, wide = iter(tokens_per_image), []
    for token in tokenizer_image_token(prompt, tokenizer):
        wide += [token] * (next(places) if token == IMAGE_TOKEN_INDEX else 1)
    assert encoded.input_ids.tolist() == wide


def test_labels_by_hand():
    tokenizer = make_tokenizer()
    encoded = encode(make_record("<image>\nWhat colour?", "red", "Sure?", "Yes."), "qwen_2", [2])
    learned = [id for text in ("red", "Yes.") for id in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    assert encoded.labels[encoded.labels != IGNORE_INDEX].tolist() == learned
    assert encoded.input_ids.tolist().count(IMAGE_TOKEN_INDEX) == 2


@settings(max_examples=60, deadline=None)
@given(EXCHANGES)
def test_llava_mask_is_upstreams(exchanges):
    """COMPAT §3.3 read independently: every turn is tokenised whole; an assistant's turn is learned from its header to
    its newline, and `<|im_start|>`, `<|im_end|>` and the lone newline token wherever they stand."""
    tokenizer = make_tokenizer()
    record, tokens_per_image = record_of(exchanges)
    encoded = encode(record, "qwen_2", tokens_per_image, label_mask="llava")

    turns = [("system", "You are a helpful assistant.")]
    for turn in record["conversations"]:
        turns.append(({"human": "user", "gpt": "assistant"}[turn["from"]], turn["value"]))
    markers = [tokenizer(marker).input_ids[0] for marker in (IM_START, IM_END, "\n")]
    places, ids, labels = iter(tokens_per_image), [], []
    for role, text in turns:
        text = place_image(text) if role == "user" else text
        for token in tokenizer_image_token(f"{IM_START}{role}\n{text}{IM_END}\n", tokenizer):
            width = next(places) if token == IMAGE_TOKEN_INDEX else 1
            ids += [token] * width
            labels += [token if role == "assistant" or token in markers else IGNORE_INDEX] * width
    assert encoded.input_ids.tolist() == ids
    assert encoded.labels.tolist() == [IGNORE_INDEX, *labels[1:]]  # the first token has nothing before it


@pytest.mark.parametrize("label_mask", ["answers", "llava"])
@pytest.mark.parametrize("template", FITTING)
def test_the_first_label_is_always_ignored(template, label_mask):
    """Packed, it would be learned from another sample's last token."""
    assert encode(make_record("Hi", "Hello."), template, label_mask=label_mask).labels[0] == IGNORE_INDEX


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("What is it? <image>", "<image>\nWhat is it?"),
        ("<image> What?", "<image> What?"),
        ("Is <image> like <image>?", "Is <image> like <image>?"),
        ("What?", "What?"),
        (" <image>", "<image>"),
    ],
)
def test_an_only_image_goes_to_the_front_as_in_llava(text, placed):
    assert place_image(text) == placed


def test_both_spellings_of_turns_mean_the_same():
    spelt = {
        "id": "r",
        "conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    }
    assert encode(spelt).input_ids.tolist() == encode(make_record("Hi", "Hello.")).input_ids.tolist()


def test_a_leading_system_turn_takes_the_templates_place():
    record = make_record("Hi", "Hello.")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert decode(encode(record).input_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert decode(encode(record, "plain").input_ids) == "Hello.\n"


def test_a_leading_answer_is_dropped_as_in_llava():
    record = make_record("Hi", "Hello.")
    record["conversations"].insert(0, {"from": "gpt", "value": "Welcome."})
    assert "Welcome" not in decode(encode(record).input_ids)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("human", "Hi"), ("human", "Hi")], "a turn of the user stands where one of the assistant should"),
        ([("human", "Hi"), ("bot", "Hello")], "turn 1 is from 'bot'; known are human"),
        ([("human", None), ("gpt", "Hello")], "turn 0 has no text"),
        ([("human", "<image>"), ("gpt", "Hello")], r"1 <image>, but it has 0 image\(s\)"),
        ([("human", "Hi")], "no answer to learn from"),
        ([("human", "Hi"), ("gpt", " ")], "no answer to learn from"),
    ],
)
def test_a_record_that_teaches_nothing_is_bad(turns, reason):
    record = {"id": "r", "conversations": [{"from": role, "value": text} for role, text in turns]}
    with pytest.raises(BadSampleError, match=reason):
        encode(record)


@pytest.mark.parametrize("bos", [False, True])
def test_turns_are_cut_whole_at_every_length(bos):
    """For each max_length: the longest prefix of exchanges that fits, its images whole, the rest gone."""
    tokenizer = make_tokenizer(bos=bos)
    record = make_record("<image>\nOne?", "A.", "<image>\nTwo?", "Bee.", "Three?", "Sea.")
    images = [5, 7]
    prefixes = [make_record(*[turn["value"] for turn in record["conversations"][:count]]) for count in (2, 4, 6)]
    whole = [
        encode(prefix, tokens_per_image=images[:seen], tokenizer=tokenizer)
        for prefix, seen in zip(prefixes, (1, 2, 2), strict=True)
    ]
    lengths = [len(encoded.input_ids) for encoded in whole]
    for max_length in range(lengths[-1] + 3):
        fitting = sum(length <= max_length for length in lengths)
        if not fitting:
            message = f"first answer ends at token {lengths[0]}, beyond model_max_length={max_length}"
            with pytest.raises(BadSampleError, match=message):
                encode(record, tokens_per_image=images, tokenizer=tokenizer, max_length=max_length)
            continue
        encoded, expected = (
            encode(record, tokens_per_image=images, tokenizer=tokenizer, max_length=max_length),
            whole[fitting - 1],
        )
        assert encoded.input_ids.tolist() == expected.input_ids.tolist()
        assert encoded.labels.tolist() == expected.labels.tolist()
        assert (encoded.num_images, encoded.answers) == (expected.num_images, expected.answers)


def test_a_question_without_an_answer_is_left_out():
    asked = encode(make_record("One?", "A.", "<image>\nTwo?"), tokens_per_image=[3])
    assert asked.input_ids.tolist() == encode(make_record("One?", "A.")).input_ids.tolist()
    assert asked.num_images == 0


def test_a_tokenizer_without_the_templates_markers_is_refused():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        ["red"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    plain_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(ValueError, match=r"'<\|im_start\|>' is \d+ tokens.*Does --version fit"):
        encode(make_record("Hi", "Hello."), tokenizer=plain_tokenizer)
    assert encode(make_record("Hi", "Hello."), "plain", tokenizer=plain_tokenizer).answers == ["Hello."]


def test_an_unknown_mask_lists_the_known():
    with pytest.raises(ValueError, match=r"label_mask='all' is unknown\. Known: answers, llava"):
        encode(make_record("Hi", "Hello."), label_mask="all")


def test_a_text_without_a_token_is_ids_all_the_same():
    """Packed with others, an empty row of floats would make floats of their ids too."""
    encoder = ConversationEncoder(make_tokenizer(), conv_templates["plain"], label_mask="answers", max_length=10)
    assert encoder.encode_text("").shape == (0,)
    assert encoder.encode_text("").dtype == torch.long
