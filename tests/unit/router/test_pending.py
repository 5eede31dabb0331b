"""Positions that wait for their outcome: the lowest is known, and what is gone costs nothing."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.router.domain.partition import Pending


class AnyOrder(RuleBasedStateMachine):
    @initialize(there=st.sets(st.integers(1, 50)))
    def begin(self, there: set[int]) -> None:
        self.model = set(there)
        self.pending = Pending(there)
        self.next = 51

    @rule(count=st.integers(1, 2000), gap=st.integers(0, 3))
    def come(self, count: int, gap: int) -> None:
        for _ in range(count):
            self.next += 1 + gap
            self.pending.add(self.next)
            self.model.add(self.next)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def one_goes(self, data: st.DataObject) -> None:
        position = data.draw(st.sampled_from(sorted(self.model)))
        self.pending.discard(position)
        self.model.discard(position)

    @rule()
    def all_but_the_lowest_go(self) -> None:
        for position in sorted(self.model)[1:]:
            self.pending.discard(position)
            self.model.discard(position)

    @rule(position=st.integers(0, 10_000))
    def one_goes_that_may_not_be_there(self, position: int) -> None:
        self.pending.discard(position)
        self.model.discard(position)

    @invariant()
    def it_is_the_model(self) -> None:
        assert self.pending.first == min(self.model, default=None)
        assert list(self.pending) == sorted(self.model)
        assert len(self.pending) == len(self.model)
        assert (self.next in self.pending) == (self.next in self.model)
        assert len(self.pending._order) <= 2 * len(self.model) + 1024


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
