import torch
from torch import nn

from refiners.parity.environment import origin_of


class Wrapper(nn.Module):
    upstream_package = "torch"


def test_a_model_comes_from_the_package_of_its_class() -> None:
    assert origin_of(nn.Linear(1, 1)) == f"torch {torch.__version__}"


def test_a_module_that_holds_what_is_upstreams_names_the_package() -> None:
    assert origin_of(Wrapper()) == f"torch {torch.__version__}"
