import pytest
import torch
from torch.nn import functional

from refiners.errors import InputError
from refiners.fluxion.layers.activations import GLU, Activation, GeLU, GeLUApproximation, ReLU, Sigmoid, SiLU

REFERENCES = {
    "SiLU": (SiLU(), functional.silu),
    "ReLU": (ReLU(), functional.relu),
    "Sigmoid": (Sigmoid(), torch.sigmoid),
    "GeLU": (GeLU(), functional.gelu),
    "GeLU tanh": (GeLU(GeLUApproximation.TANH), lambda x: functional.gelu(x, approximate="tanh")),
    "GeLU sigmoid": (GeLU(GeLUApproximation.SIGMOID), lambda x: x * torch.sigmoid(1.702 * x)),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_activation_has_the_bits_of_its_reference(name: str, dtype: torch.dtype) -> None:
    activation, reference = REFERENCES[name]
    x = torch.randn(3, 40).to(dtype) * 4
    assert torch.equal(activation(x), reference(x))


def test_the_three_gelus_differ() -> None:
    x = torch.linspace(-3, 3, 50)
    outputs = [GeLU(approximation)(x) for approximation in GeLUApproximation]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[1], outputs[2])


def test_gelu_takes_its_approximation_by_name_too() -> None:
    assert GeLU("tanh").approximation is GeLUApproximation.TANH  # type: ignore[arg-type]  what a config would hold
    with pytest.raises(ValueError, match="quick"):
        GeLU("quick")  # type: ignore[arg-type]  no such name


def test_the_tree_shows_the_approximation_of_a_gelu() -> None:
    assert str(GeLU()) == "GeLU()"
    assert str(GeLU(GeLUApproximation.SIGMOID)) == "GeLU(approximation=sigmoid)"


def test_glu_gates_the_first_half_by_the_activated_second() -> None:
    x = torch.randn(2, 5, 8)
    assert torch.equal(GLU(GeLU())(x), x[..., :4] * functional.gelu(x[..., 4:]))


def test_glu_refuses_an_odd_axis_and_names_its_size() -> None:
    with pytest.raises(InputError, match="size 3"):
        GLU(SiLU())(torch.randn(2, 3))
    with pytest.raises(AssertionError):
        GLU(SiLU())(torch.randn(2, 7))


def test_activation_is_abstract() -> None:
    with pytest.raises(TypeError, match="forward"):
        Activation()  # type: ignore[abstract]  the point of the test
