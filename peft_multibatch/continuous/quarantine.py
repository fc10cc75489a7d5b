"""Find the request that broke a step, fail it alone, and run the others again.

A step runs the tokens of all requests as one row, in which attention masks by adding. A non-finite value in one
request's keys therefore spreads over the whole row, and its origin can't be determined afterwards. So every request
with non-finite logits, and every request that had no logits yet, starts again in other pages and in a step of its own.
The one at fault has non-finite logits again and fails; all others get the tokens that they would get alone. Exceptions
are handled in the same way.

Whether logits are finite is sent to the host in an extra row of the tensor that holds the tokens, which needs no
additional synchronization, and works in captured graphs and asynchronous steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from peft_multibatch.continuous.leaving import LEFT, Leaving
from peft_multibatch.continuous.prefixes import KEPT
from peft_multibatch.continuous.scheduler import entry_of, has_begun
from peft_multibatch.errors import ModelStateError, MultibatchError
from peft_multibatch.plan.ids import ids_of, label_of


if TYPE_CHECKING:
    from peft_multibatch.adapters.registry import Registry


APART = 64
"""Number of steps for which an adapter's requests run separately after one of them failed."""


class Quarantine:
    """Finds the requests that make steps fail.

    Args:
        processor: transformers' batch processor.
        leaving: takes requests out of the loop.
        registry: the model's adapters.
        key_of: returns the key that a request shares with others that may have the same fault.
    """

    def __init__(
        self,
        processor: Any,
        leaving: Leaving,
        registry: Registry,
        key_of: Callable[[RequestState], Hashable],
    ) -> None:
        # ids of requests that run alone until they have a token → when each ran last
        self.suspects: dict[Any, int] = {}
        self._apart: dict[Hashable, int] = {}  # keys whose requests run separately → number of steps left
        self._turns = itertools.count(1)
        self._others_are_next = True
        self._leaving, self._registry, self._key_of = leaving, registry, key_of
        self._dtype = processor.model_dtype
        self._scheduler, runner = processor.scheduler, processor.model_runner
        self._io = processor.inputs_and_outputs
        pairs = getattr(self._io, "io_pairs", ())
        for each in [part for pair in pairs for part in (pair.host_io, pair.device_io)] or [self._io]:
            rows, columns = each.output_ids.shape
            each.output_ids = torch.zeros(
                (rows + 1, columns),
                dtype=each.output_ids.dtype,
                device=each.output_ids.device,
                pin_memory=each.output_ids.is_pinned(),
            )
        runner._sample = self._sample_with_flags(runner._sample, runner.do_sample)
        self._io.prepare_batch_update = self._judged(self._io.prepare_batch_update)
        self._scheduler._process_candidates = self._in_groups(self._scheduler._process_candidates)

    def step_failed(self, futures: Sequence[FutureRequestState], error: Exception) -> None:
        """Handle a step's exception: fail its request if there is only one, otherwise restart all of them."""
        if len(futures) == 1:
            self._fail(futures[0].state, error)
        else:
            self._suspect([future.state for future in futures])

    def _sample_with_flags(self, sample: Callable[..., None], do_sample: bool) -> Callable[..., None]:
        def sample_with_flags(scores: Tensor, output_ids: Tensor) -> None:
            most = scores[0].amax(-1)  # [requests]; NaN if any logit is
            is_bad = most - most != 0
            output_ids[-1, : len(most)].copy_(is_bad)
            if do_sample:  # sampling from non-finite scores would raise
                scores = scores.masked_fill(is_bad[None, :, None], 0)
            sample(scores, output_ids)

        return sample_with_flags

    def _judged(self, update: Callable[[], tuple]) -> Callable[[], tuple]:
        """Wrap the reading of a step's tokens to leave out requests with non-finite logits."""

        def judged() -> tuple:
            futures, tokens, logprobs = update()
            packed = self._io.io_pairs[self._io.current_pair].host_io if hasattr(self._io, "io_pairs") else self._io
            flags = packed.output_ids[-1, : len(futures)].tolist()
            places = itertools.count()
            rows = [next(places) if future.has_new_token else None for future in futures]
            stays = [future.state.status not in LEFT for future in futures]
            if any(flags[: next(places)]):
                bad = [is_there and (row is None or flags[row]) for is_there, row in zip(stays, rows)]
                states = [future.state for future, is_bad in zip(futures, bad) if is_bad]
                # it ran alone from the start
                if len(futures) == 1 and states and states[0].request_id in self.suspects:
                    self._fail(states[0], self._why(states[0]))
                else:
                    self._suspect(states)
                stays = [is_there and not is_bad for is_there, is_bad in zip(stays, bad)]
            elif len(futures) == 1 and futures[0].has_new_token and (self.suspects or self._apart):
                self._acquit(futures[0].state)
            if all(stays):
                return futures, tokens, logprobs
            kept = [row for row, is_there in zip(rows, stays) if is_there and row is not None]
            return (
                [future for future, is_there in zip(futures, stays) if is_there],
                [tokens[row] for row in kept],
                logprobs and [logprobs[row] for row in kept],
            )

        return judged

    def _suspect(self, states: Sequence[RequestState]) -> None:
        self.suspects.update((state.request_id, 0) for state in states)
        self._leaving.restart(states)

    def _fail(self, state: RequestState, error: Exception) -> None:
        self.suspects.pop(state.request_id, None)
        self._apart[self._key_of(state)] = APART
        while len(self._apart) > KEPT:
            del self._apart[next(iter(self._apart))]
        self._leaving.fail(state, error, clears=True)

    def _acquit(self, state: RequestState) -> None:
        self.suspects.pop(state.request_id, None)
        key = self._key_of(state)
        left = self._apart.pop(key, 0) - 1
        if left > 0:
            self._apart[key] = left

    def _in_groups(self, process: Callable[..., tuple]) -> Callable[..., tuple]:
        """Wrap the scheduling of a step so that suspects run alone and separated adapters run by themselves."""

        def process_candidates(candidates: list[RequestState], *args: Any) -> tuple:
            if not self.suspects and not self._apart:
                return process(candidates, *args)
            self.suspects = {name: turn for name, turn in self.suspects.items() if self._leaving.find(name)}
            others: list[RequestState] = []
            alone: list[RequestState] = []
            for state in candidates:
                is_alone = state.request_id in self.suspects or self._key_of(state) in self._apart
                (alone if is_alone else others).append(state)
            alone.sort(key=lambda state: self.suspects.get(state.request_id, 0))
            groups = [[state] for state in alone]
            if others:
                groups.insert(0 if self._others_are_next else len(groups), others)
            found = process([], *args) if not groups else ()
            starved: list[tuple] = []
            for group in groups:
                if group is not others and not has_begun(group[0]):
                    self.suspects.setdefault(group[0].request_id, 0)  # no other request can affect its pages
                found = process(group, *args)
                if found[0]:
                    self._others_are_next = group is not others
                    if self._others_are_next and group[0].request_id in self.suspects:
                        self.suspects[group[0].request_id] = next(self._turns)
                    return found
                starved += self._scheduler.starved_requests  # transformers evicts some of them to free blocks
            self._scheduler.starved_requests = starved
            return found

        return process_candidates

    def _why(self, state: RequestState) -> MultibatchError:
        """The error for a request with non-finite logits."""
        entry = entry_of(state)
        known = filter(None, map(self._registry.current, ids_of(entry)))
        weights = [each for adapter in known for each in adapter.tensors() if not each.is_meta]
        is_finite = all(bool(each.isfinite().all()) for each in weights)
        reason = f"values overflowed in {self._dtype}" if is_finite else "the adapter has non-finite weights"
        return ModelStateError(
            f"request {state.request_id!r} under {label_of(entry, self._registry.names)!r} has non-finite logits, "
            f"because {reason}: expected finite ones. Load the adapter again, or run the model in another dtype; "
            "other requests aren't affected."
        )


def as_error(caught: Exception) -> MultibatchError:
    """Wrap an exception that a step raised in an error that a request's owner can understand."""
    if isinstance(caught, MultibatchError):
        return caught
    return MultibatchError(
        f"the model raised {type(caught).__name__} ({caught}) in a step with only this request: expected it to run. "
        "Try the adapter with generate; other requests aren't affected."
    )
