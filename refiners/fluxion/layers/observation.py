"""Who watches the calls of modules.

PyTorch has no public names for what `Module.__call__` itself looks at before it decides to call `forward` directly, so
this file, and no other, reads the private ones.
"""
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from torch import compiler, nn
from torch._C import _get_tracing_state
from torch.autograd import profiler
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import _StopRecomputationError

from refiners.errors import ChainError

MODULE_CALL = nn.Module.__call__

# Exceptions that no Chain explains: an inner one has done so already, torch's checkpointing stops a forward half-way on
# purpose, and a stack that is full has no room for an explanation.
PASS_THROUGH = (ChainError, _StopRecomputationError, RecursionError)


def calls_are_observed() -> bool:
    """Whether somebody watches calls of modules, so that each must go through `Module.__call__`.

    Otherwise a Chain calls `forward` of its children directly, as `Module.__call__` itself does when there is no hook.
    Each Chain asks in each forward, so this calls as little as it can: `_is_compiling_flag` is `is_compiling()`.
    """
    return bool(
        torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
        or nn.Module.__call__ is not MODULE_CALL
        or profiler._is_profiler_enabled
        or compiler._is_compiling_flag
        or _get_tracing_state()
    )
