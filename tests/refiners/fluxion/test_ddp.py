"""DistributedDataParallel wraps a Chain: two processes, gloo, CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import refiners.fluxion.layers as fl


class Model(fl.Chain):
    def __init__(self):
        super().__init__(
            fl.Linear(4, 4),
            fl.SetContext("own", "first"),
            fl.Residual(fl.Linear(4, 4), fl.Sum(fl.Identity(), fl.UseContext("own", "first"))),
            fl.Sum(fl.Identity(), fl.UseContext("outside", "embedding")),
        )

    def init_context(self):
        return {"own": {"first": None}}


rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(rank)  # DDP has to give both the weights of rank 0
chain = Model()
chain.append(fl.Linear(4, 2))
chain.set_context("outside", {"embedding": torch.ones(4)})
model = DistributedDataParallel(chain)
generator = torch.Generator().manual_seed(3)
data = torch.randn(8, 4, generator=generator)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = model(data[rank::2]).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
weights = {name: value.double().sum().item() for name, value in chain.state_dict().items()}
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({"weights": weights, "losses": losses, "names": list(model.state_dict())}, file)
dist.destroy_process_group()
"""


def test_two_processes_train_a_chain_to_the_same_weights(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"]
    assert first["losses"] != second["losses"]
    assert first["losses"][-1] < first["losses"][0]
    assert first["names"][:2] == ["module.Linear_1.weight", "module.Linear_1.bias"]
