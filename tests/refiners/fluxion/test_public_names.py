"""The names of api.md, under the import paths of api.md: code written against them must find them."""

import importlib

import pytest
import torch

import refiners.fluxion.layers as fl
from refiners import errors


def words(text: str) -> list[str]:
    return text.split()


LAYERS = words("""
    Embedding LayerNorm GroupNorm LayerNorm2d InstanceNorm2d Activation GeLU GeLUApproximation GLU SiLU ReLU
    Sigmoid Attention ScaledDotProductAttention SelfAttention SelfAttention2d Identity GetArg Flatten Unflatten
    Transpose Permute Squeeze Unsqueeze Reshape Slicing Parameter Sin Cos Multiply Matmul Lambda Return Sum
    Residual Chain UseContext SetContext Parallel Distribute Passthrough Breakpoint Concatenate Conv2d
    ConvTranspose2d Linear MultiLinear Downsample Upsample Module WeightedModule ContextModule Interpolate
    ReflectionPad2d PixelUnshuffle Converter MaxPool1d MaxPool2d Adapter
""")
CHAIN = words("""
    Chain ChainError Lambda Parallel Distribute Passthrough Sum Residual Concatenate Matmul UseContext SetContext Return
    Breakpoint
""")
PATHS = {
    "refiners.fluxion": words("load_from_safetensors manual_seed norm pad save_to_safetensors"),
    "refiners.fluxion.context": words("Context Contexts ContextProvider"),
    "refiners.fluxion.layers.chain": CHAIN,
    "refiners.fluxion.layers.module": words("Module ContextModule WeightedModule ModuleTree"),
    "refiners.fluxion.layers.attentions": [name for name in LAYERS if "Attention" in name],
    "refiners.fluxion.layers.activations": words("Activation GeLU GeLUApproximation GLU SiLU ReLU Sigmoid"),
    "refiners.fluxion.layers.basics": words("""
        Identity GetArg Flatten Unflatten Reshape Transpose Permute Slicing Squeeze Unsqueeze Sin Cos Multiply Parameter
    """),
    "refiners.fluxion.adapters": words("Adapter Lora LinearLora Conv2dLora LoraAdapter auto_attach_loras"),
    "refiners.fluxion.adapters.adapter": words("Adapter lookup_top_adapter"),
    "refiners.fluxion.adapters.lora": words("Lora LinearLora Conv2dLora LoraAdapter auto_attach_loras"),
    "refiners.fluxion.utils": words("""
        norm manual_seed no_grad pad interpolate normalize gaussian_blur image_to_tensor images_to_tensor
        tensor_to_image tensor_to_images load_tensors load_from_safetensors save_to_safetensors summarize_tensor
        str_to_dtype
        device_has_bfloat16
    """),
    "refiners.conversion.model_converter": ["ModelConverter"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_fl_has_the_layer(name: str) -> None:
    assert hasattr(fl, name)
    assert name in fl.__all__


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in PATHS.items() for name in names])
def test_the_import_path_gives_the_name(path: str, name: str) -> None:
    assert hasattr(importlib.import_module(path), name)


@pytest.mark.parametrize("name", CHAIN)
def test_the_chain_module_and_fl_give_the_same_object(name: str) -> None:
    if name != "ChainError":
        assert getattr(importlib.import_module("refiners.fluxion.layers.chain"), name) is getattr(fl, name)


def test_everything_that_fl_announces_is_there() -> None:
    assert [name for name in fl.__all__ if not hasattr(fl, name)] == []
    assert len(set(fl.__all__)) == len(fl.__all__)


def test_fl_adapter_is_the_one_of_the_adapters_room() -> None:
    assert importlib.import_module("refiners.fluxion.adapters").Adapter is fl.Adapter
    assert importlib.import_module("refiners.fluxion.adapters.adapter").Adapter is fl.Adapter


def test_every_layer_is_a_module_of_torch() -> None:
    no_modules = {"GeLUApproximation", "Adapter"}
    assert all(issubclass(getattr(fl, name), torch.nn.Module) for name in LAYERS if name not in no_modules)


@pytest.mark.parametrize(
    ("error", "builtins"),
    [
        (errors.TreeError, [ValueError]),
        (errors.TreeKeyError, [KeyError]),
        (errors.TreeIndexError, [IndexError]),
        (errors.TreeTypeError, [AssertionError]),
        (errors.ParentError, [AssertionError]),
        (errors.NotFoundError, [AssertionError]),
        (errors.ContextError, [AssertionError]),
        (errors.InputError, [AssertionError]),
        (errors.ChainError, [RuntimeError]),
        (errors.AdapterError, [ValueError, RuntimeError]),
        (errors.AdapterTypeError, [AssertionError]),
        (errors.ConversionError, [ValueError]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_an_error_of_ours_is_also_the_builtin_one_expects(error: type, builtins: list[type]) -> None:
    assert issubclass(error, errors.RefinersError)
    assert all(issubclass(error, builtin) for builtin in builtins)


def test_an_error_shows_its_lines_as_lines() -> None:
    assert str(errors.TreeKeyError("one\ntwo")) == "one\ntwo"
