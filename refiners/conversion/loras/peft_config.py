"""adapter_config.json of peft: which alpha and rank each layer has, and what else the file was trained with.

Follows `LoraConfig`, `LoHaConfig`, `LoKrConfig`, `IA3Config` and `LNTuningConfig` of peft 0.21.2. An attribute that
would change what is computed, and that is not read, is refused; so is one that is not known.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from refiners.conversion.config import ConfigReader

_FILE = "says where the file is from"
_TRAINING = "matters while training only"
_NEUTRAL = {
    "auto_mapping": _FILE,
    "base_model_name_or_path": _FILE,
    "inference_mode": _TRAINING,
    "peft_version": _FILE,
    "revision": _FILE,
    "task_type": "names a class of transformers",
}
_TARGETING = {
    "layers_pattern": "the layers are those that the file holds",
    "layers_to_transform": "the layers are those that the file holds",
}
_TARGETS = "names of layers, or a regular expression"
_INIT = {
    "init_weights": _TRAINING,
    "rank_dropout": _TRAINING,
    "rank_dropout_scale": _TRAINING,
    "module_dropout": _TRAINING,
}
_LORA_NEUTRAL = {
    **_NEUTRAL,
    **_TARGETING,
    "fan_in_fan_out": "the tensors are the same; how the layer keeps its weight is the port's business",
    "lora_dropout": _TRAINING,
    "loftq_config": _TRAINING,
    "eva_config": _TRAINING,
    "corda_config": _TRAINING,
    "lora_ga_config": _TRAINING,
    "megatron_core": "names a module, which megatron_config makes use of",
    "qalora_group_size": "is used with use_qalora only",
    "runtime_config": "how peft runs, not what it computes",
}
_LORA_ONLY: Mapping[str, Any] = {
    "bias": "none",
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "kasa_config": None,
    "layer_replication": None,
    "megatron_config": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the weights of the base too, which the file does not say how.
_INITS = (True, False, "gaussian", "orthogonal", "eva", None)
_METHODS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "IA3": "ia3", "LN_TUNING": "norm"}
PEFT_TYPES: Mapping[str, str] = {method: kind for kind, method in _METHODS.items()}


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says of the layers.

    Attributes:
        method: `lora`, `loha`, `lokr`, `ia3` or `norm`.
        rank, alpha: of the layers that no pattern names; None for methods without.
        rank_pattern, alpha_pattern: the end of a layer's name, or a regular expression for it, -> its own.
        rank_stabilized, has_dora, has_bias: what the LoRAs are.
        targets: the ends of the names of all layers with an adapter, or one regular expression; None if not said.
        excluded: the same for those without.
        feedforward: the same for those whose input an IA3 scales.
    """

    method: str
    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    rank_stabilized: bool = False
    has_dora: bool = False
    has_bias: bool = False
    targets: Sequence[str] | str | None = None
    excluded: Sequence[str] | str | None = None
    feedforward: Sequence[str] | str | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any], name: str) -> "PeftConfig":
        """Reads the attributes.

        Raises:
            ConversionError: some cannot be honoured, such as `modules_to_save`. Lists all.
        """
        method = _METHODS.get(str(config.get("peft_type", "LORA")).rpartition(".")[2], "lora")
        readers = {"lora": _read_lora, "loha": _read_lycoris, "lokr": _read_lycoris, "ia3": _read_ia3}
        only = {"modules_to_save": None, **(_LORA_ONLY if method == "lora" else {})}
        neutral = _LORA_NEUTRAL if method == "lora" else {**_NEUTRAL, **_TARGETING, **_INIT}
        with ConfigReader(_without_empty(config), name, only=only, neutral=neutral) as read:
            read.choice("peft_type", _METHODS, "LORA")
            found = readers.get(method, _read_nothing)(read)
            targets = read.value("target_modules", _is_targets, _TARGETS, None)
            excluded = read.value("exclude_modules", _is_targets, _TARGETS, None)
        if targets == "all-linear":
            targets = None  # which these are, only the model tells
        return cls(method, **found, targets=targets, excluded=excluded)

    def rank_of(self, name: str) -> int | None:
        """The rank of the layer of that name."""
        return _match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float | None:
        """The alpha of the layer of that name."""
        alpha = _match(self.alpha_pattern, name, self.alpha)
        return None if alpha is None else float(alpha)

    def is_target(self, name: str) -> bool:
        """Whether the layer of that name should have an adapter."""
        return self.targets is not None and is_among(name, self.targets) and not is_among(name, self.excluded)


