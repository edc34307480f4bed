"""The shapes that leaves and utilities announce in their annotations are those of their inputs and outputs.

jaxtyping checks annotations as modules are imported, so this runs in a Python of its own.
"""

import subprocess
import sys

PROGRAM = """
import torch
from jaxtyping import TypeCheckError, install_import_hook

leaves = "activations attentions basics conv converter embedding linear norm padding pixelshuffle pooling sampling"
checked = ["refiners.fluxion.utils", *(f"refiners.fluxion.layers.{leaf}" for leaf in leaves.split())]
with install_import_hook(checked, "beartype.beartype"):
    import refiners.fluxion.layers as fl
    from refiners.fluxion.utils import gaussian_blur, norm, normalize, pad, summarize_tensor

sequence, image = torch.randn(2, 6, 8), torch.randn(2, 8, 6, 4)
for layer in (
    fl.SiLU(), fl.ReLU(), fl.Sigmoid(), fl.GeLU(), fl.GeLU(fl.GeLUApproximation.SIGMOID), fl.GLU(fl.GeLU()),
    fl.Identity(), fl.GetArg(0), fl.Flatten(1), fl.Reshape(-1), fl.Transpose(1, 2), fl.Permute(2, 0, 1),
    fl.Slicing(1, 2, 4), fl.Squeeze(0), fl.Unsqueeze(1), fl.Sin(), fl.Cos(), fl.Multiply(2.0), fl.Parameter(3, 4),
    fl.Linear(8, 3), fl.MultiLinear(8, 3, 5, 2), fl.LayerNorm(8), fl.MaxPool1d(2), fl.SelfAttention(8, num_heads=2),
    fl.Chain(fl.Converter(), fl.Linear(8, 3)),
):
    layer(sequence)
for layer in (
    fl.Conv2d(8, 3, 3), fl.ConvTranspose2d(8, 3, 2), fl.GroupNorm(8, 2), fl.LayerNorm2d(8), fl.InstanceNorm2d(8),
    fl.MaxPool2d(2), fl.ReflectionPad2d(1), fl.PixelUnshuffle(2), fl.Upsample(8, upsample_factor=2),
    fl.Downsample(8, scale_factor=2, register_shape=False), fl.SelfAttention2d(8, num_heads=2),
):
    layer(image)
fl.Embedding(5, 4)(torch.tensor([[1, 2]]))
fl.Unflatten(2)(sequence, (2, 4))
fl.Interpolate()(image, torch.Size([3, 5]))
fl.ScaledDotProductAttention(2, slice_size=4)(sequence, sequence[:, :3], sequence[:, :3, :6], torch.ones(6, 3))
gaussian_blur(image, 3)
norm(image)
normalize(image, [0.0] * 8, [1.0] * 8)
pad(image, (1, 1))
summarize_tensor(image)

try:
    fl.LayerNorm2d(8)(sequence)
except TypeCheckError:
    print("checked")
"""


def test_leaves_take_and_return_the_shapes_they_announce() -> None:
    run = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("checked\n", "")
