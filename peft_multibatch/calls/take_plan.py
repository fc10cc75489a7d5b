"""The op with which compiled graphs ask for the plan of the call that runs them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from peft_multibatch.plan.segments import packed_size


_keys = itertools.count()
_graphs: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number(graph: Any) -> int:
    """A number by which the op finds a ``Graph``."""
    key = next(_keys)
    _graphs[key] = graph
    return key


# like a random number, and unlike what follows from its arguments, a plan is no constant
@torch.library.custom_op("peft_multibatch::take_plan", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def take_plan(plans: Tensor, shape: Sequence[int], key: int, index: int, trains: bool) -> Tensor:
    """The packed plan of the call that runs the graph, that of one term: int32, long enough for any plan.

    Args:
        plans: of the graph.
        shape: of a layer's input ``[..., K]``, which has at least a row for each entry of a plan, or none at all.
        key: of the graph.
        index: of the component.
        trains: whether the graph was made with gradients.
    """
    return _graphs[key].plan(shape, index, trains)


@take_plan.register_fake
def _(plans, shape, key, index, trains):
    return plans.new_empty(packed_size(math.prod(shape[:-1])))
