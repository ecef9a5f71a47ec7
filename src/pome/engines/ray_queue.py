"""The queue of the Ray engine: bundles of units, the costliest first, and what becomes of those of a lost worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

RETRIES = 3  # of a unit at which a worker was lost
BUNDLE_SECONDS = 0.5  # of work: some hundred times what a call of an actor takes, and little to do again
BUNDLE_UNITS = 256


@dataclass(frozen=True)
class Bundle:
    """Units, by their numbers, that a worker is given together; `alone`: beside no other bundle."""

    numbers: tuple[int, ...]
    alone: bool = False


class Queue:
    """The units that are still to be given out; `costs` are theirs, in any measure of work."""

    def __init__(self, costs: Sequence[float], has_last: bool = False) -> None:
        self.costs = costs
        self.has_last = has_last  # whether a worker of another kind takes what was given out as often as may be
        self.given = [0] * len(costs)  # how often each was given out
        self.done: set[int] = set()
        self._fresh = deque(sorted(range(len(costs)), key=lambda number: -costs[number]))
        self._left = sum(costs)  # the cost of those in `_fresh`
        self._suspects: deque[int] = deque()
        self.last: deque[int] = deque()
        self._rate = 0.0  # cost done in a second of work

    def take(self, holds: Sequence[Bundle], workers: int) -> Bundle | None:
        """The next bundle for a worker that holds others; None where there is none for it now.

        A unit at which a worker was lost is tried alone: so the one that kills its worker is told from its neighbours.
        """
        if any(bundle.alone for bundle in holds) or (self._suspects and holds):
            return None
        if self._suspects:
            return self._give([self._suspects.popleft()], alone=True)
        budget = min(self._rate * BUNDLE_SECONDS, self._left / (2 * workers))  # smaller ones towards the end
        numbers: list[int] = []
        cost = 0.0
        while self._fresh and len(numbers) < BUNDLE_UNITS:
            cost += self.costs[self._fresh[0]]
            if numbers and cost > budget:
                break
            numbers.append(self._fresh.popleft())
        self._left -= sum(self.costs[number] for number in numbers)
        return self._give(numbers) if numbers else None

    def _give(self, numbers: list[int], alone: bool = False) -> Bundle:
        for number in numbers:
            self.given[number] += 1
        return Bundle(tuple(numbers), alone)

    def settle(self, bundle: Bundle, done: Sequence[int], seconds: float) -> list[int]:
        """A bundle came back with some of its units done; returns those that are done for the first time."""
        if done and seconds > 0:
            rate = sum(self.costs[number] for number in done) / seconds
            self._rate = (self._rate + rate) / 2 if self._rate else rate
        new = [number for number in done if number not in self.done]
        self.done.update(new)
        return new

    def take_last(self, holds: Sequence[Bundle]) -> Bundle | None:
        """The next unit for the last worker to try it."""
        return self._give([self.last.popleft()], alone=True) if self.last and not holds else None

    def lose(self, bundle: Bundle) -> list[int]:
        """The worker that held a bundle was lost; returns the units that nobody may try any more."""
        again = [number for number in bundle.numbers if number not in self.done]
        self._suspects.extend(number for number in again if self.given[number] <= RETRIES)
        often = [number for number in again if self.given[number] > RETRIES]
        if not self.has_last:
            return often
        self.last.extend(number for number in often if self.given[number] == RETRIES + 1)
        return [number for number in often if self.given[number] > RETRIES + 1]
