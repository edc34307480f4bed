"""The tokenizer on a vocabulary made up for the test; the real one is compared with upstream's in parity_tests."""

import gzip
from itertools import chain, islice, product
from pathlib import Path

import pytest
import torch

from reference_ports.clip.tokenizer import NUM_MERGES, CLIPTokenizer, read_merges
from refiners.errors import FileFormatError, RefinersError

LETTERS = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
MADE = [("a", "b"), ("ab", "c</w>"), ("b", "c</w>"), ("c", "a"), ("a", "a")]


def merges() -> list[tuple[str, str]]:
    """Five merges that mean something, and as many that never apply to lower-case text as are missing."""
    unused = [letter for letter in LETTERS if not letter.islower()]
    pairs = list(product(unused, unused))
    triples = (("".join(pair), last) for pair, last in product(pairs, unused))
    return list(islice(chain(MADE, pairs, triples), NUM_MERGES))


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(merges())


def symbols(tokenizer: CLIPTokenizer, text: str) -> list[str]:
    """The symbols of a text, in the order of the vocabulary that CLIP's code builds."""
    made = [left + right for left, right in MADE]
    first = sorted([*LETTERS, *map(chr, range(256, 324))], key=ord)
    names = [*first, *(f"{letter}</w>" for letter in first), *made]
    return [names[i] for i in tokenizer.encode(text)[1:-1]]


def test_the_vocabulary_has_the_size_of_clips(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.vocabulary_size == 49_408
    assert (tokenizer.start_of_text_id, tokenizer.end_of_text_id) == (49_406, 49_407)


def test_the_earliest_merge_goes_first(tokenizer: CLIPTokenizer) -> None:
    assert symbols(tokenizer, "abc") == ["abc</w>"]
    assert symbols(tokenizer, "abcabc") == ["ab", "c", "abc</w>"]
    assert symbols(tokenizer, "aaa") == ["aa", "a</w>"]
    assert symbols(tokenizer, "aaaab") == ["aa", "aa", "b</w>"]


def test_pieces_are_cut_at_kinds_of_characters(tokenizer: CLIPTokenizer) -> None:
    assert symbols(tokenizer, "x1?y") == ["x</w>", "1</w>", "?</w>", "y</w>"]
    assert symbols(tokenizer, "12") == ["1</w>", "2</w>"]
    assert symbols(tokenizer, "x's") == ["x</w>", "'", "s</w>"]


def test_case_and_white_space_do_not_matter(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.encode(" ABC\t\n abc\u3000") == tokenizer.encode("abc abc")


def test_a_text_is_cut_and_keeps_its_end(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer.encode("x " * 100)
    assert len(ids) == 77
    assert (ids[0], ids[-1]) == (49_406, 49_407)


def test_a_batch_is_padded_to_the_longest_or_to_the_most(tokenizer: CLIPTokenizer) -> None:
    ids, mask = tokenizer(["x", "x y"], padding="longest")
    assert ids.dtype == mask.dtype == torch.long
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert ids[0, -1] == tokenizer.pad_id == 49_407
    assert tokenizer("x").ids.shape == (1, 77)
    assert tokenizer([]).ids.shape == (0, 77)


def test_another_padding_token_is_read_as_padding_in_texts_too() -> None:
    tokenizer = CLIPTokenizer(merges(), pad_token="!")
    assert tokenizer.pad_id == 0
    assert tokenizer.encode("x!")[2] == 0
    assert tokenizer("x").ids[0, -1] == 0


def test_special_tokens_in_a_text_are_read_as_such(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.encode("<|endoftext|>") == [49_406, 49_407, 49_407]
    assert len(tokenizer.encode("<|ENDOFTEXT|>")) > 3


def test_decoding_gives_the_text_back(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("Abc  é 猫 x2")) == "abc é 猫 x 2"


def test_a_long_word_takes_no_quadratic_time(tokenizer: CLIPTokenizer) -> None:
    assert len(tokenizer.encode("ab" * 50_000)) == 77


@pytest.mark.parametrize("compress", [True, False])
def test_merges_are_read_from_text_and_from_gzip(tmp_path: Path, compress: bool) -> None:
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges()), "left over"]
    data = "\n".join(lines).encode()
    path = tmp_path / "merges"
    path.write_bytes(gzip.compress(data) if compress else data)
    assert read_merges(path) == merges()
    assert CLIPTokenizer.from_file(path).vocabulary_size == 49_408


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x1f\x8bnot gzip",
        gzip.compress(b"#version: 0.2\na b\n" * 100, mtime=0)[:-20],
        b"\xff\xfe\x00",
        b"no header\na b\n",
        b"#version: 0.2\na b c\n",
        b"#version: 0.2\na b\n",
        b'{"model": "json"}',
    ],
)
def test_a_file_that_is_no_list_of_merges_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "merges"
    path.write_bytes(data)
    with pytest.raises(FileFormatError):
        CLIPTokenizer.from_file(path)


def test_a_merge_of_unknown_symbols_is_refused() -> None:
    with pytest.raises(FileFormatError, match="nothing before it makes"):
        CLIPTokenizer([("ab", "c"), *merges()[1:]])


def test_a_padding_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RefinersError, match="padding token"):
        CLIPTokenizer(merges(), pad_token="<pad>")
