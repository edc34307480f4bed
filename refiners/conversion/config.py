"""Published configurations, read without guessing: what a port does not know of, it refuses.

A config.json says which model the weights are for. A port that skips an attribute it does not handle computes something
else than upstream and does not know it. So a reader accounts for every attribute: read with a getter, required to have
the one value that the port implements (`only`), or without any effect on it (`neutral`, each with its reason).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from refiners.conversion.problems import hint
from refiners.errors import ConversionError, FileFormatError

T = TypeVar("T")


class _Required:
    """The default of an attribute that has none."""


_REQUIRED = _Required()


class ConfigReader:
    """Reads a configuration in a `with` block; at its end one error lists all that the port cannot honour.

    A getter that finds nothing usable notes it and returns a harmless value, so that the reading goes on: build the
    model after the block.

    Receives:
        config: the attributes, as in a config.json.
        name: what is configured, for the error message.
        only: attributes of which the port implements one value: absent, or equal to it.
        neutral: attributes that cannot change what the port computes, each with the reason. `TRANSFORMERS_NEUTRAL` and
            `DIFFUSERS_NEUTRAL` hold those that these libraries write into every file.

    Raises:
        ConversionError: at the end of the block; and at once for a reason that is empty.

    Example:
        >>> config = {"hidden_size": 8, "hidden_act": "gelu", "model_type": "bert", "use_cache": True}
        >>> neutral = {"use_cache": "the port has no cache"}
        >>> with ConfigReader(config, "bert", only={"model_type": "bert"}, neutral=neutral) as read:
        ...     width = read.integer("hidden_size")
        ...     eps = read.number("layer_norm_eps", default=1e-12)
        ...     activation = read.choice("hidden_act", {"gelu": "exact", "gelu_new": "tanh"})
        >>> width, eps, activation
        (8, 1e-12, 'exact')
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        name: str,
        *,
        only: Mapping[str, Any] | None = None,
        neutral: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.name = name
        self.only = only or {}
        self.neutral = neutral or {}
        self._read: set[str] = set()
        self._problems: list[str] = []
        self._sections: list[ConfigReader] = []
        without = [key for key, reason in self.neutral.items() if not reason.strip()]
        if without:
            raise ConversionError(f"{name}: neutral attributes need a reason, {', '.join(without)} has none.")

    def __enter__(self) -> "ConfigReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        problems = self._all_problems()
        if problems and (error is None or isinstance(error, Exception)):
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise ConversionError(
                f"The configuration of {self.name} cannot be honoured: {len(problems)} of its attributes do not fit.\n"
                f"{lines}\nNothing was built. Check that it is the configuration of this model."
            ) from error

    def has(self, name: str) -> bool:
        """Whether the attribute is there and not null. To ask is not to handle it."""
        return self.config.get(name) is not None

    def integer(self, name: str, default: int | _Required = _REQUIRED) -> int:
        """A whole number."""
        return self._get(name, default, 1, lambda value: type(value) is int, "a whole number")

    def number(self, name: str, default: float | _Required = _REQUIRED) -> float:
        """A number."""
        return float(self._get(name, default, 1.0, lambda value: type(value) in (int, float), "a number"))

    def flag(self, name: str, default: bool | _Required = _REQUIRED) -> bool:
        """True or false."""
        return self._get(name, default, False, lambda value: type(value) is bool, "true or false")

    def text(self, name: str, default: str | _Required = _REQUIRED) -> str:
        """A string."""
        return self._get(name, default, "", lambda value: type(value) is str, "a string")

    def integers(self, name: str, default: Sequence[int] | _Required = _REQUIRED) -> tuple[int, ...]:
        """A list of whole numbers."""

        def fits(value: Any) -> bool:
            return isinstance(value, Sequence) and not isinstance(value, str) and all(type(v) is int for v in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]: JSON

        return tuple(self._get(name, default, (1,), fits, "a list of whole numbers"))

    def choice(self, name: str, choices: Mapping[str, T], default: str | _Required = _REQUIRED) -> T:
        """What the attribute's value stands for in `choices`, which holds the values that the port implements."""
        fallback = next(iter(choices))
        allowed = f"one of {', '.join(map(repr, choices))}"
        return choices[self._get(name, default, fallback, lambda v: type(v) is str and v in choices, allowed)]

    def value(
        self, name: str, fits: Callable[[Any], bool], expected: str, default: Any = _REQUIRED, fallback: Any = None
    ) -> Any:
        """Anything for which `fits` is true; `expected` says in words what that is. `fallback` stands in for what does
        not fit, until the block ends.
        """
        return self._get(name, default, fallback, fits, expected)

    def section(
        self, name: str, *, only: Mapping[str, Any] | None = None, neutral: Mapping[str, str] | None = None
    ) -> "ConfigReader":
        """A reader of a nested configuration, such as `text_config`. Its problems are reported with this one's."""
        count = len(self._problems)
        value = self._get(name, _REQUIRED, {}, lambda value: isinstance(value, Mapping), "a nested configuration")
        section = ConfigReader(value, name, only=only, neutral=neutral)
        if len(self._problems) == count:
            self._sections.append(section)
        return section

    def _get(self, name: str, default: Any, fallback: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        self._read.add(name)
        if name not in self.config:
            if isinstance(default, _Required):
                unread = [key for key in self.config if key not in self._read]
                self._problems.append(f"{name}: is required, {expected}, and is not there{hint(name, unread)}")
                return fallback
            return default
        value = self.config[name]
        if not fits(value):
            self._problems.append(f"{name}: is {value!r}, the port takes {expected}")
            return fallback
        return value

    def _all_problems(self) -> list[str]:
        problems = list(self._problems)
        for name, value in self.config.items():
            if name in self._read:
                continue
            if name in self.only:
                if not _equal(value, self.only[name]):
                    problems.append(f"{name}: is {value!r}, the port implements {self.only[name]!r} only")
            elif name not in self.neutral:
                problems.append(f"{name}: is {value!r}, the port does not know this attribute")
        for section in self._sections:
            problems += [f"{section.name}.{problem}" for problem in section._all_problems()]
        return problems


def _equal(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def read_config(path: Path | str) -> dict[str, Any]:
    """The attributes of a config.json.

    Raises:
        FileFormatError: the file is not a JSON object.
        FileNotFoundError: there is no such file.
    """
    try:
        config: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(
            f"{path} is not JSON: {error}. Give the config.json published with the weights."
        ) from error
    if not isinstance(config, dict):
        raise FileFormatError(
            f"{path} holds a JSON {type(config).__name__}, not an object. Give the config.json of the weights."
        )
    return config  # pyright: ignore[reportUnknownVariableType]: JSON has no type


_FILE = "says where the file is from, not what the model computes"
_OUTPUTS = "chooses what is returned beside the result; a port returns its result"
_TRAINING = "initial values and dropout play no part in inference from given weights"
_GENERATION = "how text is generated from a model, no part of its forward"
_TASK = "names of a task's classes, used by heads that the port does not have"


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


TRANSFORMERS_NEUTRAL: Mapping[str, str] = {
    **_each("_name_or_path architectures transformers_version dtype torch_dtype use_bfloat16 tokenizer_class", _FILE),
    **_each(
        "_attn_implementation _attn_implementation_autoset attn_implementation", "another kernel, the same function"
    ),
    **_each("output_hidden_states output_attentions output_scores return_dict return_dict_in_generate", _OUTPUTS),
    **_each("initializer_range initializer_factor gradient_checkpointing", _TRAINING),
    **_each("use_cache torchscript", "how upstream runs, not what it computes"),
    **_each("id2label label2id num_labels problem_type finetuning_task task_specific_params", _TASK),
    **_each("max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty", _GENERATION),
    **_each("temperature top_k top_p typical_p repetition_penalty length_penalty prefix", _GENERATION),
    **_each("no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences", _GENERATION),
    **_each("begin_suppress_tokens suppress_tokens exponential_decay_length_penalty", _GENERATION),
    **_each("forced_bos_token_id forced_eos_token_id remove_invalid_values decoder_start_token_id", _GENERATION),
}
"""Attributes that transformers writes into the config.json of any model, with the reason why a port may skip them."""

TRANSFORMERS_ONLY: Mapping[str, Any] = {
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "quantization_config": None,
}
"""Attributes of any transformers config.json that change the model, with the value of a plain encoder."""

DIFFUSERS_NEUTRAL: Mapping[str, str] = {
    **_each("_class_name _diffusers_version _name_or_path", _FILE),
    **_each("_use_default_values", "says which attributes were left at their defaults"),
}
"""Attributes that diffusers writes into any config.json, with the reason why a port may skip them."""
