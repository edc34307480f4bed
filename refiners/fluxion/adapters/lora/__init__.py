"""LoRA: a layer learns a change of low rank, beside weights that stay as they are (arXiv 2106.09685).

A `Lora` is the change alone: it leads down to `rank` values and up again, and is multiplied by a scale. A `LoraAdapter`
is the sum of a layer and of its LoRAs; injected, it stands in the place of the layer:

    (SUM) LoraAdapter()
    ├── Linear(in_features=768, out_features=768, …)
    └── (CHAIN) LinearLora(name=style, in_features=768, out_features=768, rank=4)
        ├── Linear(in_features=768, out_features=4, bias=False, …)
        ├── Linear(in_features=4, out_features=768, bias=False, …)
        └── Multiply(scale=0.5)

Other methods change the layer otherwise, and stand in the same place; each is a `Delta`:

| method | what is added to the weight | layers | file |
|---|---|---|---|
| LoRA, arXiv 2106.09685 | s · up · down | Linear, Embedding, Conv1d to Conv3d | `base`, `kinds`, `conv` |
| DoRA, arXiv 2402.09353 | the same, and each row gets a length of its own | the same | `dora` |
| LoCon with a core, arXiv 2309.14859 | s · core ×₁ up ×₂ down | Conv1d to Conv3d | `locon` |
| LoHa, arXiv 2108.06098 | s · (w1_a w1_b) ∘ (w2_a w2_b) | Linear, Conv1d, Conv2d | `loha` |
| LoKr, arXiv 2309.14859 | s · w1 ⊗ w2 | Linear, Conv1d, Conv2d | `lokr` |

s is the scale, times alpha / rank with an alpha, or alpha / sqrt(rank) where it is rank-stabilised (arXiv 2312.03732).

`inject_loras` puts a whole set of them into a model in one call. The operations and their order are those of peft
0.21.2 (`peft.tuners.lora`, `loha` and `lokr`), unmerged and without dropout, so outputs and gradients are the same to
the last bit.

Differs from upstream: `down` of a convolution also takes over the dilation and the padding mode of its target, without
which it would have another size than the target, or other borders. `alpha` is optional; without it the scale alone
counts, and new weights of `down` are drawn from N(0, 1/rank) instead of a uniform distribution. A scale of 0 gives the
layer alone, to the last bit, and its weights get no gradient, where peft adds zeros. Where peft is wrong, `loha` and
`lokr` say so.
"""

from refiners.fluxion.adapters.lora.adapter import LoraAdapter
from refiners.fluxion.adapters.lora.attach import auto_attach_loras
from refiners.fluxion.adapters.lora.base import Lora
from refiners.fluxion.adapters.lora.combine import combine
from refiners.fluxion.adapters.lora.conv import Conv1dLora, Conv2dLora, Conv3dLora
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.adapters.lora.dora import Conv1dDora, Conv2dDora, Conv3dDora, Dora, EmbeddingDora, LinearDora
from refiners.fluxion.adapters.lora.fused import FusedLoras
from refiners.fluxion.adapters.lora.injected import inject_loras
from refiners.fluxion.adapters.lora.kinds import EmbeddingLora, LinearLora
from refiners.fluxion.adapters.lora.locon import Conv1dLocon, Conv2dLocon, Conv3dLocon, Locon
from refiners.fluxion.adapters.lora.loha import Conv1dLoha, Conv2dLoha, LinearLoha, Loha
from refiners.fluxion.adapters.lora.lokr import Conv1dLokr, Conv2dLokr, LinearLokr, Lokr
from refiners.fluxion.adapters.lora.samples import assign_samples
from refiners.fluxion.adapters.lora.sets import LoraSet, fuse, unfuse
from refiners.fluxion.adapters.lora.spec import DeltaSpec

__all__ = [
    "Conv1dDora",
    "Conv1dLocon",
    "Conv1dLoha",
    "Conv1dLokr",
    "Conv1dLora",
    "Conv2dDora",
    "Conv2dLocon",
    "Conv2dLoha",
    "Conv2dLokr",
    "Conv2dLora",
    "Conv3dDora",
    "Conv3dLocon",
    "Conv3dLora",
    "Delta",
    "DeltaSpec",
    "Dora",
    "EmbeddingDora",
    "EmbeddingLora",
    "FusedLoras",
    "LinearDora",
    "LinearLoha",
    "LinearLokr",
    "LinearLora",
    "Locon",
    "Loha",
    "Lokr",
    "Lora",
    "LoraAdapter",
    "LoraSet",
    "assign_samples",
    "auto_attach_loras",
    "combine",
    "fuse",
    "inject_loras",
    "unfuse",
]
