"""Weights and configurations of published models, brought into the trees of this project and back."""

from refiners.conversion.bundle import Bundle, Part
from refiners.conversion.config import (
    DIFFUSERS_NEUTRAL,
    TRANSFORMERS_NEUTRAL,
    TRANSFORMERS_ONLY,
    ConfigReader,
    read_config,
)
from refiners.conversion.convert import ConvertedFile, convert_file
from refiners.conversion.directory import ConvertedModel, ConvertedPart, convert_directory, verify_directory
from refiners.conversion.files import WeightFiles, open_state_dict, read_state_dict, write_state_dict
from refiners.conversion.key_map import KeyMap
from refiners.conversion.lazy import ConvertedWeights, LazyWeights, WeightsBelow, WeightsInMemory
from refiners.conversion.model_converter import ModelConverter
from refiners.conversion.opening import OpenedModel, OpenedPart, open_directory
from refiners.conversion.pairing import Pairing
from refiners.conversion.port import Port
from refiners.conversion.problems import Problems
from refiners.conversion.recognise import recognise
from refiners.conversion.rules import Merge, Recomputed, Rule, Split, Squeeze, Transpose, Unsqueeze
from refiners.conversion.variants import open_weights
from refiners.conversion.writing import Progress

__all__ = [
    "DIFFUSERS_NEUTRAL",
    "TRANSFORMERS_NEUTRAL",
    "TRANSFORMERS_ONLY",
    "Bundle",
    "ConfigReader",
    "ConvertedFile",
    "ConvertedModel",
    "ConvertedPart",
    "ConvertedWeights",
    "KeyMap",
    "LazyWeights",
    "Merge",
    "ModelConverter",
    "OpenedModel",
    "OpenedPart",
    "Pairing",
    "Part",
    "Port",
    "Problems",
    "Progress",
    "Recomputed",
    "Rule",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "WeightFiles",
    "WeightsBelow",
    "WeightsInMemory",
    "convert_directory",
    "convert_file",
    "open_directory",
    "open_state_dict",
    "open_weights",
    "read_config",
    "read_state_dict",
    "recognise",
    "verify_directory",
    "write_state_dict",
]
