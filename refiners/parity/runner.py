"""Running one case: build both sides, hand the weights over, compute, compare, say the verdict.

Whatever goes wrong on the way, on either side, ends in a `Result` with one line that says where; nothing a case does
can end the run of the others.
"""

import time
import warnings
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from refiners.errors import ParityError
from refiners.parity import influence, verdict, weights
from refiners.parity.case import Case
from refiners.parity.counted import elements_by_kind, with_errors
from refiners.parity.environment import origin_of
from refiners.parity.influence import Influence, some
from refiners.parity.inputs import draw_inputs, place_inputs
from refiners.parity.islands import widened
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.modules import modules
from refiners.parity.operations import Trace
from refiners.parity.pairing import Kind, Pair, pair_gradients, pair_outputs, truth_tensors
from refiners.parity.precision import Precision, look_at_precision
from refiners.parity.result import Result, Verdict
from refiners.parity.same_islands import WideTraces, trace_wide, unlike_islands
from refiners.parity.second_look import look_again
from refiners.parity.side import Observed, changed_weights, observe, weight_states
from refiners.parity.stages import StageError, in_one_line, of_other_dtypes, shown, stage
from refiners.parity.time_limit import TimeIsUp, time_limit
from refiners.parity.torch_state import default_dtype, seed_torch
from refiners.parity.verdict import Comparison
from refiners.parity.weights import Sharing


@dataclass
class _Compared:
    """All that a lane's result is made of."""

    upstream: nn.Module
    sides: tuple[Observed, Observed]
    sharing: Sharing
    comparisons: list[Comparison]
    faults: list[str]
    influence: Influence | None
    precision: Precision
    neutral: list[str]


