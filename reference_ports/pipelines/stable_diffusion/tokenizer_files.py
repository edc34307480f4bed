"""A CLIP tokenizer read from a directory, as transformers writes one.

Follows: the files that `transformers.CLIPTokenizer.save_pretrained` wrote up to 4, `merges.txt` beside
`special_tokens_map.json`, and writes since 5, `tokenizer.json`; all with a `tokenizer_config.json`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from reference_ports.clip.tokenizer import END_OF_TEXT, NUM_MERGES, CLIPTokenizer, read_merges
from refiners.conversion import read_config
from refiners.errors import FileFormatError


def read_tokenizer(directory: Path | str) -> CLIPTokenizer:
    """The tokenizer of a directory.

    Raises:
        FileFormatError: files are missing, or are not those of CLIP's tokenizer.
    """
    directory = Path(directory)
    settings = {**_read(directory / "special_tokens_map.json"), **_read(directory / "tokenizer_config.json")}
    if _read(directory / "added_tokens.json"):
        raise FileFormatError(
            f"{directory} has added tokens, such as those of a textual inversion, which this tokenizer does not read. "
            "Give the directory of the published model."
        )
    max_length = settings.get("model_max_length", 77)
    if type(max_length) is not int or max_length < 2:
        raise FileFormatError(
            f"{directory / 'tokenizer_config.json'}: model_max_length is {max_length!r}, not a length."
        )
    pad_token: Any = settings.get("pad_token", END_OF_TEXT)
    if isinstance(pad_token, Mapping):  # {"content": "!", "lstrip": false, …}
        pad_token = cast(Mapping[str, Any], pad_token).get("content")
    return CLIPTokenizer(_merges(directory), max_length=max_length, pad_token=str(pad_token))


def _merges(directory: Path) -> list[tuple[str, str]]:
    if (directory / "merges.txt").is_file():
        return read_merges(directory / "merges.txt")
    if not (directory / "tokenizer.json").is_file():
        raise FileFormatError(f"{directory} holds neither merges.txt nor tokenizer.json. Download the tokenizer too.")
    content = read_config(directory / "tokenizer.json")
    try:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
        merges = [(str(left), str(right)) for left, right in pairs[:NUM_MERGES]]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{directory / 'tokenizer.json'} holds no list of merges: {error!r}.") from error
    return merges


def _read(path: Path) -> dict[str, Any]:
    return read_config(path) if path.is_file() else {}
