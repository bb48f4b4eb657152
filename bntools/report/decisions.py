"""What is decided about one norm layer, and the reasons that there are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from bntools.report.schema import as_json

__all__ = ["Action", "Decision", "Reason"]


class Action(str, Enum):
    """What a plan does with a norm layer."""

    FOLD = "fold"
    MERGE = "merge"
    REPLACE = "replace"
    FREEZE = "freeze"
    UNFOLD = "unfold"
    UNFREEZE = "unfreeze"
    CONVERT = "convert"
    KEEP = "keep"


class Reason(str, Enum):
    """Why a norm layer is kept. The values are stable: JSON, and anchors in the README."""

    NOT_EXECUTED = "not-executed"
    NOT_AFTER_LINEAR = "not-after-linear"
    NOT_BEFORE_LINEAR = "not-before-linear"
    USED_ELSEWHERE = "used-elsewhere"
    RETURNED = "returned"
    HOST_SHARED = "host-shared"
    TIED_WEIGHT = "tied-weight"
    COMPUTED_WEIGHT = "computed-weight"
    FIXED_WEIGHT = "fixed-weight"
    BIAS_NOT_USED = "bias-not-used"
    CHANNEL_MISMATCH = "channel-mismatch"
    NEGATIVE_SCALE = "negative-scale"
    SHIFT_STOPPED = "shift-stopped"
    PADDED = "padded"
    PAD_VALUE = "pad-value"
    TRAINING_MODE = "training-mode"
    NO_STATISTICS = "no-statistics"
    NON_FINITE = "non-finite"
    HOOKS = "hooks"
    SCRIPTED = "scripted"
    MORE_THAN_NORM = "more-than-norm"
    OUTSIDE_FORWARD = "outside-forward"
    SHARED_STATISTICS = "shared-statistics"
    COMPUTED_AFFINE = "computed-affine"
    NOT_NEUTRAL = "not-neutral"
    NOT_BATCH_NORM = "not-batch-norm"
    WRITTEN_IN_PLACE = "written-in-place"
    DATA_DEPENDENT = "data-dependent"
    ONE_VALUE = "one-value"
    NO_ACTIVATION = "no-activation"
    ACTIVATION_STAYS = "activation-stays"
    UNINITIALIZED = "uninitialized"
    ALREADY_FROZEN = "already-frozen"
    NOT_FROZEN = "not-frozen"
    NO_SUCH_FORM = "no-such-form"
    PADDED_BETWEEN = "padded-between"
    OTHER_GEOMETRY = "other-geometry"
    COSTS_MORE = "costs-more"
    NOT_REWRITABLE = "not-rewritable"
    CONTROL_FLOW = "control-flow"
    SKIPPED = "skipped"
    CHECK_FAILED = "check-failed"


@dataclass(frozen=True)
class Decision:
    """What happens to one norm layer, and why.

    `hosts` are the paths of the layers that absorb it; `reason` is None for a fold; `detail` is a
    sentence that names the other layer or operation involved. After a checked fold, `float64_error`
    and `native_error` are the relative L2 errors of what the layer gives, against float64 truth,
    of the fold made in float64 and of the delivered one. A fold is `forward` where its hosts come
    after the layer; of a layer that could go neither way `reason` and `detail` say why not
    backward, `forward_reason` and `forward_detail` why not forward. An `affine` is no norm layer,
    but arithmetic with constants, in a module of its own or within another one.
    """

    path: str
    kind: str
    action: Action
    hosts: tuple[str, ...] = ()
    reason: Reason | None = None
    detail: str = ""
    float64_error: float | None = None
    native_error: float | None = None
    forward: bool = False
    forward_reason: Reason | None = None
    forward_detail: str = ""
    affine: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON data."""
        return dict(as_json(self))
