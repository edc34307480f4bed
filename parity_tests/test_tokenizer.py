"""CLIP's tokenizer beside transformers', on texts chosen to be hard and on random mixtures of hard parts."""

import random

import pytest
import torch
from transformers import CLIPTokenizer as UpstreamTokenizer

from parity_tests.hard_strings import HARD_STRINGS, PARTS
from parity_tests.published import clip_merges
from reference_ports.clip.tokenizer import END_OF_TEXT, START_OF_TEXT, CLIPTokenizer, read_merges

PAD_TOKENS = {"end of text": END_OF_TEXT, "exclamation mark": "!"}


def upstream_vocabulary() -> dict[str, int]:
    """Built as OpenAI's code builds it, independently of the port."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    symbols = characters + [f"{character}</w>" for character in characters]
    symbols += ["".join(pair) for pair in read_merges(clip_merges())]
    return {symbol: i for i, symbol in enumerate([*symbols, START_OF_TEXT, END_OF_TEXT])}


@pytest.fixture(scope="module", params=PAD_TOKENS)
def pair(request: pytest.FixtureRequest) -> tuple[CLIPTokenizer, UpstreamTokenizer]:
    pad_token = PAD_TOKENS[request.param]
    upstream = UpstreamTokenizer(
        vocab=upstream_vocabulary(), merges=read_merges(clip_merges()), model_max_length=77, pad_token=pad_token
    )
    return CLIPTokenizer.from_file(clip_merges(), pad_token=pad_token), upstream


def test_there_are_two_hundred_hard_strings_and_none_twice() -> None:
    assert len(set(HARD_STRINGS)) == len(HARD_STRINGS) >= 200


@pytest.mark.parametrize(
    "number", range(len(HARD_STRINGS)), ids=lambda number: f"{number:03} {HARD_STRINGS[number]!a:.30}"
)
def test_a_hard_string_gets_the_ids_of_upstream(pair: tuple[CLIPTokenizer, UpstreamTokenizer], number: int) -> None:
    (tokenizer, upstream), text = pair, HARD_STRINGS[number]
    expected = upstream(text, truncation=True, max_length=77)["input_ids"]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == upstream.decode(expected, skip_special_tokens=True)


def test_random_mixtures_get_the_ids_of_upstream(pair: tuple[CLIPTokenizer, UpstreamTokenizer]) -> None:
    tokenizer, upstream = pair
    draw = random.Random(0)
    texts = ["".join(draw.choices(PARTS, k=draw.randint(1, 25))) for _ in range(2000)]
    expected = upstream(texts, truncation=True, max_length=77)["input_ids"]
    assert [tokenizer.encode(text) for text in texts] == expected


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_a_batch_is_padded_and_masked_as_upstream_does(
    pair: tuple[CLIPTokenizer, UpstreamTokenizer], padding: str
) -> None:
    tokenizer, upstream = pair
    expected = upstream(HARD_STRINGS, padding=padding, truncation=True, max_length=77, return_tensors="pt")
    ids, mask = tokenizer(HARD_STRINGS, padding=padding)
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_a_batch_of_short_texts_is_padded_as_upstream_does(
    pair: tuple[CLIPTokenizer, UpstreamTokenizer], padding: str
) -> None:
    tokenizer, upstream = pair
    texts = ["", "a cat", "a photo of a cat!"]
    expected = upstream(texts, padding=padding, truncation=True, max_length=77, return_tensors="pt")
    batch = tokenizer(texts, padding=padding)
    assert torch.equal(batch.ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])


@pytest.mark.parametrize("max_length", [2, 3, 10])
def test_other_lengths_cut_as_upstream_does(pair: tuple[CLIPTokenizer, UpstreamTokenizer], max_length: int) -> None:
    upstream = pair[1]
    tokenizer = CLIPTokenizer.from_file(clip_merges(), max_length, pad_token=upstream.pad_token)
    expected = upstream(HARD_STRINGS, truncation=True, max_length=max_length)["input_ids"]
    assert [tokenizer.encode(text) for text in HARD_STRINGS] == expected
