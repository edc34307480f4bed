"""One short table that turns upstream's weights into the port's, and back, to the last bit.

A port's modules are named by the tree, upstream's by its attributes. The two state dicts hold the same numbers under
other names, now and then fused, cut or transposed. A `KeyMap` says how, one line for each kind of weight:

    KeyMap(
        {
            "embeddings.word_embeddings": "Embeddings.TokenEmbedding",
            "encoder.layer.{i}.output.dense": "TransformerLayer_{i+1}.FeedForward.Linear_2",
            "encoder.layer.{i}.attn.c_attn": Split("Layer_{i+1}.Query", "Layer_{i+1}.Key", "Layer_{i+1}.Value"),
        },
        ignore={"embeddings.position_ids": "0, 1, 2, …: the port counts by itself"},
        aliases={"bert.{rest}": "{rest}"},
    )

Every upstream tensor is used once and every port tensor is filled once, or one error lists all that do not fit.
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import Tensor, nn

from refiners.conversion.pairing import Pairing, Plan, Planner
from refiners.conversion.problems import Problems
from refiners.conversion.rules import Rule
from refiners.conversion.table import Lines, Reason, Table, UpstreamKey
from refiners.conversion.transfer import check_upstream, recomputed, transfer
from refiners.conversion.weights import Entries, Weights
from refiners.errors import ConversionError

K = TypeVar("K")
V = TypeVar("V")

_ADVICE = (
    "Nothing was converted. Check that the weights and the configuration are those of this model; a key that moved "
    "needs a line or an alias in the key map, one that the port does not need an `ignore` with its reason."
)

_ALREADY = "Nothing was converted. These are the port's own keys already: load them as they are."


class KeyMap:
    """The correspondence between upstream's state dict and a port's, in both directions.

    Patterns are explained in `refiners.conversion.patterns`; a pattern covers every key below it. A port segment
    `Name_{i+1}` also stands for `Name`, the name a Chain gives to an only child.

    Receives:
        lines: upstream pattern to port pattern, or to a rule (`Split`, `Merge`, `Transpose`, `Squeeze`, …). The key of
            a `Merge` is a tuple of upstream patterns.
        ignore: upstream patterns that the port does not need, each with the reason. A `Recomputed` also checks the
            bytes and makes them again in `invert`; the others are left out there.
        aliases: other spellings of upstream keys, such as `{"text_model.{rest}": "{rest}"}`.
        tied: upstream keys that repeat another one, such as `{"lm_head.weight": "embed_tokens.weight"}`. They may be
            there or not; when they are, their bits have to be the same.
        name: what is converted, for the error messages.

    Raises:
        ConversionError: a pattern or a line that cannot be used.

    Example:
        >>> import torch
        >>> key_map = KeyMap({"layers.{i}.fc": "Layer_{i+1}.Linear"})
        >>> key_map.convert({"layers.0.fc.weight": torch.ones(1)}, {"Layer.Linear.weight": (1,)})
        {'Layer.Linear.weight': tensor([1.])}
    """

    def __init__(
        self,
        lines: Lines,
        *,
        ignore: Mapping[str, Reason] | None = None,
        aliases: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        name: str = "the weights",
    ) -> None:
        self.lines: dict[UpstreamKey, str | Rule] = dict(lines.items())
        self.ignore = dict(ignore or {})
        self.aliases = dict(aliases or {})
        self.tied = dict(tied or {})
        self.name = name
        self._table = Table(self.lines, self.ignore, self.aliases, self.tied)

    def convert(self, state_dict: Mapping[str, Tensor], target: Weights) -> dict[str, Tensor]:
        """The port's state dict made of upstream's, in the order of the target. Dtypes stay; renames copy nothing.

        Receives:
            state_dict: upstream's tensors, on any device, `meta` included.
            target: the port, or its keys with tensors or shapes.

        Returns:
            one tensor for each key of the target, sharing its storage with upstream's where the rule allows it.

        Raises:
            ConversionError: anything is missing, unexpected, of another shape or given twice. Lists it all.
        """
        given, wanted = self._given(state_dict), Entries.read(target)
        plan, tensors = self._convert(given, wanted)
        converted = given.tensors.keys() == wanted.tensors.keys()
        plan.problems.raise_if_any(f"{self.name} cannot be converted", _ALREADY if converted else _ADVICE)
        return tensors

    def invert(self, state_dict: Mapping[str, Tensor], source: Weights | None = None) -> dict[str, Tensor]:
        """Upstream's state dict made of the port's: the exact inverse of `convert`.

        Receives:
            state_dict: the port's tensors: its weights, or their gradients.
            source: the upstream model, or its keys with tensors or shapes. Without it the keys are those of the table.

        Returns:
            one tensor for each key of the source, in its order; keys that are ignored without being recomputed
            are left out.

        Raises:
            ConversionError: anything is missing, unexpected, of another shape or given twice. Lists it all.
        """
        given = self._given(state_dict)
        wanted = None if source is None else Entries.read(source)
        keys = self._upstream_keys(given.tensors) if wanted is None else wanted.tensors
        plan = Planner(self._table, keys, given.tensors, port_ties=given.ties).run()
        tensors = transfer(plan, given, wanted, to_port=False)
        if wanted is not None:
            tensors |= recomputed(plan, wanted)
        tensors |= {key: tensors[original] for key, original in plan.tied.items() if original in tensors}
        plan.problems.raise_if_any(f"{self.name} cannot be converted back", _ADVICE)
        return {key: tensors[key] for key in keys if key in tensors}

    def problems(self, state_dict: Weights, target: Weights) -> Problems:
        """Everything that keeps `convert` from working, empty when it works. Raises nothing of it."""
        plan, _ = self._convert(Entries.read(state_dict), Entries.read(target))
        return plan.problems

    def check_shapes(self, upstream: Weights, port: Weights) -> None:
        """Checks keys and shapes of both sides without touching a value: for full-size models on `meta`.

        Raises:
            ConversionError: as `convert`.
        """
        self.plan(upstream, port)

    def plan(self, upstream: Weights, port: Weights) -> Plan:
        """What goes where, checked as `check_shapes` does: what a conversion tensor by tensor follows.

        Raises:
            ConversionError: as `convert`.
        """
        return self.plan_and_convert(Entries.read(upstream).on_meta(), Entries.read(port).on_meta())[0]

    def plan_and_convert(self, given: Entries, wanted: Entries) -> tuple[Plan, dict[str, Tensor]]:
        """What goes where, and the port's tensors made of those given, which may be on the meta device.

        Raises:
            ConversionError: as `convert`.
        """
        plan, tensors = self._convert(given, wanted)
        converted = given.tensors.keys() == wanted.tensors.keys()
        plan.problems.raise_if_any(f"{self.name} cannot be converted", _ALREADY if converted else _ADVICE)
        return plan, tensors

    def covers(self, upstream: Collection[str]) -> bool:
        """Whether each of these upstream keys has a line or a reason to be ignored: whether they are of this layout.

        Example:
            >>> KeyMap({"fc": "Linear"}).covers(["fc.weight"]), KeyMap({"fc": "Linear"}).covers(["conv.weight"])
            (True, False)
        """
        return all(self._table.upstream.find(self._table.canonical(key)) for key in upstream)

    def source_of(self, port: str) -> str | None:
        """The upstream key that becomes this key of the port unchanged; None when none does, or a rule changes it.

        Example:
            >>> KeyMap({"layers.{i}.fc": "Layer_{i+1}.Linear"}).source_of("Layer_2.Linear.weight")
            'layers.1.fc.weight'
        """
        return self._table.source_of(port)

    def pairs(self, upstream: Weights | Collection[str], port: Weights) -> list[Pairing]:
        """Which upstream tensors hold the numbers of which port tensors, with the rule between them.

        Receives:
            upstream: the upstream model, its state dict, or its keys only.
            port: the port, or its keys with tensors or shapes.

        Raises:
            ConversionError: a key of either side is in no pair and is not ignored.
        """
        keys = list(upstream.state_dict()) if isinstance(upstream, nn.Module) else list(upstream)
        entries = Entries.read(port)
        plan = Planner(self._table, keys, entries.tensors, port_ties=entries.ties).run()
        plan.problems.raise_if_any(f"{self.name} cannot be paired", _ADVICE)
        return plan.pairings

    def under(self, upstream: str = "", port: str = "") -> "KeyMap":
        """This map for the same model nested in another one.

        Receives:
            upstream: the prefix of its keys in the state dict of the outer upstream model, "" for none.
            port: the path of the port in the outer tree, "" for none.

        Example:
            >>> tower = KeyMap({"fc": "Linear"})
            >>> tower.under(upstream="text_model", port="TextEncoder").lines
            {'text_model.fc': 'TextEncoder.Linear'}
        """

        def outer(key: str) -> str:
            return f"{upstream}.{key}" if upstream else key

        def inner(key: str) -> str:
            return f"{port}.{key}" if port else key

        lines: dict[UpstreamKey, str | Rule] = {
            outer(key) if isinstance(key, str) else tuple(map(outer, key)): (
                inner(value) if isinstance(value, str) else value.retarget(inner)
            )
            for key, value in self.lines.items()
        }
        return KeyMap(
            lines,
            ignore={outer(key): reason for key, reason in self.ignore.items()},
            aliases={outer(key): outer(value) for key, value in self.aliases.items()},
            tied={outer(key): outer(value) for key, value in self.tied.items()},
            name=self.name,
        )

    def named(self, name: str) -> "KeyMap":
        """The same map with another name in its error messages."""
        return KeyMap(self.lines, ignore=self.ignore, aliases=self.aliases, tied=self.tied, name=name)

    def __or__(self, other: "KeyMap") -> "KeyMap":
        """The lines of both maps: of two towers of a model, or of a model and what is built on it.

        Raises:
            ConversionError: they say different things about the same upstream pattern.
        """
        return KeyMap(
            _union(self.lines, other.lines),
            ignore=_union(self.ignore, other.ignore),
            aliases=_union(self.aliases, other.aliases),
            tied=_union(self.tied, other.tied),
            name=self.name,
        )

    def __repr__(self) -> str:
        return f"KeyMap({self.name!r}, {len(self.lines)} lines, {len(self.ignore)} ignored)"

    def _given(self, state_dict: Mapping[str, Tensor]) -> Entries:
        entries = Entries.read(state_dict)
        if entries.only_shapes:
            raise ConversionError(
                f"{self.name}: {len(entries.only_shapes)} entries, {min(entries.only_shapes)!r} first, are shapes. "
                "Give tensors, or call check_shapes() to compare shapes only."
            )
        return entries

    def _convert(self, given: Entries, wanted: Entries) -> tuple[Plan, dict[str, Tensor]]:
        plan = Planner(self._table, given.tensors, wanted.tensors, port_ties=wanted.ties, given_ties=given.ties).run()
        tensors = transfer(plan, given, wanted, to_port=True)
        check_upstream(plan, given)
        return plan, tensors

    def _upstream_keys(self, port: Collection[str]) -> list[str]:
        keys = [key for name in port for key in self._table.expected_upstream(name)]
        return list(dict.fromkeys(keys))


def _union(one: Mapping[K, V], other: Mapping[K, V]) -> dict[K, V]:
    different = [key for key, value in other.items() if key in one and one[key] != value]
    if different:
        raise ConversionError(
            f"Two key maps say different things about {', '.join(map(repr, different))}. Put each under a prefix with "
            "under(), or take the line out of one of them."
        )
    return {**one, **other}
