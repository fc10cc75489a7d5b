"""The order in which requests start, against its definition, which looks at all requests and adapters."""

from __future__ import annotations

import heapq
import random

import pytest
from transformers.generation.continuous_batching.requests import RequestState

from peft_multibatch.continuous.scheduler import KEY, FairScheduler, entry_of
from peft_multibatch.plan.ids import ids_of


class Definition:
    def __init__(self):
        self.counts, self.now, self.before = {}, 0.0, set()

    def charge(self, entry, tokens):
        self.counts[ids_of(entry)] = self.counts.get(ids_of(entry), self.now) + tokens
        self.now += tokens / len(self.counts)

    def forget(self, busy):
        self.counts = {adapters: count for adapters, count in self.counts.items() if adapters in busy}

    def order(self, waiting, running, known):
        queues = {}
        for state in waiting:
            queues.setdefault(ids_of(entry_of(state)), []).append(state)
        self.forget({*queues, *map(ids_of, running), *known})
        waited = {adapters for adapters, queue in queues.items() if self.before.intersection(ids(queue))}
        self.before = {*ids(waiting)}
        counts = [self.counts[each] for each in waited or map(ids_of, running) if each in self.counts]
        self.now = max(self.now, min(counts, default=0.0))
        for adapters in queues.keys() - waited:
            self.counts[adapters] = max(self.counts.get(adapters, 0.0), self.now)
        turns = [(self.counts[adapters], place, queue) for place, (adapters, queue) in enumerate(queues.items())]
        heapq.heapify(turns)
        found = []
        while turns:
            count, place, queue = heapq.heappop(turns)
            found.append(queue.pop(0))
            if queue:
                heapq.heappush(turns, (count + len(found[-1].initial_tokens), place, queue))
        return found


def ids(states):
    return [state.request_id for state in states]


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_order_of_the_definition(seed):
    random.seed(seed)
    queue, definition = FairScheduler(), Definition()
    waiting, running = {}, {}
    for step in range(300):
        for number in range(random.choice((0, 0, 1, 2, 5 if step < 200 else 0))):
            entry = random.choice((-1, random.randrange(12), ((random.randrange(4), 0.5), (5, 0.5))))
            state = RequestState((step, number), [1] * random.randint(1, 9), logit_processor_kwargs={KEY: entry})
            waiting[state.request_id] = state
            queue.add(state)
        for name in random.sample([*waiting], min(len(waiting), random.choice((0, 0, 0, 1, 8)))):  # cancelled
            queue.left(waiting.pop(name), waiting)
        entries = [entry_of(state) for state in running.values()]
        queue.update(waiting, entries)
        expected = definition.order(waiting.values(), entries, queue.adapters)  # it may forget some later
        some = {adapters for adapters in queue.adapters if random.random() < 0.4}
        most = random.choice((1, 3, 1000))
        for is_one_of_them in (True, False):
            found = [
                each.state
                for each in (queue.of(some, most) if is_one_of_them else queue.except_of(some.__contains__, most))
            ]
            assert ids(found) == ids(
                [each for each in expected if (ids_of(entry_of(each)) in some) == is_one_of_them][:most]
            )
        found = queue.except_of(lambda adapters: False, 1000)
        assert ids(each.state for each in found) == ids(expected)
        assert [each[:2] for each in found] == sorted(each[:2] for each in found)
        definition.forget({*queue.adapters, *map(ids_of, entries)})  # while it looked at queues that are empty now
        for state in expected[: random.choice((0, 1, 2))]:
            running[state.request_id] = waiting.pop(state.request_id)
        for name in random.sample([*running], min(len(running), random.choice((0, 1, 2)))):
            del running[name]
        for state in running.values():
            tokens = random.randint(1, 3)
            queue.charge(entry_of(state), tokens)
            definition.charge(entry_of(state), tokens)
    waiting.clear()
    queue.update(waiting, ())
    assert not queue.adapters and not queue.mixtures and not queue._counts and not queue._turn_of and not queue._size
    assert not queue._turns