class CaseRunner:
    """Runs a case in its lanes. Lanes of one case share its inputs and the verdict of its float64 lane.

    Receives:
        case: what to run.
        threads: number of threads inside an operation, the same on both sides.
        widened: compute islands of float32 in float64, see `refiners.parity.islands`.

    Example:
        ```py
        result = CaseRunner(case).run(Lane("float32"))
        ```
    """

    def __init__(self, case: Case, *, threads: int = 1, widened: bool = False) -> None:
        self.case = case
        self.threads = threads
        self.widened, self.may_widen = widened, True
        self._needs_widening: dict[str, bool] = {}
        self._wide_traces: WideTraces | None = None
        self._results: dict[Lane, Result] = {}
        self._inputs: dict[str, Any] | None = None
        self._values: Mapping[str, Tensor] | None = None
        self._looked_again = False

    def run(self, lane: Lane) -> Result:
        """The result of one lane; computed once."""
        if lane not in self._results:
            self._results[lane] = self._run(lane)
        return self._results[lane]

    def _run(self, lane: Lane) -> Result:
        started = time.perf_counter()
        label = ""
        try:
            with self._held(lane), time_limit(self.case.time_limit):
                with stage("drawing the inputs"):
                    self._inputs = draw_inputs(self.case) if self._inputs is None else self._inputs
                with stage("building upstream"):
                    upstream = self._upstream(lane)
                    label = origin_of(upstream)
                compared = self._compare(lane, upstream)
            with stage("judging"):
                result = self._judge(lane, compared)
        except StageError as failure:
            result = self._failed(lane, failure, label)
        except Exception as error:  # a setting of torch that cannot be read or changed
            result = self._failed(lane, StageError("preparing the lane", error), label)
        return replace(result, seconds=round(time.perf_counter() - started, 4))

    @contextmanager
    def _held(self, lane: Lane) -> Generator[None, None, None]:
        wide = widened() if self.widened else nullcontext()
        with held_equal(lane, threads=self.threads), default_dtype(torch.get_default_dtype()), wide:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield

    # Both sides

    def sides(self, lane: Lane) -> tuple[nn.Module, nn.Module, Sharing]:
        """Both sides as a run makes them: upstream with its weights, and the port that reads the same storages.

        For whoever runs them more than once, under `held_equal(lane)`.
        """
        self._inputs = draw_inputs(self.case) if self._inputs is None else self._inputs
        upstream = self._upstream(lane)
        return upstream, *self._port(lane, upstream)

    def look(self, lane: Lane, model: nn.Module, *, is_port: bool, gradients: bool) -> Observed:
        """What one of the `sides` computes, with the case's inputs and taps."""
        return self._observe(lane, model, lane.dtype, is_port=is_port, gradients=gradients)

    def _build(self, builder: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
        seed_torch(self.case.seed)
        with default_dtype(dtype):
            model = builder()
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # a third party's function
            raise ParityError(f"The builder must return a torch.nn.Module, got {type(model).__name__}.")
        found = {entry.tensor.dtype for entry in weights.floating_entries(model)}
        if found and dtype not in found:
            raise ParityError(
                f"The builder made weights of {', '.join(map(str, found))} under the default dtype {dtype}. "
                "Give no dtype in a builder: the engine sets the default one."
            )
        model.eval()
        return model

    def _upstream(self, lane: Lane) -> nn.Module:
        model = self._build(self.case.upstream, lane.dtype)
        weights.align(model)
        if self.case.weights is None and self.case.init == "informative":
            weights.fill_informative(model, self.case.seed)
        else:
            weights.fill_from(model, self._given_weights())
        return model.to(lane.device)

    def _given_weights(self) -> Mapping[str, Tensor]:
        if self._values is None:
            if self.case.weights is not None:
                self._values = self.case.weights()
            else:
                self._values = self._build(self.case.upstream, torch.float32).state_dict()
        return self._values

    def _port(self, lane: Lane, upstream: nn.Module) -> tuple[nn.Module, Sharing]:
        with stage("building the port"):
            port = self._build(self.case.port, lane.dtype).to(lane.device)
            if set(modules(port)) & set(modules(upstream)):
                raise ParityError("The port and upstream share modules: the port would be compared with itself.")
        with stage("converting the weights"):
            before = weight_states(upstream)
            sharing = weights.share(upstream, port, self.case.key_map)
            rewritten = changed_weights(before, upstream)
            if rewritten:
                raise ParityError(f"The key map writes into upstream's weights {some(rewritten)}. It has to copy them.")
            return port, sharing

    def _observe(
        self,
        lane: Lane,
        model: nn.Module,
        dtype: torch.dtype,
        *,
        is_port: bool,
        foreign: Collection[type[nn.Module]] = (),
        gradients: bool = True,
    ) -> Observed:
        assert self._inputs is not None
        paths = {path: path if is_port else other for path, other in self.case.taps.items()}
        rounded = place_inputs(self._inputs, lane.dtype, lane.device)
        return observe(
            model,
            self.case.run_port if is_port else self.case.run_upstream,
            place_inputs(rounded, dtype, lane.device),
            taps=paths,
            gradients=gradients and self.case.gradients,
            seed=self.case.seed,
            rounded_to=lane.dtype,
            foreign=foreign,
        )

    def _truth(self, lane: Lane, upstream: nn.Module, seen: Observed) -> Observed | None:
        """Upstream in float64 on this lane's rounded weights and inputs."""
        if "float64" not in self.case.lanes:
            return None
        return seen if lane.is_truth else self._in_float64(lane, upstream)

    def _in_float64(self, lane: Lane, upstream: nn.Module) -> Observed:
        with stage("running upstream in float64"):
            model = self._build(self.case.upstream, torch.float64).to(lane.device)
            weights.fill_from(model, upstream.state_dict())
        with stage("running upstream in float64", partial(of_other_dtypes, model, torch.float64)):
            return self._observe(lane, model, torch.float64, is_port=False)

    # Comparison

    def _compare(self, lane: Lane, upstream: nn.Module) -> _Compared:
        trained = {name for name, p in upstream.named_parameters(remove_duplicate=False) if p.requires_grad}
        # Before the port is built: a builder may patch what upstream calls.
        with stage("running upstream", partial(of_other_dtypes, upstream, lane.dtype)):
            ours = self._observe(lane, upstream, lane.dtype, is_port=False)
        port, sharing = self._port(lane, upstream)
        faults = _frozen(port, sharing, trained)
        with stage("running the port", partial(of_other_dtypes, port, lane.dtype)):
            foreign = {type(m) for m in modules(upstream) if not type(m).__module__.startswith("torch.")}
            theirs = self._observe(lane, port, lane.dtype, is_port=True, foreign=foreign)
        truth = self._truth(lane, upstream, ours)
        with stage("comparing"):
            pairs, unpaired = pair_outputs(ours, theirs)
            addresses = {tensor.untyped_storage().data_ptr() for tensor in upstream.state_dict().values()}
            faults = [*_side_faults(ours, theirs), *sharing.faults, *faults, *unpaired]
            faults += verdict.uninformative(pairs, addresses)
            found = None
            if self.case.gradients:
                untrained = ours.gradients.keys() - trained
                models = (upstream, port)
                gradients, unpaired = pair_gradients(ours, theirs, models, self.case.key_map, frozen=untrained)
                found = self._influence(lane, upstream, ours)
                pairs += gradients
                faults += [*unpaired, *found.faults, *_nothing_differentiable(ours)]
            neutral = influence.neutral({entry.key: entry.tensor for entry in weights.floating_entries(upstream)})
            if neutral and self.case.init == "informative" and self.case.weights is None:
                faults.append(f"{some(neutral)} hold one number everywhere, so nothing shows whether they are used")
            comparisons = _compare_all(pairs, truth, found)
        if not self._looked_again and _seems_equal(comparisons, faults, lane):
            self._looked_again = True
            with stage("looking again"):
                faults += look_again(self.case, lane, (upstream, port), (ours, theirs), self._inputs)
        with stage("comparing the precision"):
            models, given = (upstream, port), self._inputs or {}
            if self.widened and _seems_equal(comparisons, faults, lane):
                self._wide_traces = trace_wide(self.case, lane, models, given)
            dtypes = Precision() if faults or self.widened else look_at_precision(self.case, lane, models, given)
            unread = [key for key in dtypes.unread if not influence.counts_batches(port, key)]
            origins = weights.origins(unread, models, self.case.key_map)
            dtypes = replace(dtypes, unread=tuple(influence.never_read(origins, self.case.without_influence)))
        return _Compared(upstream, (ours, theirs), sharing, comparisons, faults, found, dtypes, neutral)

    def _influence(self, lane: Lane, upstream: nn.Module, ours: Observed) -> Influence:
        sizes = {name: parameter.numel() for name, parameter in upstream.named_parameters(remove_duplicate=False)}
        informative = self.case.weights is None and self.case.init == "informative"
        return influence.examine(
            ours.gradients,
            sizes,
            self.case.without_influence,
            buffers=[name for name, _ in upstream.named_buffers(remove_duplicate=False)],
            judge=informative and lane.is_truth,
        )

    def _judge(self, lane: Lane, compared: _Compared) -> Result:
        float64: Verdict | None = None
        if "float64" in self.case.lanes and not lane.is_truth and not all(c.bitwise for c in compared.comparisons):
            float64 = (wide := self.run(Lane("float64", lane.device))).besides_dtypes or wide.verdict
        needs_widening = self._needs_widening.get(lane.device, False)
        if float64 is Verdict.ROUNDING and needs_widening:
            compared.comparisons = self._against_wide_truth(lane, compared)
        decided, reasons = verdict.judge(compared.comparisons, compared.faults, lane, float64_verdict=float64)
        islands = compared.precision.islands if self.may_widen and not compared.faults else None
        if decided is Verdict.DIFFERENT and islands is not None:
            decided, reasons = self._with_islands_widened(lane, compared, islands, reasons)
        # Where the values differ as well, they come first: a cast that moved is one explanation among others.
        mismatches = (*compared.precision.faults, *compared.precision.unread)
        besides = decided if mismatches and not compared.precision.unread else None
        reasons = [*reasons, *mismatches] if decided is Verdict.DIFFERENT else [*mismatches, *reasons]
        decided = Verdict.DIFFERENT if mismatches else decided
        theirs = compared.sides[1]
        worst = [c.worst for c in compared.comparisons if c.worst]
        result = Result(
            case=self.case.id,
            lane=lane.name,
            verdict=decided,
            besides_dtypes=besides,
            reasons=tuple(reasons),
            notes=(*_notes(self.case, compared.sharing, compared.neutral), *compared.precision.notes),
            tensors=len(compared.comparisons),
            elements=sum(c.pair.upstream.numel() for c in compared.comparisons),
            elements_by_kind=elements_by_kind(compared.comparisons),
            leaves=len(theirs.leaves - theirs.silent_leaves),
            worst=worst[0] if worst else None,
            without_gradient=compared.influence.without_gradient if compared.influence else None,
            upstream=origin_of(compared.upstream),
        )
        return with_errors(result, compared.comparisons)

    # Islands of float32 in the float64 lane

    def _with_islands_widened(
        self, lane: Lane, compared: _Compared, islands: tuple[Trace, Trace], before: list[str]
    ) -> tuple[Verdict, list[str]]:
        """The verdict of the float64 lane where both sides have islands of float32, whose rounding is not float64's.

        `ROUNDING` needs closeness once the islands are computed in float64, islands of the same things, and, as they
        are, a port that is no further from that truth than upstream is.
        """
        again = CaseRunner(self.case, threads=self.threads, widened=True)
        again._inputs, again._values = self._inputs, self._values
        wide = again.run(lane)
        told = "with islands of float32 computed in float64 on both sides"
        if wide.verdict is Verdict.DIFFERENT:
            return Verdict.DIFFERENT, [*before, f"{told}: {wide.reason}"]
        comparisons = self._against_wide_truth(lane, compared)
        refusal = verdict.refusal_by_ratio(comparisons, torch.float32)
        if not refusal and again._wide_traces is not None:
            refusal = unlike_islands(islands, again._wide_traces, lane.dtype)
        if refusal:
            return Verdict.DIFFERENT, [*before, f"{told} both agree, but as they are {refusal}"]
        compared.comparisons = comparisons
        self._needs_widening[lane.device] = True
        return Verdict.ROUNDING, [f"{told} both agree: what differs is the rounding of float32", *before[1:]]

    def _against_wide_truth(self, lane: Lane, compared: _Compared) -> list[Comparison]:
        """The same comparisons, with errors against upstream without islands of float32."""
        with self._held(lane), widened():
            truth = self._in_float64(lane, compared.upstream)
        return _compare_all([c.pair for c in compared.comparisons], truth, compared.influence)

    def _failed(self, lane: Lane, failure: StageError, upstream: str) -> Result:
        error = failure.error
        if isinstance(error, TimeIsUp):
            error = error.as_error(self.case.time_limit)
        return Result(
            case=self.case.id,
            lane=lane.name,
            verdict=Verdict.DIFFERENT,
            reasons=(f"{failure.stage} raised {in_one_line(error)}{failure.hint}",),
            upstream=upstream,
            traceback=shown(error),
        )


def _compare_all(pairs: list[Pair], truth: Observed | None, found: Influence | None) -> list[Comparison]:
    right = truth_tensors(truth) if truth else {}

    def noise(pair: Pair) -> float | None:
        return found.magnitude if found and pair.kind is Kind.GRADIENT and pair.name in found.noise else None

    return [verdict.compare(p, right.get((p.kind, p.name)), noise_magnitude=noise(p)) for p in pairs]


def _seems_equal(comparisons: list[Comparison], faults: list[str], lane: Lane) -> bool:
    if not lane.is_truth:
        return not faults and all(c.bitwise for c in comparisons)
    return verdict.judge(comparisons, faults, lane, float64_verdict=None)[0] is not Verdict.DIFFERENT


def _side_faults(ours: Observed, theirs: Observed) -> list[str]:
    faults = [f"upstream: {fault}" for fault in ours.faults] + [f"the port: {fault}" for fault in theirs.faults]
    silent = sorted(theirs.silent_leaves)
    return [*faults, f"leaves of the port that never ran: {some(silent)}"] if silent else faults


def _frozen(port: nn.Module, sharing: Sharing, trained: Collection[str]) -> list[str]:
    """Weights that train upstream and not in the port. Looked at before the engine asks for every gradient."""
    return [
        f"the port's `{name}` has requires_grad=False, upstream's `{sharing.upstream_key[name]}` trains"
        for name, parameter in port.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and sharing.upstream_key.get(name) in trained
    ]


def _nothing_differentiable(ours: Observed) -> list[str]:
    if ours.differentiable or not (ours.gradients or ours.input_gradients):
        return []
    return ["no output depends on a weight or a floating input: set gradients=False if that is so"]


def _notes(case: Case, sharing: Sharing, neutral: list[str]) -> list[str]:
    copied, total = len(sharing.copied), len(sharing.copied) + sharing.shared
    notes = [f"{copied} of {total} port tensors are copies, not upstream's storage"] if copied else []
    if neutral:
        notes.append(f"{len(neutral)} weights hold one number everywhere: whether they are used does not show here")
    return notes if case.gradients else [*notes, "gradients=False: no weight is shown to influence the outputs"]
