"""Random sequences of everything that users do to a model and its adapters, with calls in between.

Whatever happened before, every row of a call equals the same row alone with its own adapter in PEFT, or the call
raises an error justified by the model's state. ``MULTIBATCH_STEPS=10000`` runs that many steps, in new sequences
every time, and ``MULTIBATCH_SHRINK=1`` searches for the smallest failing one.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from changes import FAULTS, add, layers_of
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from lives import NAMES, NO_MIXTURE, Life, can_lose_one, change_names, factors, kinds, nth, sound, sound_names
from mixtures import several
from models import alone, left_padded
from tolerances import RELATIVE_ERROR, relative_error

import peft_multibatch
from peft_multibatch import MergedAdaptersError, MultibatchError, NotEnabledError, UnknownAdapterError


STEPS = int(os.environ.get("MULTIBATCH_STEPS", 0))
STEPS_PER_SEQUENCE = 50
INPUTS = left_padded(rows=5, length=6)
FUSE = st.sampled_from([True, False, "weights"])


# Calls, and their reference.


def as_ids(rows):
    return torch.tensor(rows) if all(isinstance(row, int) for row in rows) else rows


def logits(model, rows=None, samples=slice(None)):
    """Logits of a call with ids, or of some samples without ids."""
    samples, ids = (samples, {}) if rows is None else (slice(len(rows)), {"adapter_ids": as_ids(rows)})
    with torch.no_grad():
        return model(**{key: value[samples] for key, value in INPUTS.items()}, **ids).logits


def generated(model, samples, **ids):
    """Logits of every step, and tokens."""
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    result = model.generate(**{key: value[samples] for key, value in INPUTS.items()}, **options, **ids)
    return torch.stack(result.logits, 1), result.sequences[:, -3:]


def alone_in_turn(model, names, call=logits):
    """Run every row by itself in PEFT, with its adapter, or with several that PEFT sums."""

    def run(row, name):
        def one():
            return call(model, samples=slice(row, row + 1))

        if isinstance(name, dict):  # with its first adapter active, because others may have their own heads
            return alone(model, next(iter(name)), lambda: several(model, name, one))
        return alone(model, name, one)

    return [run(row, name) for row, name in enumerate(names)]


def attempt(call):
    """Return the result or the error of a call."""
    try:
        return call()
    except MultibatchError as error:
        return error


@st.composite
def entries(draw):
    """Draw names, integer ids and mixtures of adapters that can run, and the base model."""
    machine = draw(st.runner())
    names = sound_names(machine)
    plain = st.sampled_from([*names, *(machine.ids[name] for name in names), "__base__", -1])
    mixable = [name for name in names if machine.kinds[name] not in NO_MIXTURE]
    if not mixable:
        return draw(plain)
    weights = st.sampled_from([0.5, -0.5, 1.5, 0.25])
    return draw(plain | plain | st.dictionaries(st.sampled_from(mixable), weights, min_size=1, max_size=3))


@st.composite
def refusals(draw):
    """Draw an entry that can't run, and its error."""
    machine = draw(st.runner())
    unknown = [name for name in [*NAMES, "nobody"] if name not in machine.ids]
    unknown += sorted({*range(len(machine.ever) + 2)} - {*machine.ids.values()})
    known = [entry for name in machine.faults for entry in (name, machine.ids[name], {name: 0.5})]
    known += [{name: 0.5, other: 0.5} for name in machine.faults for other in sound_names(machine)]
    known += [{name: 0.5} for name in machine.ids if machine.kinds[name] in NO_MIXTURE]
    found = [[(entry, UnknownAdapterError) for entry in unknown], [(entry, MultibatchError) for entry in known]]
    return draw(st.one_of(*(st.sampled_from(each) for each in found if each)))


rows_of = st.lists(entries(), min_size=2, max_size=5)


def is_enabled(machine):
    return machine.mb is not None