def test_requests_that_begun_before_come_first_and_cancelled_ones_are_forgotten():
    queue, waiting = FairScheduler(), {}
    for number in range(100):
        state = RequestState(number, [1], logit_processor_kwargs={KEY: 0})
        state.generated_tokens = [1] if number == 50 else []
        waiting[number] = state
        queue.add(state)
    del waiting[50]
    again = RequestState(50, [1], generated_tokens=[1], logit_processor_kwargs={KEY: 0})
    waiting[50] = again  # evicted once more, as another object
    queue.add(again)
    queue.update(waiting, ())
    assert [each.state for each in queue.begun()] == [again]
    for number in range(1, 100):
        queue.left(waiting.pop(number), waiting)
    queue.update(waiting, ())
    (left,) = queue._queues.values()
    assert len(left) < 70 and not queue.begun()
    queue.charge(0, 1000)
    queue.left(waiting.pop(0), waiting)
    queue.update(waiting, ())
    assert not queue._queues and not queue._counts and not queue._size


def one_of_each(count):
    """A queue with a request for each of a number of adapters, and the requests."""
    queue, waiting = FairScheduler(), {}
    for number in range(count):
        waiting[number] = RequestState(number, [1], logit_processor_kwargs={KEY: number})
        queue.add(waiting[number])
    queue.update(waiting, ())
    return queue, waiting


def test_turns_are_forgotten_while_others_wait():
    queue, waiting = one_of_each(20)
    for _ in range(1000):
        waiting["hot"] = RequestState("hot", [1], logit_processor_kwargs={KEY: 99})
        queue.add(waiting["hot"])
        queue.charge(99, 100)
        queue.update(waiting, (99,))
        (found,) = queue.of({(99,)}, 1)
        del waiting[found.state.request_id]
        assert queue.first((99,)) is None
    assert len(queue._turns) < 200


def test_a_function_that_raises_loses_no_turn():
    queue, _ = one_of_each(5)
    with pytest.raises(KeyError):
        queue.except_of(lambda adapters: {(0,): True}[adapters], 9)
    assert ids(each.state for each in queue.except_of(lambda adapters: False, 9)) == [*range(5)]


def test_a_request_that_leaves_before_the_first_step_takes_none_with_it():
    queue = FairScheduler()
    one, two = (RequestState(number, [1], logit_processor_kwargs={KEY: 0}) for number in range(2))
    queue.add(one)
    queue.add(two)
    queue.left(one, {1: two})
    queue.update({1: two}, ())
    assert [each.state for each in queue.except_of(lambda adapters: False, 9)] == [two]


def serve(queue, demands, slots, steps, waiting, running):
    """Run steps in which adapters always have this many requests, of ten tokens each; returns who ran in each."""
    served = []
    for _ in range(steps):
        for entry, count in demands.items():
            states = [*waiting.values(), *running]
            for _ in range(count - sum(entry_of(state) == entry for state in states)):
                state = RequestState(object(), [1], logit_processor_kwargs={KEY: entry})
                waiting[state.request_id] = state
                queue.add(state)
        queue.update(waiting, map(entry_of, running))
        for each in queue.except_of(lambda adapters: False, slots - len(running)):
            running.append(waiting.pop(each.state.request_id))
        served.append([entry_of(state) for state in running])
        for state in running:
            state.max_new_tokens = (state.max_new_tokens or 10) - 1
            queue.charge(entry_of(state), 1)
        running[:] = [state for state in running if state.max_new_tokens > 0]
    return served


@pytest.mark.parametrize("steps", [0, 100, 3000])
@pytest.mark.parametrize("newcomer", [2, 1], ids=["a new adapter", "the one that wanted little"])
def test_what_nobody_else_wanted_is_not_held_against_an_adapter(steps, newcomer):
    """Adapter 0 fills a batch in which adapter 1 wants few places, for a while; then another one floods, too."""
    queue, waiting, running = FairScheduler(), {}, []
    serve(queue, {0: 40, 1: 2}, 16, steps, waiting, running)
    later = serve(queue, {0: 40, 1: 2} | {newcomer: 40}, 16, 100, waiting, running)[30:]
    served = [entry for step in later for entry in step]
    assert abs(served.count(0) - served.count(newcomer)) < 0.2 * len(served)
