"""The proof of a fold of an ONNX model: in ONNX Runtime as it is written, and in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx
import torch
from onnx import ModelProto
from torch import Tensor

from bntools.equivalence import Truth, check_repeats, compare
from bntools.errors import BNToolsError, InputError, RuntimeUnavailableError
from bntools.examples import Examples
from bntools.measuring import pooled
from bntools.onnx_graph.sizes import Sizes, drawn
from bntools.onnx_surgery.folding import FoldedOnnx, fold_proto
from bntools.onnx_surgery.planning import View
from bntools.onnx_surgery.writing import as_source
from bntools.outputs import Outputs
from bntools.planning import NormFold
from bntools.proving import Proof, first_failing
from bntools.report import Equivalence
from bntools.runtimes.sessions import Session, open_session
from bntools.runtimes.widening import DoubleModel, random_nodes
from bntools.tolerance import float64_limit

__all__ = ["OnnxProver"]

_DRAWS = 8


class OnnxProver:
    """Checks folds of one model on inputs other than those that were looked at.

    The truth is the graph in float64, by onnx's evaluator; the error that the original makes in
    ONNX Runtime, with all optimisations off, says what the folded one may make there. Where ONNX
    Runtime has not the operations or types, the folded model is judged in float64 alone.
    """

    def __init__(self, view: View, seed: int) -> None:
        self.view = view
        self.proto = view.source.proto
        self._double: DoubleModel | None = None
        self._no_truth = ""
        self._session, self._no_session = self._opened(self.proto)
        self._runs = self._session is not None
        self.examples, self.truth = self._first(seed)
        self._session = self._double = None  # large, and rarely needed again

    def check(self, folds: Sequence[NormFold], folded: FoldedOnnx) -> Proof:
        """Judge a folded model, and the same folds made in float64."""
        exact = self._in_float64(folds) if self.truth.is_float64 else None
        session, _ = self._opened(folded.proto) if self._runs else (None, "")
        candidate = None if session is not None else DoubleModel(_copied(folded.proto))
        native = self._judged(session, candidate, [self.examples], [self.truth])
        if not native and exact is not None and exact:
            native = self._on_more_inputs(session, candidate)
        return Proof(native, exact)

    def failure(self, folds: Sequence[NormFold]) -> str:
        """Why folds fail; "" where they do not."""
        try:
            proof = self.check(folds, fold_proto(self.proto, self.view.graphs[0], folds))
        except Exception as error:  # noqa: BLE001 - whatever a fold breaks is its failure
            return f"the folded model fails: {type(error).__name__}: {_line(error)}"
        worst = proof.failure
        if worst is None:
            return ""
        if worst.note:
            return f"{worst.name}: {worst.note}"
        return f"{worst.name} is off by {worst.error:.2g} (limit {worst.limit:.2g})"

    def blame(self, folds: Sequence[NormFold]) -> dict[str, str]:
        """Which fold to undo, and why, where all together fail: found by bisection."""
        without = self.failure(())
        if without:
            return {fold.layer.path: without for fold in folds}
        return first_failing(sorted(folds, key=lambda each: each.turn), self.failure)

    def nothing(self, why: str = "no output") -> Equivalence:
        """The judgement of a folded model that gives nothing."""
        missing = compare(self.truth, {}, inputs=str(self.examples))
        return replace(missing, outputs=tuple(replace(o, note=why) for o in missing.outputs))

    def _opened(self, proto: ModelProto) -> tuple[Session | None, str]:
        """A session without optimisations; why not, where ONNX Runtime cannot run the model."""
        try:
            with as_source(_shaped(proto, self.view.sizes)) as source:
                return open_session(source, optimise=False), ""
        except RuntimeUnavailableError as error:
            return None, _line(error).partition(": ")[2].partition(". ")[0]

    # the original

    def _first(self, seed: int) -> tuple[Examples, Truth]:
        """Inputs on which the original runs, and what it gives on them."""
        first = self.view.examples(seed)
        options = [first, *(self._sized(sizes, seed) for sizes in self.view.others())]
        failure: BNToolsError | None = None
        for examples in options:
            try:
                return examples, self._truth(examples)
            except InputError as error:  # noqa: PERF203 - the first failure is told
                failure = failure or error
        assert failure is not None  # noqa: S101 - there is one option at least
        raise failure

    def _sized(self, sizes: Sizes, seed: int) -> Examples:
        tensors = drawn(self.view.inputs, sizes, seed + 1)
        return Examples(kwargs=dict(tensors), inferred=True, drawn=True)

    def _truth(self, examples: Examples) -> Truth:
        feeds = _feeds(examples)
        native = self._natively(examples) if self._runs else None
        exact = self._exactly(feeds)
        if exact is None and native is None:
            raise RuntimeUnavailableError(
                f"Cannot check {self.view.source.name}: ONNX Runtime does not run it"
                f" ({self._no_session}), and neither does onnx's evaluator ({self._no_truth})."
                " Convert it to types that they have."
            )
        coarsest = self._coarsest()
        known = exact if exact is not None else native
        own = native if native is not None else exact
        note = self._note(exact, native)
        assert known is not None and own is not None  # noqa: S101, PT018 - one of them is there
        known = {n: t if t.is_floating_point() else t.to(own[n].dtype) for n, t in known.items()}
        return Truth(
            known, own, {}, {}, coarsest, coarsest, is_float64=exact is not None, note=note
        )

    def _natively(self, examples: Examples) -> Outputs:
        session = self._session or self._opened(self.proto)[0]
        assert session is not None  # noqa: S101 - it runs, as the caller knows
        native = session.run(_feeds(examples))
        again = session.run(_feeds(examples))
        try:
            check_repeats(native, again, "the ONNX model", None, examples)
        except BNToolsError as error:
            drawing = ", ".join(random_nodes(self.proto)[:3])
            where = f" Random numbers are drawn by {drawing}." if drawing else ""
            raise type(error)(f"{error}{where}") from None
        return native

    def _exactly(self, feeds: dict[str, Tensor]) -> Outputs | None:
        if self._no_truth:
            return None
        try:
            self._double = self._double or DoubleModel(_copied(self.proto))
            return self._double.run(feeds)
        except Exception as error:  # noqa: BLE001 - the evaluator raises anything
            self._no_truth = f"{type(error).__name__}: {_line(error.__cause__ or error)}"
            return None

    def _note(self, exact: Outputs | None, native: Outputs | None) -> str:
        if exact is None:
            return (
                f"no float64 truth for the ONNX file ({self._no_truth}): ONNX Runtime without"
                " optimisations stands in for it"
            )
        if native is None:
            return f"judged in float64 alone: ONNX Runtime does not run it ({self._no_session})"
        return "the truth of the ONNX file: the same graph in float64, by onnx's evaluator"

    def _coarsest(self) -> torch.dtype:
        """The coarsest floating type of what the folds change."""
        tensors = self.view.graphs[0].graph.tensors.values()
        floats = [tensor.dtype for tensor in tensors]
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    # candidates

    def _judged(
        self,
        session: Session | None,
        double: DoubleModel | None,
        inputs: Sequence[Examples],
        truths: Sequence[Truth],
    ) -> Equivalence:
        judged = []
        for examples, truth in zip(inputs, truths, strict=True):
            feeds = _feeds(examples)
            if session is not None:
                given = session.run(feeds)
            elif double is not None:
                given = double.run(feeds)
            judged.append(compare(truth, given, inputs=str(examples)))
        rows = zip(*(each.outputs for each in judged), strict=True)
        if len(judged) == 1:
            return judged[0]
        first = judged[0]
        outputs = tuple(pooled(row) for row in rows)
        return replace(first, outputs=outputs, notes=(*first.notes, f"over {len(judged)} inputs"))

    def _on_more_inputs(self, session: Session | None, double: DoubleModel | None) -> Equivalence:
        """Judge again over several inputs a fold that is exact in float64.

        In a network that amplifies rounding, one input's own error says too little.
        """
        inputs = [self.examples, *(self.examples.varied(draw) for draw in range(1, _DRAWS))]
        truths = [self.truth, *(self._truth(examples) for examples in inputs[1:])]
        return self._judged(session, double, inputs, truths)

    def _in_float64(self, folds: Sequence[NormFold]) -> Equivalence:
        folded = fold_proto(self.proto, self.view.graphs[0], folds, exact=True)
        given = DoubleModel(folded.proto).run(_feeds(self.examples))
        noise = (o.reference_error for o in compare(self.truth, self.truth.exact).outputs)
        allowed = float64_limit(max(noise, default=0.0), self.truth.coarsest)
        return compare(self.truth, given, inputs=str(self.examples), allowed=allowed)


def _shaped(proto: ModelProto, sizes: Sizes) -> ModelProto:
    """The model, with a rank for inputs that have none: a session takes those for scalars."""
    bare = [v.name for v in proto.graph.input if not v.type.tensor_type.HasField("shape")]
    if not any(sizes.get(name) for name in bare):
        return proto
    copy = _copied(proto)
    for value in copy.graph.input:
        if value.name in bare:
            for _ in sizes.get(value.name, ()):
                value.type.tensor_type.shape.dim.add()
    return copy


def _feeds(examples: Examples) -> dict[str, Tensor]:
    return dict(examples.kwargs)


def _copied(proto: ModelProto) -> onnx.ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    return copy


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(". ")