class LifeWithCalls(Life):
    """Adds calls with ids after every event."""

    @initialize(kinds=st.lists(kinds, min_size=2, max_size=4), fuse=FUSE)
    def begin(self, kinds, fuse):
        for seed, (name, kind) in enumerate(zip(NAMES, kinds)):
            self.model = add(self.model, name, kind, seed)
            self.came(name, kind)
        self.enable(fuse)

    @rule(name=sound, rows=rows_of)
    def merge(self, name, rows):
        if self.kinds[name] != "bias":  # PEFT can't merge it into layers without a bias
            self.model.merge_adapter([name])
            if is_enabled(self):
                with pytest.raises(MergedAdaptersError):
                    logits(self.model, rows)
            self.model.unmerge_adapter()

    @precondition(lambda self: not is_enabled(self))
    @rule(fuse=FUSE)
    def enable(self, fuse):
        """Existing adapters have ids in PEFT's order."""
        self.mb = peft_multibatch.enable(self.model, fuse=fuse)
        self.ids = {name: identity for identity, name in enumerate(self.model.peft_config)}
        self.ever = dict(self.ids)

    @precondition(is_enabled)
    @rule(rows=rows_of)
    def disable(self, rows):
        old, self.mb = self.mb, None
        old.disable()
        with pytest.raises(NotEnabledError), old.batch(rows):
            pass

    @precondition(is_enabled)
    @rule(rows=rows_of)
    def copy(self, rows):
        """A copy is plain until it is enabled as well."""
        twin, names = copy.deepcopy(self.model), self.names_of(rows)
        assert torch.equal(*(torch.cat(alone_in_turn(model, names)) for model in (twin, self.model)))
        with pytest.raises(NotEnabledError):
            logits(twin, ["__base__"] * 5)
        peft_multibatch.enable(twin)
        self.check(names, twin)

    @rule()
    def to_double_and_back(self):
        self.model.double()
        if is_enabled(self):
            self.check(sound_names(self)[:5])
        self.model.float()

    @precondition(can_lose_one)
    @rule(fault=st.sampled_from(sorted(FAULTS)), name=sound, nth=nth)
    def spoil(self, fault, name, nth):
        """Rows that name it are refused from now on."""
        layers = layers_of(self.model, name)
        FAULTS[fault](layers[nth % len(layers)], name)
        self.faults[name] = fault
        if is_enabled(self):
            self.refused(sound_names(self), (name, MultibatchError))

    # Calls.

    def names_of(self, rows):
        names = {identity: name for name, identity in self.ids.items()} | {-1: "__base__"}
        return [names[row] if isinstance(row, int) else row for row in rows]

    def may_refuse(self, names):
        """Whether mixtures need more than two products."""
        mixed = {name for entry in names if isinstance(entry, dict) for name in entry}
        layers = [(layer, name) for name in mixed for layer in layers_of(self.model, name)]
        halves = [half[name] for layer, name in layers for half in (layer.lora_A, layer.lora_B)]
        return any(half.bias is not None or half._forward_hooks for half in halves)

    def compare(self, names, actual, expected, model=None):
        if isinstance(actual, MultibatchError):
            if not self.may_refuse(names):
                raise AssertionError(f"{names} were refused. {self.describe()}") from actual
            return
        for name, row, wanted in zip(names, actual, expected):
            adapters = name if isinstance(name, dict) else [name]
            weights = [
                layer.lora_A[each].weight for each in adapters for layer in layers_of(model or self.model, each)
            ]
            rounding = max(RELATIVE_ERROR[tensor.dtype] for tensor in (row, *weights))
            error = relative_error(row, wanted)
            assert error <= rounding * len(adapters), f"{name} in {names} is off by {error:.1e}. {self.describe()}"

    def check(self, rows, model=None):
        note(f"{rows}, {self.describe()}")
        names, model = self.names_of(rows), model or self.model
        self.compare(names, attempt(lambda: logits(model, rows)), torch.cat(alone_in_turn(model, names)), model)

    @precondition(is_enabled)
    @rule(rows=rows_of)
    def call(self, rows):
        self.check(rows)

    @precondition(is_enabled)
    @rule(rows=rows_of, refusal=refusals())
    def refused(self, rows, refusal):
        """A row that can't run refuses the call, and affects no other call."""
        entry, error = refusal
        note(f"{[*rows[:4], entry]}, {self.describe()}")
        with pytest.raises(error):
            logits(self.model, [*rows[:4], entry])
        self.check(rows[:5])

    @precondition(is_enabled)
    @rule(rows=rows_of)
    def generate(self, rows):
        note(f"{rows}, {self.describe()}")
        names = self.names_of(rows)
        expected = alone_in_turn(self.model, names, generated)
        result = attempt(lambda: generated(self.model, slice(len(rows)), adapter_ids=as_ids(rows)))
        if isinstance(result, MultibatchError):
            return self.compare(names, result, None)
        for row, name in enumerate(names):
            steps, tokens = expected[row]
            for step in range(3):
                self.compare([name], result[0][row : row + 1, step], steps[:, step])
                if result[1][row, step] != tokens[0, step]:
                    break  # two tokens are equally likely up to rounding, and the continuations differ

    @precondition(is_enabled)
    @rule(rows=rows_of, others=rows_of)
    def call_on_two_threads(self, rows, others):
        note(f"{rows} and {others}, {self.describe()}")
        names = [self.names_of(rows), self.names_of(others)]
        expected = [torch.cat(alone_in_turn(self.model, each)) for each in names]
        barrier = threading.Barrier(2)

        def run(each):
            barrier.wait()
            return attempt(lambda: logits(self.model, each))

        with ThreadPoolExecutor(2) as pool:
            for each, actual, wanted in zip(names, pool.map(run, (rows, others)), expected):
                self.compare(each, actual, wanted)

    @precondition(is_enabled)
    @rule(rows=rows_of, change=change_names, name=sound, nth=nth, factor=factors)
    def block_with_a_change(self, rows, change, name, nth, factor):
        note(f"{rows}, {self.describe()}")
        names, plain = self.names_of(rows), functools.partial(logits, self.model, samples=slice(len(rows)))
        before = torch.cat(alone_in_turn(self.model, names))
        with self.mb.batch(as_ids(rows)):
            first = attempt(plain)
            self.compare(names, first, before)
            self.change(change, name, nth, factor)
            second = attempt(plain)
        self.compare(names, second, torch.cat(alone_in_turn(self.model, names)))

    @precondition(lambda self: is_enabled(self) and can_lose_one(self))
    @rule(rows=rows_of, name=sound)
    def block_with_a_delete(self, rows, name):
        note(f"{rows}, {self.describe()}")
        names, plain = self.names_of(rows), functools.partial(logits, self.model, samples=slice(len(rows)))
        with self.mb.batch(as_ids(rows)):
            self.remove(name)
            actual = attempt(plain)
        if any(name in entry if isinstance(entry, dict) else name == entry for entry in names):
            assert isinstance(actual, UnknownAdapterError), f"{name} in {names} was not refused. {self.describe()}"
        else:
            self.compare(names, actual, torch.cat(alone_in_turn(self.model, names)))

    @precondition(is_enabled)
    @rule(rows=rows_of, elsewhere=st.booleans())
    def call_while_adapters_are_disabled(self, rows, elsewhere):
        """Another thread's disabling doesn't affect ids; on the same thread rows may be the base model's."""
        note(f"{rows}, {self.describe()}")
        names = self.names_of(rows)
        expected = torch.cat(alone_in_turn(self.model, names))
        base = torch.cat(alone_in_turn(self.model, ["__base__"] * len(rows)))
        run = functools.partial(attempt, lambda: logits(self.model, rows))
        with self.model.disable_adapter(), ThreadPoolExecutor(1) as pool:
            actual = pool.submit(run).result() if elsewhere else run()
        if elsewhere or isinstance(actual, MultibatchError) or relative_error(actual, base) > 1e-5:
            self.compare(names, actual, expected)
        self.check(rows)

    @precondition(is_enabled)
    @rule()
    def look(self):
        seen = {name: identity for identity, name in enumerate(self.mb.adapter_names) if name is not None}
        assert seen == self.ids, f"{seen}. {self.describe()}"


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.*have invalid shape")  # the bias's
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # layers without the merged adapter
def test_any_sequence_of_changes_and_calls(tmp_path):
    run_state_machine_as_test(
        lambda: LifeWithCalls(str(tmp_path)),
        settings=settings(
            max_examples=STEPS // STEPS_PER_SEQUENCE or 30,
            stateful_step_count=STEPS_PER_SEQUENCE,
            derandomize=not STEPS,
            # finding a smaller sequence takes minutes
            phases=[Phase.generate, *([Phase.shrink] if "MULTIBATCH_SHRINK" in os.environ else [])],
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
