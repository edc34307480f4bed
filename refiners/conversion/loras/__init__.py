"""LoRA files of diffusers, peft and kohya's scripts: read, matched to trees by name, and written."""

from refiners.conversion.loras.file import LoraEntry, LoraFile
from refiners.conversion.loras.matching import LoraSpecs, specs_for, specs_for_parts
from refiners.conversion.loras.names import LoraNames, LoraTarget, names_of, register, registered
from refiners.conversion.loras.reading import read_loras
from refiners.conversion.loras.recognition import recognise
from refiners.conversion.loras.tuning import inject_tuning
from refiners.conversion.loras.writing import LAYOUTS, lora_file, write_file, write_loras

__all__ = [
    "LAYOUTS",
    "LoraEntry",
    "LoraFile",
    "LoraNames",
    "LoraSpecs",
    "LoraTarget",
    "inject_tuning",
    "lora_file",
    "names_of",
    "read_loras",
    "recognise",
    "register",
    "registered",
    "specs_for",
    "specs_for_parts",
    "write_file",
    "write_loras",
]
