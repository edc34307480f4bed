"""Training LoRAs: five steps beside peft on MiniLM's real weights, ways to train, and a file that peft reads back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

from parity_tests import train_lora
from parity_tests.published import minilm_directory
from reference_ports.bert import SENTENCE_ENCODER_KEYS, SentenceEncoder, minilm_l6
from reference_ports.bert.model import TransformerLayer
from reference_ports.blocks.attention import SelfAttention
from refiners.conversion import read_state_dict
from refiners.conversion.loras import write_loras
from refiners.fluxion import layers as fl
from refiners.fluxion.adapters import inject_checkpoints, inject_loras, trainable
from refiners.fluxion.adapters.lora import LoraSet
from refiners.fluxion.selectors import select
from refiners.parity.bits import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
STEPS, RANK, ALPHA = 5, 4, 8
CONFIG = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["query", "key", "value", "attention.output.dense"])


class UpstreamEncoder(nn.Module):
    """transformers' BertModel with the mean pooling and the normalisation of sentence-transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).expand(states.shape).to(states.dtype)
        pooled = torch.sum(states * weights, dim=1) / torch.clamp(weights.sum(dim=1), min=1e-9)
        return functional.normalize(pooled, p=2, dim=1)


def ours(dtype: torch.dtype) -> SentenceEncoder:
    model = minilm_l6(device="meta")
    weights = read_state_dict(minilm_directory() / "model.safetensors")
    model.load_state_dict(SENTENCE_ENCODER_KEYS.convert(weights, model), assign=True)
    return model.to(dtype=dtype)


def theirs(dtype: torch.dtype) -> nn.Module:
    return BertModel.from_pretrained(minilm_directory(), attn_implementation="sdpa", dtype=dtype).eval()


class Pair:
    """MiniLM with the same LoRAs on both sides, and a batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.port, upstream = ours(dtype), get_peft_model(theirs(dtype), CONFIG)
        self.upstream = UpstreamEncoder(upstream)
        for name, weight in upstream.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.02)
        layers = select(self.port).of(fl.Linear).inside(SelfAttention).expect(24)
        self.loras = inject_loras(layers, name="task", rank=RANK, alpha=ALPHA)
        self.loras.swap(specs_of(upstream, self.loras))
        self.ids = torch.randint(1000, 20000, (4, 12))
        self.mask = torch.ones(4, 12, dtype=torch.long)
        self.mask[1, 7:] = 0
        self.goal = functional.normalize(torch.randn(4, 384, dtype=dtype), dim=1)

    def port_loss(self, rows: slice = slice(None)) -> Tensor:
        self.port.set_attention_mask(self.mask[rows])
        return (self.port(self.ids[rows]) - self.goal[rows]).square().sum()

    def upstream_loss(self, rows: slice = slice(None)) -> Tensor:
        return (self.upstream(self.ids[rows], self.mask[rows]) - self.goal[rows]).square().sum()

    @property
    def upstream_parameters(self) -> list[nn.Parameter]:
        return [weight for weight in self.upstream.parameters() if weight.requires_grad]


def specs_of(upstream: nn.Module, loras: LoraSet) -> dict[str, Any]:
    """The weights that peft has drawn, for the layers of the port: peft lists layers in the order of the tree."""
    states = {name: weight for name, weight in upstream.named_parameters() if "lora_" in name}
    downs = [weight for name, weight in states.items() if "lora_A" in name]
    ups = [weight for name, weight in states.items() if "lora_B" in name]
    specs = loras.specs()
    assert len(downs) == len(ups) == len(specs)
    return {
        path: replace(spec, tensors={"down": down.detach().clone(), "up": up.detach().clone()})
        for (path, spec), down, up in zip(specs.items(), downs, ups, strict=True)
    }


def five_steps(parameters: Any, loss_of: Callable[[], Tensor]) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_five_steps_of_adamw_are_those_of_peft() -> None:
    pair = Pair(torch.float64)
    with trainable(pair.loras) as training:
        losses = five_steps(training.parameters(), pair.port_loss)
    expected = five_steps(pair.upstream_parameters, pair.upstream_loss)
    assert losses == expected
    assert losses[-1] < losses[0]
    weights = [tensor for spec in pair.loras.specs().values() for tensor in spec.tensors.values()]
    trained = [weight.detach() for weight in pair.upstream_parameters]
    assert [same_bits(one, other) for one, other in zip(weights, trained, strict=True)] == [True] * len(trained)


@contextmanager
def checkpointed(pair: Pair) -> Iterator[None]:
    checkpoints = inject_checkpoints(select(pair.port).of(TransformerLayer))
    yield
    checkpoints.eject()


WAYS: dict[str, Callable[[Pair], Any]] = {
    "plain": lambda _: nullcontext(),
    "checkpointed": checkpointed,
    "autocast": lambda _: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_a_way_to_train_are_those_of_peft(way: str) -> None:
    pair = Pair(torch.float32)
    expected_way = WAYS[way](pair) if way == "autocast" else nullcontext()
    with trainable(pair.loras) as training, WAYS[way](pair):
        parameters = list(training.parameters())
        for rows in (slice(2), slice(2, 4)):  # gradients of two halves add up
            pair.port_loss(rows).backward()
    with expected_way:
        for rows in (slice(2), slice(2, 4)):
            pair.upstream_loss(rows).backward()
    pairs = list(zip(parameters, pair.upstream_parameters, strict=True))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
    assert [same_bits(one.grad, other.grad) for one, other in pairs] == [True] * len(pairs)
    assert [
        name for name, weight in pair.port.named_parameters() if "Lora" not in name and weight.grad is not None
    ] == []


def test_what_was_trained_here_predicts_the_same_in_peft(tmp_path: Path) -> None:
    model, tokenizer = train_lora.load()
    task = train_lora.read_task(tokenizer, at_most=2)
    before = task.predict(model)
    loras = train_lora.train(model, task, steps=2)
    after = task.predict(model)
    write_loras(tmp_path, loras.specs(), model, layout="peft")
    upstream = UpstreamEncoder(PeftModel.from_pretrained(theirs(torch.float32), str(tmp_path)).eval())
    with torch.no_grad():
        vectors = upstream(task.asked.ids, task.asked.mask)
        names = upstream(task.names.ids, task.names.mask)
    assert torch.equal((vectors @ names.T).argmax(dim=1), after)
    assert not torch.equal(before, after)
    loras.eject()
    assert torch.equal(task.predict(model), before)
