"""LoRA, DoRA, LoHa and LoKr beside peft's: outputs and all gradients of models with injected adapters, in every lane.

Each case is an upstream model into which peft 0.21.2 has injected its unmerged layers, and the port with ours. All
weights are drawn by the engine, so no adapter is zero, and the weights of the base train too. `test_adapters` compares
every method at every kind of layer; here are whole models, and how adapters of several layers go together.
"""

from dataclasses import replace

import torch

from parity_tests.cases import bert, clip
from parity_tests.clip_runs import in_float32
from parity_tests.peft_models import EMBEDDINGS, LAYERS, LINEAR_LAYERS, NAMES, Spec, fused, with_loras

STACKED = (Spec(name="a", rank=4, alpha=3, scale=0.7), Spec(name="b", rank=8, alpha=20, scale=-1.3))
# As strong as LoRAs usually are: stronger ones let seven layers make much of few errors, whose ratio is then luck.
WEAK = tuple(replace(spec, scale=spec.scale / 20) for spec in STACKED)
DORAS = tuple(replace(spec, method="dora") for spec in STACKED)
LOHAS = tuple(replace(spec, method="loha", alpha=7) for spec in STACKED)  # scales that float32 rounds
LOKRS = (
    Spec(method="lokr", name="a", rank=1, alpha=3, options={"decompose_both": True}),
    Spec(method="lokr", name="b", rank=2, alpha=2, scale=0.7, options={"use_effective_conv2d": True}),
)
STABILIZED = (replace(STACKED[0], options={"use_rslora": True}), replace(STACKED[1], options={"lora_bias": True}))
CLIP = {case.id: case for case in clip.CASES}
# Pictures in float32: the patch encoder casts them, beside the LoRA of its convolution.
PICTURES = CLIP["clip/image-no-projection"]
PICTURES = replace(PICTURES, run_upstream=in_float32(PICTURES.run_upstream), run_port=in_float32(PICTURES.run_port))
HALVES = ("bfloat16", "float16")

CASES = (
    with_loras(LAYERS, "alpha-is-rank", Spec(alpha=4), targets=NAMES),
    with_loras(LAYERS, "stacked", *STACKED, targets=NAMES),
    fused(with_loras(CLIP["clip/text-l"], "stacked", *STACKED), "fused"),
    fused(with_loras(LAYERS, "weak", *WEAK, targets=NAMES), "fused"),
    with_loras(LAYERS, "stabilized-and-bias", *STABILIZED, targets=NAMES),
    with_loras(LAYERS, "dora", *DORAS, targets=NAMES),
    with_loras(LAYERS, "loha", *LOHAS, targets=NAMES),
    with_loras(LAYERS, "lokr", *LOKRS, targets=NAMES),
    # peft's own default for models in half precision: its weights are kept in float32.
    replace(with_loras(LAYERS, "float32-weights", *STACKED, targets=NAMES, dtype=torch.float32), lanes=HALVES),
    with_loras(bert.TINY_CASE, "embeddings", *STACKED, targets=[*LINEAR_LAYERS, *EMBEDDINGS]),
    with_loras(bert.TINY_CASE, "dora", *DORAS, targets=[*LINEAR_LAYERS, *EMBEDDINGS]),
    replace(with_loras(bert.TINY_CASE, "float32-weights", *STACKED, dtype=torch.float32), lanes=HALVES),
    with_loras(CLIP["clip/text-l"], "stacked", *STACKED),
    with_loras(CLIP["clip/text-finished-mask"], "stacked", *STACKED),
    with_loras(PICTURES, "stacked", *STACKED, targets=[*LINEAR_LAYERS, "patch_embedding"]),
)
