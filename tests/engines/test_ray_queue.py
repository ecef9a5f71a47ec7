"""The queue of the Ray engine: every unit is done once, the costliest first, and none is given out too often."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pome.engines.ray_queue import BUNDLE_UNITS, RETRIES, Queue


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.floats(0.1, 1e6), max_size=60),
    st.integers(1, 4),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_every_unit_is_done_once_or_given_up_after_its_retries(costs, workers, has_last, random):
    queue = Queue(costs, has_last)
    held = [[] for _ in range(workers)]
    done, given_up = [], []
    while len(done) + len(given_up) < len(costs):
        worker = random.randrange(workers)
        bundle = queue.take(held[worker], workers)
        if bundle is not None:
            assert not any(other.alone for other in held[worker])
            held[worker].append(bundle)
        if (last := queue.take_last([])) is not None:
            assert last.alone and queue.given[last.numbers[0]] == RETRIES + 2
            given_up += queue.lose(last)
        if held[worker] and random.random() < 0.5:
            if random.random() < 0.3:
                for lost in held[worker]:
                    given_up += queue.lose(lost)
                held[worker].clear()
            else:
                ended = held[worker].pop(random.randrange(len(held[worker])))
                count = random.randint(0, len(ended.numbers)) if random.random() < 0.2 else len(ended.numbers)
                done += queue.settle(ended, ended.numbers[:count], random.random())
                if count < len(ended.numbers):  # it was stopped, and the rest is lost to it
                    given_up += queue.lose(ended)
    assert sorted(done + given_up) == list(range(len(costs)))
    assert max(queue.given, default=0) <= RETRIES + 1 + has_last
    assert all(queue.given[number] > RETRIES for number in given_up)


def test_the_costliest_come_first_and_small_ones_are_bundled():
    queue = Queue([1.0] * 5000 + [1e6, 1e7])
    first, second = queue.take([], 2), queue.take([], 2)
    assert (first.numbers, second.numbers) == ((5001,), (5000,))
    queue.settle(first, first.numbers, 10.0)  # a million a second
    sizes = []
    while (bundle := queue.take([], 2)) is not None:
        sizes.append(len(bundle.numbers))
        queue.settle(bundle, bundle.numbers, 1e-6 * len(bundle.numbers))
    assert sum(sizes) == 5000 and max(sizes) == BUNDLE_UNITS and sizes[-1] == 1


def test_a_unit_at_which_a_worker_was_lost_is_tried_alone():
    queue = Queue([1.0, 1.0, 1.0])
    bundle = queue.take([], 1)
    queue.settle(bundle, (), 0.0)
    queue.lose(bundle)
    other = queue.take([], 1)
    assert other.alone and other.numbers == bundle.numbers
    assert queue.take([other], 1) is None
