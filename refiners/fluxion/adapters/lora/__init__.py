"""LoRA: a layer learns a change of low rank, beside weights that stay as they are (arXiv 2106.09685).

A `Lora` is the change alone: it leads down to `rank` values and up again, and is multiplied by a scale. A `LoraAdapter`
is the sum of a layer and of its LoRAs; injected, it stands in the place of the layer:

    (SUM) LoraAdapter()
    ├── Linear(in_features=768, out_features=768, …)
    └── (CHAIN) LinearLora(name=style, in_features=768, out_features=768, rank=4)
        ├── Linear(in_features=768, out_features=4, bias=False, …)
        ├── Linear(in_features=4, out_features=768, bias=False, …)
        └── Multiply(scale=0.5)

`inject_loras` puts a whole set of them into a model in one call. The operations and their order are those of peft
0.21.2 (`peft.tuners.lora.layer`), unmerged and without dropout, so outputs and gradients are the same to the last bit.

Differs from upstream: `down` of a convolution also takes over the dilation and the padding mode of its target, without
which it would have another size than the target, or other borders. `alpha` is optional; without it the scale alone
counts, and new weights of `down` are drawn from N(0, 1/rank) instead of a uniform distribution.
"""

from refiners.fluxion.adapters.lora.adapter import LoraAdapter
from refiners.fluxion.adapters.lora.attach import auto_attach_loras
from refiners.fluxion.adapters.lora.base import Lora
from refiners.fluxion.adapters.lora.injected import LoraSet, inject_loras
from refiners.fluxion.adapters.lora.kinds import Conv2dLora, LinearLora

__all__ = [
    "Conv2dLora",
    "LinearLora",
    "Lora",
    "LoraAdapter",
    "LoraSet",
    "auto_attach_loras",
    "inject_loras",
]
