"""The files that `refiners parity new` writes, with `$name` where something is filled in."""

from string import Template

MODEL = Template('''"""$kind: say what it is, in the words of somebody who uses it.

Follows: the paper, with its arXiv number. Upstream: `$upstream`$version.

Differs from upstream:
- It is a draft of `refiners parity new`: no node does yet what upstream does between its modules.
"""

from typing import Unpack

${torch_imports}import refiners.fluxion.layers as fl

# Upstream's modules, to work from and then to delete:
#
$tree


$classes''')

CONVERT = Template('''"""Published weights and configurations of $kind, for the tree of `reference_ports.$family.model`.

The key map follows the state dict of `$upstream`$version.
"""

from collections.abc import Mapping
from typing import Any, Unpack

import refiners.fluxion.layers as fl
from reference_ports.$family.model import $root
from refiners.conversion import $from_conversion, ConfigReader, KeyMap, Port

KEYS = KeyMap(
    {
$lines
    },
${ignore}    name="$kind",
)
"""The keys of `$kind`, for `$root`."""

# Each of these is a number of the draft. Read it (`read.integer("…")`), give it to the tree as a parameter, and take it
# out of here; what cannot change the result goes into `neutral` with the reason.
_ONLY: dict[str, Any] = {
$base$only}


def from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> $root:
    """`$root` of the configuration of a `$kind`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    with ConfigReader(config, "$kind", only=_ONLY, neutral=${library}_NEUTRAL):
        pass
    return $root(**factory)


PORTS: Mapping[str, Port] = {
    port.name: port
    for port in (
        Port(
            name="$family",
            build=$root,
            key_map=KEYS,
            from_config=from_config,
            summary="a draft of $kind",
        ),
    )
}
''')

INIT = Template('''"""$kind. See README.md beside this file."""

from reference_ports.$family.convert import KEYS, PORTS, from_config
from reference_ports.$family.model import $root

__all__ = ["KEYS", "PORTS", "$root", "from_config"]
''')

README = Template("""# $kind

Say what it is. Papers: with their arXiv numbers.

| port | upstream ($upstream_module$version) | returns |
|---|---|---|
| `$root` | `$kind` | |

## Knobs

| knob | how | default |
|---|---|---|

## Differs from upstream

## Proof

`nox -s parity -- -k $family` compares it with upstream, bit for bit, forward and gradients, in float64, float32,
bfloat16 and float16: `parity_tests/cases/$family.py`.
""")

CASES = Template('''"""$kind: `$upstream` beside `reference_ports.$family`."""

from collections.abc import Mapping
from typing import Any

import torch
$imports

from reference_ports import $family
from refiners.parity import Case, with_both_inits

CONFIG: dict[str, Any] = $config


def inputs(generator: torch.Generator) -> Mapping[str, Any]:
    """Random inputs: small, and no two axes of one length."""
    return {
$inputs
    }


def run_upstream(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
    output = model(**inputs)
    return {"output": output if isinstance(output, Tensor) else output[0]}


def run_port(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
    return {"output": model(*inputs.values())}


CASES = with_both_inits(
    Case(
        id="$family/tiny",
        summary="a draft",
        upstream=lambda: $upstream_call,
        port=$family.$root,
        key_map=$family.KEYS,
        inputs=inputs,
        run_upstream=run_upstream,
        run_port=run_port,
    )
)
''')
