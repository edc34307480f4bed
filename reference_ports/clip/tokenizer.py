"""CLIP's tokenizer: text to the 49,408 ids of its byte-pair vocabulary, in plain Python.

A text becomes ids in five steps: the special tokens written in it are set apart; the rest is put in Unicode form NFC,
every run of white space becomes one space, and each character becomes lower case; the text is cut in pieces (a
contraction, a run of letters, one digit, a run of anything else); each piece becomes UTF-8 bytes, drawn as 256
printable characters, the last one marked `</w>`; and the two neighbours that come first in the list of merges are
joined, again and again, until no neighbours are in the list.

Follows: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020);
`transformers.CLIPTokenizer` 5.23.0 (a tokenizer of the `tokenizers` library). The list of merges is a file that the
caller gives: `bpe_simple_vocab_16e6.txt.gz` of OpenAI and `open_clip_torch`, or a `merges.txt`.

Differs from upstream:
- A text longer than `max_length` is always cut (upstream: with `truncation=True`).
- Categories of characters are those of Python's `unicodedata`; a letter younger than it counts as a symbol.
- There is no unknown token: every byte is in the vocabulary.
"""

import gzip
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from refiners.errors import FileFormatError

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
END_OF_WORD = "</w>"
NUM_MERGES = 48_894

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# The characters of Unicode's property White_Space. `str.isspace` also holds for the separators 1C … 1F, which the
# vocabulary knows as symbols.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | frozenset(
    map(chr, range(0x2000, 0x200B))
)


class TokenBatch(NamedTuple):
    """Texts as ids, and which of those ids are text.

    Shapes:
        ids: Int[Tensor, "batch sequence_length"]
        attention_mask: Int[Tensor, "batch sequence_length"], 1 for the text with its two ends, 0 for padding
    """

    ids: Tensor
    attention_mask: Tensor


class CLIPTokenizer:
    """Turns texts into the ids that CLIP's text encoders read.

    Receives:
        merges: the pairs of symbols to join, most frequent first.
        max_length: the most ids a text may take, its two ends included.
        pad_token: what fills the rest. CLIP L pads with the end of text; OpenCLIP bigG with `"!"` (id 0), and, as
            upstream does, then reads every `!` of a text as padding.

    Raises:
        FileFormatError: there are not 48,894 merges, or one joins symbols that no merge before it makes.

    Example:
        >>> tokenizer = CLIPTokenizer.from_file("bpe_simple_vocab_16e6.txt.gz")  # doctest: +SKIP
        >>> tokenizer.encode("a photo of a cat")  # doctest: +SKIP
        [49406, 320, 1125, 539, 320, 2368, 49407]
    """

    def __init__(self, merges: Iterable[tuple[str, str]], max_length: int = 77, pad_token: str = END_OF_TEXT) -> None:
        pairs = list(merges)
        self.max_length = max_length
        self._byte_symbols = _byte_symbols()
        self._ids = _vocabulary(self._byte_symbols, pairs)
        self._symbols = list(self._ids)
        if pad_token not in self._ids:
            raise FileFormatError(f"The padding token {pad_token!r} is not in the vocabulary. Give a token that is.")
        self.start_of_text_id = self._ids[START_OF_TEXT]
        self.end_of_text_id = self._ids[END_OF_TEXT]
        self.pad_id = self._ids[pad_token]
        # the longest first, so that one special token cannot hide behind another that it begins with
        self._special_tokens = sorted({START_OF_TEXT, END_OF_TEXT, pad_token}, key=len, reverse=True)
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._known_pieces: dict[str, list[int]] = {}

    @classmethod
    def from_file(cls, path: str | Path, max_length: int = 77, pad_token: str = END_OF_TEXT) -> "CLIPTokenizer":
        """Reads the merges from `path`: plain text or gzip, one pair a line below a first line that names the version.

        Raises:
            FileFormatError: the file is not such a list, or is cut short.
        """
        return cls(read_merges(path), max_length=max_length, pad_token=pad_token)

    @property
    def vocabulary_size(self) -> int:
        """The number of ids: 256 bytes, 256 bytes that end a word, the merges, and the two ends of a text."""
        return len(self._ids)

    def encode(self, text: str) -> list[int]:
        """The ids of one text between its two ends, cut to `max_length`, without padding."""
        return [self.start_of_text_id, *self._encode_whole(text)[: self.max_length - 2], self.end_of_text_id]

    def overflow(self, text: str) -> str:
        """The end of a text, which `encode` cuts off; empty where all of it fits."""
        return self.decode(self._encode_whole(text)[self.max_length - 2 :])

    def __call__(
        self, texts: str | Sequence[str], padding: Literal["max_length", "longest"] = "max_length"
    ) -> TokenBatch:
        """Encodes texts into one batch, padded to `max_length` or to the longest text of the batch."""
        rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        length = self.max_length if padding == "max_length" else max((len(row) for row in rows), default=0)
        ids = torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows], dtype=torch.long)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=torch.long)
        return TokenBatch(ids=ids.reshape(len(rows), length), attention_mask=mask.reshape(len(rows), length))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, without special tokens. Case, white space and Unicode form are those of `encode`."""
        special = {self._ids[token] for token in self._special_tokens}
        symbols = "".join(self._symbols[int(i)] for i in ids if int(i) not in special)
        byte_of = {symbol: byte for byte, symbol in enumerate(self._byte_symbols)}
        data = bytes(byte_of[symbol] for symbol in symbols)
        return data.decode("utf-8", errors="replace").replace(END_OF_WORD, " ").strip()

    def _encode_whole(self, text: str) -> list[int]:
        """The ids of a text of any length, without its two ends."""
        ids: list[int] = []
        for part in self._split_at_special_tokens(text):
            if part in self._special_tokens:
                ids.append(self._ids[part])
                continue
            for piece in _pieces(_normalize(part)):
                ids.extend(self._encode_piece(piece))
        return ids

    def _split_at_special_tokens(self, text: str) -> Iterator[str]:
        start = position = 0
        while position < len(text):
            token = next((t for t in self._special_tokens if text.startswith(t, position)), None)
            if token is None:
                position += 1
                continue
            yield text[start:position]
            yield token
            start = position = position + len(token)
        yield text[start:]

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._known_pieces.get(piece)
        if ids is None:
            symbols = [self._byte_symbols[byte] for byte in piece.encode("utf-8")]
            symbols[-1] += END_OF_WORD
            ids = [self._ids[symbol] for symbol in _merge(symbols, self._ranks)]
            if len(self._known_pieces) < 65_536:
                self._known_pieces[piece] = ids
        return ids


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """Reads CLIP's 48,894 merges from a text file, gzipped or not. Lines past them are of no use to CLIP and are left.

    Raises:
        FileFormatError: the file is not such a list, or is cut short.
    """
    data = Path(path).read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is neither UTF-8 text nor a whole gzip file of it: {error}.") from error
    header, *lines = text.splitlines()[: NUM_MERGES + 1] or [""]
    pairs = [tuple(line.split(" ")) for line in lines]
    wrong = next((number for number, pair in enumerate(pairs, start=2) if len(pair) != 2), None)
    if "#version" not in header or wrong is not None:
        where = "line 1 does not name a #version" if wrong is None else f"line {wrong} is not two symbols"
        raise FileFormatError(f"{path} is not a list of merges: {where}. Give bpe_simple_vocab_16e6.txt.gz.")
    return [(left, right) for left, right in pairs]


def _byte_symbols() -> list[str]:
    """One printable character for each byte: itself where it is one, the next free one above 255 elsewhere."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _vocabulary(byte_symbols: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    if len(merges) != NUM_MERGES:
        raise FileFormatError(f"CLIP's vocabulary has {NUM_MERGES} merges, these are {len(merges)}. Give all of them.")
    # In the order of ids the bytes that are printable come first, then the others.
    symbols = sorted(byte_symbols, key=ord)
    symbols += [symbol + END_OF_WORD for symbol in symbols]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    for left, right in merges:
        if left not in ids or right not in ids:
            raise FileFormatError(f"The merge {left!r} {right!r} joins a symbol that nothing before it makes.")
        ids[left + right] = len(ids)
    for token in (START_OF_TEXT, END_OF_TEXT):
        ids[token] = len(ids)
    return ids


