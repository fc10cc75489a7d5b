"""The op through which compiled graphs read the plan of the active call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from peft_multibatch.plan.segment_buffer import packed_size


_keys = itertools.count()
_graphs: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number(graph: Any) -> int:
    """Register a ``Graph``, and return the number by which the op finds it."""
    key = next(_keys)
    _graphs[key] = graph
    return key


# tagged like a random number, so that the compiler doesn't treat the plan as a function of the arguments
@torch.library.custom_op("peft_multibatch::take_plan", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def take_plan(plans: Tensor, shape: Sequence[int], key: int, index: int, trains: bool) -> Tensor:
    """The packed plan of one component of the active call: int32, padded to the longest possible plan.

    Args:
        plans: ``Graph.plans``.
        shape: the shape of a layer's input ``[..., K]``, with at least one row per entry of the plan, or no rows.
        key: ``Graph.key``.
        index: the component.
        trains: whether the graph was compiled with gradients.
    """
    return _graphs[key].plan(shape, index, trains)


@take_plan.register_fake
def _(plans, shape, key, index, trains):
    return plans.new_empty(packed_size(math.prod(shape[:-1])))
