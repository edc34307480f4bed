"""All layers, by the idiom `import refiners.fluxion.layers as fl`."""

from refiners.fluxion.layers.activations import GLU, Activation, GeLU, GeLUApproximation, ReLU, Sigmoid, SiLU
from refiners.fluxion.layers.adapter import Adapter, lookup_top_adapter
from refiners.fluxion.layers.attentions import Attention, ScaledDotProductAttention, SelfAttention, SelfAttention2d
from refiners.fluxion.layers.basics import (
    Cos,
    Flatten,
    GetArg,
    Identity,
    Multiply,
    Parameter,
    Permute,
    Reshape,
    Sin,
    Slicing,
    Squeeze,
    Transpose,
    Unflatten,
    Unsqueeze,
)
from refiners.fluxion.layers.chain import Chain, ChainError
from refiners.fluxion.layers.combinators import Concatenate, Distribute, Matmul, Parallel, Passthrough, Residual, Sum
from refiners.fluxion.layers.context_access import SetContext, UseContext
from refiners.fluxion.layers.conv import Conv2d, ConvTranspose2d
from refiners.fluxion.layers.converter import Converter
from refiners.fluxion.layers.embedding import Embedding
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.functions import Breakpoint, Lambda, Return
from refiners.fluxion.layers.linear import Linear, MultiLinear
from refiners.fluxion.layers.module import ContextModule, Module, ModuleTree, WeightedModule
from refiners.fluxion.layers.norm import GroupNorm, InstanceNorm2d, LayerNorm, LayerNorm2d
from refiners.fluxion.layers.padding import ReflectionPad2d
from refiners.fluxion.layers.pixelshuffle import PixelUnshuffle
from refiners.fluxion.layers.pooling import MaxPool1d, MaxPool2d
from refiners.fluxion.layers.sampling import Downsample, Interpolate, Upsample

__all__ = [
    "GLU",
    "Activation",
    "Adapter",
    "Attention",
    "Breakpoint",
    "Chain",
    "ChainError",
    "Concatenate",
    "ContextModule",
    "Conv2d",
    "ConvTranspose2d",
    "Converter",
    "Cos",
    "Distribute",
    "Downsample",
    "Embedding",
    "Factory",
    "Flatten",
    "GeLU",
    "GeLUApproximation",
    "GetArg",
    "GroupNorm",
    "Identity",
    "InstanceNorm2d",
    "Interpolate",
    "Lambda",
    "LayerNorm",
    "LayerNorm2d",
    "Linear",
    "Matmul",
    "MaxPool1d",
    "MaxPool2d",
    "Module",
    "ModuleTree",
    "MultiLinear",
    "Multiply",
    "Parallel",
    "Parameter",
    "Passthrough",
    "Permute",
    "PixelUnshuffle",
    "ReLU",
    "ReflectionPad2d",
    "Reshape",
    "Residual",
    "Return",
    "ScaledDotProductAttention",
    "SelfAttention",
    "SelfAttention2d",
    "SetContext",
    "SiLU",
    "Sigmoid",
    "Sin",
    "Slicing",
    "Squeeze",
    "Sum",
    "Transpose",
    "Unflatten",
    "Unsqueeze",
    "Upsample",
    "UseContext",
    "WeightedModule",
    "lookup_top_adapter",
]
