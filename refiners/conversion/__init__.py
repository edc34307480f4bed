"""Weights and configurations of published models, brought into the trees of this project and back."""

from refiners.conversion.config import (
    DIFFUSERS_NEUTRAL,
    TRANSFORMERS_NEUTRAL,
    TRANSFORMERS_ONLY,
    ConfigReader,
    read_config,
)
from refiners.conversion.convert import convert_file
from refiners.conversion.files import WeightFiles, open_state_dict, read_state_dict, write_state_dict
from refiners.conversion.key_map import KeyMap
from refiners.conversion.model_converter import ModelConverter
from refiners.conversion.pairing import Pairing
from refiners.conversion.port import Port
from refiners.conversion.problems import Problems
from refiners.conversion.rules import Merge, Recomputed, Rule, Split, Squeeze, Transpose, Unsqueeze

__all__ = [
    "DIFFUSERS_NEUTRAL",
    "TRANSFORMERS_NEUTRAL",
    "TRANSFORMERS_ONLY",
    "ConfigReader",
    "KeyMap",
    "Merge",
    "ModelConverter",
    "Pairing",
    "Port",
    "Problems",
    "Recomputed",
    "Rule",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "WeightFiles",
    "convert_file",
    "open_state_dict",
    "read_config",
    "read_state_dict",
    "write_state_dict",
]
