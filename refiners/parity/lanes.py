"""A lane: one dtype on one device, and everything that must be held equal for bits to be comparable.

Bits change although nothing is wrong with the number of threads, TF32, the attention kernel, autotuned convolutions
and non-deterministic reductions. `held_equal` fixes all of them for both sides and puts every one back afterwards.
"""

import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from refiners.errors import ParityError
from refiners.parity.torch_state import forked_random_state

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEVICES = ("cpu", "cuda")

# cuBLAS reads this when its first handle is made; without it its reductions are not deterministic.
_CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Lane:
    """A dtype on a device. Its name is the dtype's on the CPU, and `dtype-device` elsewhere."""

    dtype_name: str
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype_name not in DTYPES or self.device not in DEVICES:
            known = f"dtypes {', '.join(DTYPES)}; devices {', '.join(DEVICES)}"
            raise ParityError(f"There is no lane {self.dtype_name!r} on {self.device!r}. Known: {known}.")

    @property
    def name(self) -> str:
        """As it stands in ledgers, reports and test ids."""
        return self.dtype_name if self.device == "cpu" else f"{self.dtype_name}-{self.device}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and floating inputs."""
        return DTYPES[self.dtype_name]

    @property
    def is_truth(self) -> bool:
        """Whether this lane separates bugs from rounding by itself."""
        return self.dtype_name == "float64"


def devices_of(choice: str) -> tuple[str, ...]:
    """The devices a command line asks for: `cpu`, `cuda` or `all` (those present).

    Raises:
        ParityError: the device is unknown, or CUDA is asked for where there is none.
    """
    if choice == "all":
        return DEVICES if torch.cuda.is_available() else ("cpu",)
    if choice not in DEVICES:
        raise ParityError(f"There is no device {choice!r}. Use one of {', '.join(DEVICES)} or all.")
    if choice == "cuda" and not torch.cuda.is_available():
        raise ParityError("CUDA is asked for, but torch sees no CUDA device here. Use --device cpu or --device all.")
    return (choice,)


def select_lanes(
    declared: Sequence[str], wanted: Sequence[str] | None = None, devices: Sequence[str] = ("cpu",)
) -> list[Lane]:
    """The lanes of a case: the dtypes it declares, restricted to those wanted, on every device.

    Raises:
        ParityError: a wanted dtype does not exist.
    """
    for name in wanted or ():
        if name not in DTYPES:
            raise ParityError(f"There is no lane {name!r}. Lanes are {', '.join(DTYPES)}.")
    return [Lane(name, device) for device in devices for name in declared if wanted is None or name in wanted]


@contextmanager
def held_equal(lane: Lane, *, threads: int = 1) -> Generator[None, None, None]:
    """Fixes everything that changes bits without being a fault. All of it is restored on exit, also after an error.

    Receives:
        lane: where the two sides are about to run.
        threads: number of threads inside an operation, the same for both sides.
    """
    cuda = lane.device == "cuda"
    with ExitStack() as stack:
        stack.enter_context(forked_random_state(cuda=cuda))
        threads_before = torch.get_num_threads()
        stack.callback(lambda: torch.set_num_threads(threads_before))
        torch.set_num_threads(threads)
        _hold_precision(stack)
        _hold_determinism(stack, cuda)
        stack.enter_context(torch.autocast(device_type=lane.device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        if cuda:
            # Flash and memory-efficient kernels pick their algorithm by shape and card; MATH is the same everywhere.
            stack.enter_context(cast(AbstractContextManager[Any], sdpa_kernel([SDPBackend.MATH])))
        yield


def _hold(stack: ExitStack, owner: object, name: str, value: object) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _hold_precision(stack: ExitStack) -> None:
    """No TF32, no reductions in half: a float32 product is one of float32."""
    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("highest")
    _hold(stack, torch.backends.cudnn, "allow_tf32", False)
    matmul = torch.backends.cuda.matmul
    _hold(stack, matmul, "allow_tf32", False)
    _hold(stack, matmul, "allow_fp16_reduced_precision_reduction", False)
    _hold(stack, matmul, "allow_bf16_reduced_precision_reduction", False)


def _hold_determinism(stack: ExitStack, cuda: bool) -> None:
    _hold(stack, torch.backends.cudnn, "benchmark", False)
    _hold(stack, torch.backends.cudnn, "deterministic", True)
    if not cuda:
        return
    variable, value = _CUBLAS_WORKSPACE
    if variable not in os.environ:
        os.environ[variable] = value
        stack.callback(os.environ.pop, variable, None)
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    stack.callback(torch.use_deterministic_algorithms, was, warn_only=warned)
    # Some backward passes (bicubic resizing) have no deterministic kernel: the bits decide, not a refusal to run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