def _normalize(text: str) -> str:
    """Unicode form NFC, one space for each run of white space, each character by itself in lower case."""
    composed = unicodedata.normalize("NFC", text)
    spaced: list[str] = []
    for character in composed:
        if character not in _WHITE_SPACE:
            spaced.append(character.lower())
        elif not spaced or spaced[-1] != " ":
            spaced.append(" ")
    return "".join(spaced)


def _kind(character: str) -> Literal["letter", "number", "space", "symbol"]:
    if character in _WHITE_SPACE:
        return "space"
    match unicodedata.category(character)[0]:
        case "L":
            return "letter"
        case "N":
            return "number"
        case _:
            return "symbol"


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text in contractions, runs of letters, single digits and runs of symbols, and drops the spaces."""
    position = 0
    while position < len(text):
        contraction = next((c for c in _CONTRACTIONS if text.startswith(c, position)), None)
        special = next((t for t in (START_OF_TEXT, END_OF_TEXT) if text.startswith(t, position)), None)
        if special is not None:
            # Only lower case made it look like one: it is read as symbols, letters, symbols.
            yield from ("<|", special[2:-2], "|>")
            position += len(special)
            continue
        if contraction is not None:
            yield contraction
            position += len(contraction)
            continue
        end = position + 1
        kind = _kind(text[position])
        if kind in ("letter", "symbol"):
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "space":
            yield text[position:end]
        position = end


def _merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Joins the neighbours that come first in the list of merges, the leftmost of equals, until none are in it."""
    following = [*range(1, len(symbols)), -1]
    preceding = [*range(-1, len(symbols) - 1)]
    alive = [True] * len(symbols)

    def candidate(left: int) -> tuple[int, int, str, str] | None:
        right = following[left] if left >= 0 else -1
        rank = ranks.get((symbols[left], symbols[right])) if right >= 0 else None
        return None if rank is None else (rank, left, symbols[left], symbols[right])

    queue = [found for left in range(len(symbols)) if (found := candidate(left))]
    heapify(queue)
    while queue:
        _, left, left_symbol, right_symbol = heappop(queue)
        right = following[left]
        if not alive[left] or right < 0 or (symbols[left], symbols[right]) != (left_symbol, right_symbol):
            continue  # one of the two was joined to another neighbour meanwhile
        symbols[left] += symbols[right]
        alive[right] = False
        following[left] = following[right]
        if following[right] >= 0:
            preceding[following[right]] = left
        for changed in (preceding[left], left):
            if found := candidate(changed):
                heappush(queue, found)
    return [symbol for symbol, is_alive in zip(symbols, alive, strict=True) if is_alive]
