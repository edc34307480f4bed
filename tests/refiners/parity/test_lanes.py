"""Everything that changes bits is held equal in a lane, and put back afterwards."""

import os
from typing import Any

import pytest
import torch
from torch import nn

from refiners.errors import ParityError
from refiners.parity.lanes import DTYPES, Lane, devices_of, held_equal, select_lanes
from refiners.parity.verdict import Verdict
from tests.refiners.parity.toys import Upstream, make_case, result_of


def global_state() -> dict[str, Any]:
    matmul = torch.backends.cuda.matmul
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "random": torch.get_rng_state().tolist(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "reduced": (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "environment": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "autocast": torch.is_autocast_enabled("cpu"),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_global_remains_changed(monkeypatch: pytest.MonkeyPatch, device: str, fails: bool) -> None:
    # The settings of the CUDA lane can be made without a card; only autocast asks for one.
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: torch.amp.autocast("cpu", enabled=enabled))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = global_state()
    try:
        with held_equal(Lane("float32", device), threads=1):
            torch.manual_seed(5)
            torch.randn(3)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert global_state() == before


def test_the_settings_hold_inside_whatever_they_were_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"), held_equal(Lane("float32")):
            assert torch.get_num_threads() == 1
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cudnn.benchmark
            assert not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_cuda_lane_uses_one_attention_kernel_and_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: torch.amp.autocast("cpu", enabled=enabled))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with held_equal(Lane("float32", "cuda")):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_lane_is_named_by_its_dtype_and_its_device() -> None:
    assert Lane("float32").name == "float32"
    assert Lane("bfloat16", "cuda").name == "bfloat16-cuda"
    assert [lane.name for lane in select_lanes(("float64", "float32"), None, ("cpu", "cuda"))] == [
        "float64",
        "float32",
        "float64-cuda",
        "float32-cuda",
    ]
    assert [lane.name for lane in select_lanes(("float64", "float32"), ["float32", "float16"])] == ["float32"]


def test_lanes_and_devices_that_do_not_exist_are_errors() -> None:
    with pytest.raises(ParityError, match="no lane 'float8'"):
        Lane("float8")
    with pytest.raises(ParityError, match="no lane 'int8'. Lanes are float64"):
        select_lanes(tuple(DTYPES), ["int8"])
    with pytest.raises(ParityError, match="no device 'tpu'"):
        devices_of("tpu")


def test_cuda_has_to_be_there_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParityError, match="torch sees no CUDA device"):
        devices_of("cuda")
    assert devices_of("all") == devices_of("cpu") == ("cpu",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices_of("all") == ("cpu", "cuda")
    assert devices_of("cuda") == ("cuda",)


class OfFloats(Upstream):
    """A weight that is float32 in each lane."""

    def __init__(self) -> None:
        super().__init__()
        self.up.weight = nn.Parameter(torch.FloatTensor(8, 8))


def test_weights_that_stay_float32_are_named_where_a_lane_cannot_run_with_them() -> None:
    reason = result_of(make_case(OfFloats, upstream=OfFloats)).reason
    assert reason.startswith("running upstream raised RuntimeError: ")
    assert "`up.weight` hold float32 whatever the default dtype is" in reason
    assert "let the case's builder end with `.to(torch.get_default_dtype())`" in reason
    mended = make_case(upstream=lambda: OfFloats().to(torch.get_default_dtype()))
    assert result_of(mended).verdict is Verdict.BITWISE
