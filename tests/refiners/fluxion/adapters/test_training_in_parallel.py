"""LoRAs trained by two processes (gloo, CPU) learn what one process learns: under DDP, and under FSDP2."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from refiners.parity.rounding import agrees_in_float64, relative_error, typical_magnitude

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import refiners.fluxion.layers as fl
from refiners.fluxion.adapters import inject_loras, trainable


class Block(fl.Residual):
    def __init__(self):
        super().__init__(fl.Linear(6, 12), fl.GeLU(), fl.Linear(12, 6))


def losses_of(wrap, rows):
    torch.manual_seed(0)
    model = fl.Chain(Block(), Block(), fl.Linear(6, 3)).double()
    loras = inject_loras(model, name="style", rank=2, alpha=4)
    for lora in loras.loras:
        torch.nn.init.normal_(lora.up.weight, std=0.1)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    losses = []
    with trainable(loras) as training:
        wrapped = wrap(model)
        optimizer = torch.optim.AdamW(training.parameters() if wrap is not shard else loras.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (wrapped(x[rows]) - y[rows]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        frozen = [name for name, weight in model.named_parameters() if weight.grad is not None and "Lora" not in name]
    return losses, frozen


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in model.layers(Block):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
if rank < 0:
    told = {"alone": losses_of(lambda model: model, slice(None))}
else:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows = slice(rank, None, 2)
    told = {"ddp": losses_of(DistributedDataParallel, rows), "fsdp2": losses_of(shard, rows)}
    dist.destroy_process_group()
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(told, file)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, tuple[list[float], list[str]]]]:
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = (-1, 0, 1)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in ranks
    ]
    errors = [worker.communicate(timeout=200)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], "\n".join(errors)
    return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in ranks}


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_have_the_losses_of_one(
    way: str, told: dict[int, dict[str, tuple[list[float], list[str]]]]
) -> None:
    def numbers(rank: int, name: str) -> Tensor:
        return torch.tensor(told[rank][name][0], dtype=torch.float64)

    alone = numbers(-1, "alone")
    # Each has half of the batch, so the mean of their losses is the loss of the whole.
    together = (numbers(0, way) + numbers(1, way)) / 2
    assert agrees_in_float64(relative_error(together, alone, typical_magnitude(alone, gradient=False)))
    assert not torch.equal(numbers(0, way), numbers(1, way))
    assert alone[-1] < alone[0]


@pytest.mark.parametrize(("rank", "way"), [(-1, "alone"), (0, "ddp"), (0, "fsdp2")])
def test_only_loras_get_gradients(
    rank: int, way: str, told: dict[int, dict[str, tuple[list[float], list[str]]]]
) -> None:
    assert told[rank][way][1] == []
