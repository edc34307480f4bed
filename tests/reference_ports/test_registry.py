import subprocess
import sys

import pytest
import torch

import reference_ports
from refiners.conversion import Port

PORTS = reference_ports.PORTS()


def test_importing_the_package_imports_no_family() -> None:
    code = (
        "import sys, reference_ports; assert not [name for name in sys.modules if name.startswith('reference_ports.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", PORTS)
def test_a_port_is_built_on_meta_and_takes_the_keys_of_its_map(name: str) -> None:
    port: Port = PORTS[name]
    with torch.device("meta"):
        model = port.build()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    upstream = port.key_map.invert(model.state_dict())
    assert list(port.key_map.convert(upstream, model)) == list(model.state_dict())
