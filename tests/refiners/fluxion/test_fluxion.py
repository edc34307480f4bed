import subprocess
import sys

import refiners.fluxion
from refiners.fluxion import utils


def test_fluxion_re_exports_the_utilities_that_everybody_needs() -> None:
    assert refiners.fluxion.__all__ == ["load_from_safetensors", "manual_seed", "norm", "pad", "save_to_safetensors"]
    assert all(getattr(refiners.fluxion, name) is getattr(utils, name) for name in refiners.fluxion.__all__)


def test_importing_the_layers_imports_nothing_heavy() -> None:
    heavy = {"PIL", "rich", "typer", "torch._dynamo", "torch._inductor", "torch.onnx", "IPython"}
    program = (
        "import sys, torch; before = set(sys.modules); import refiners.fluxion.layers; "
        f"print(sorted({heavy!r} & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