def _without_empty(config: Mapping[str, Any]) -> dict[str, Any]:
    """An empty list of modules to save is none."""
    return {key: None if key == "modules_to_save" and not value else value for key, value in config.items()}


def _read_lora(read: ConfigReader) -> dict[str, Any]:
    read.value("init_lora_weights", lambda value: value in _INITS, f"one of {_INITS}", True)
    return {
        "rank": read.integer("r", 8),
        "alpha": read.number("lora_alpha", 8),
        **_patterns(read),
        "rank_stabilized": read.flag("use_rslora", False),
        "has_dora": read.flag("use_dora", False),
        "has_bias": read.flag("lora_bias", False),
    }


def _read_lycoris(read: ConfigReader) -> dict[str, Any]:
    for name in ("use_effective_conv2d", "decompose_both"):
        read.flag(name, False)  # the tensors tell
    read.integer("decompose_factor", -1)  # the tensors tell
    return {"rank": read.integer("r", 8), "alpha": read.number("alpha", 8), **_patterns(read)}


def _read_ia3(read: ConfigReader) -> dict[str, Any]:
    for name in ("fan_in_fan_out", "init_ia3_weights"):
        read.flag(name, False)  # neither changes the tensors
    return {"feedforward": read.value("feedforward_modules", _is_targets, "names, or a regular expression", None)}


def _read_nothing(read: ConfigReader) -> dict[str, Any]:
    return {}


def _patterns(read: ConfigReader) -> dict[str, Any]:
    names = ("rank_pattern", "alpha_pattern")
    return {
        name: read.value(name, _is_pattern, "a mapping of names, or regular expressions, to numbers", {}, {}) or {}
        for name in names
    }


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    pattern = cast(Mapping[Any, Any], value)
    return all(_is_expression(end) and isinstance(number, int | float) for end, number in pattern.items())


def _is_targets(value: Any) -> bool:
    return value is None or (isinstance(value, Sequence) if not isinstance(value, str) else _is_expression(value))


def _is_expression(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True


def _match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    # As peft.utils.get_pattern_key: the first pattern that is the name, or the end of it after a dot.
    return next((value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", name)), default)


def is_among(name: str, names: Sequence[str] | str | None) -> bool:
    """Whether a layer is among those that peft means: by the end of its name, or by one regular expression.

    Example:
        >>> is_among("layers.0.query", ["query"]), is_among("layers.0.query", "layers.*"), is_among("query2", ["query"])
        (True, True, False)
    """
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names or ())


def encode_config(config: Mapping[str, Any]) -> str:
    """The text of an adapter_config.json, byte by byte as peft writes it."""
    return json.dumps(dict(config), indent=2, sort_keys=True)


def summarise(values: Mapping[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """The value that most layers have, and the others' own, by a pattern that fits their names alone."""
    counts: dict[Any, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    common = max(counts, key=lambda value: counts[value]) if counts else default
    return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


def whole(number: float) -> float | int:
    """An alpha as a config holds it: 8 and not 8.0."""
    return int(number) if float(number).is_integer() else number


def exact_targets(names: Iterable[str], others: Iterable[str]) -> list[str] | str:
    """What stands for these layers and no others: their names, or a regular expression where a name ends another's."""
    wanted = sorted(names)
    chosen = set(wanted)
    strangers = [other for other in others if other not in chosen]
    if any(is_among(stranger, wanted) for stranger in strangers):
        return "|".join(re.escape(name) for name in wanted)
    return wanted
