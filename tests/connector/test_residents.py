"""Who comes into the device tier and who goes, beside the rules written down as lists."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from connector.residents import USES_MAX, Residents
from connector.tally import Tally


class Model:
    """S3-FIFO whose small queue has names only: lists, searched from one end to the other."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.main: list[str] = []  # the oldest first
        self.uses: dict[str, int] = {}
        self.ghosts: list[str] = []
        self.counts: Counter[str] = Counter()

    def load(self, names: list[str]) -> tuple[set[int], set[int]]:
        found, wanted = set(), set()
        for place, name in enumerate(names):
            first = name not in names[:place]
            if name in self.main:
                found.add(place)
                self.uses[name] = min(self.uses[name] + first, USES_MAX)
            elif first and name in self.ghosts:
                wanted.add(place)
            elif first:
                self.ghosts = [*self.ghosts, name][-self.slots :]
        self.counts["device_chunks_hit"] += len(found)
        return found, wanted

    def admit(self, name: str, read: set[str]) -> bool:
        if name in self.main:
            return False
        if len(self.main) == self.slots:
            if read >= set(self.main):
                return False
            while self.main[0] in read or self.uses[self.main[0]]:
                passed = self.main.pop(0)
                self.uses[passed] = max(0, self.uses[passed] - 1)
                self.main.append(passed)
            del self.uses[self.main.pop(0)]
            self.counts["device_chunks_evicted"] += 1
        self.main.append(name)
        self.uses[name] = 0
        self.ghosts = [ghost for ghost in self.ghosts if ghost != name]
        self.counts["device_chunks_admitted"] += 1
        return True


@pytest.mark.parametrize("seed", range(20))
def test_they_come_and_go_by_the_rules(seed: int) -> None:
    chance = random.Random(seed)
    slots = chance.randint(2, 12)
    tally = Tally()
    residents, model = Residents(slots, tally), Model(slots)
    slot_of: dict[str, int] = {}
    reading: list[tuple[list[str], list[object]]] = []  # loads under way, oldest first
    popular = [f"hot {i}" for i in range(slots)]
    for turn in range(400):
        names = chance.choices([*popular, f"once {turn}", f"twice {turn // 2}"], k=4)
        found, wanted = residents.take(names)
        assert (set(found), wanted) == model.load(names)
        for place, held in found.items():
            assert held.slot == slot_of[names[place]]
        reading.append(([names[place] for place in found], list(found.values())))
        if chance.random() < 0.7 or len(reading) > 2:
            residents.give_back(reading.pop(0)[1])  # type: ignore[arg-type]
        being_read = {name for taken, _ in reading for name in taken}
        for place in sorted(wanted):
            name = names[place]
            slot = residents.place(name)
            assert (slot is not None) == model.admit(name, being_read)
            if slot is not None:
                stays = {*model.main} - {name}
                slot_of = {known: at for known, at in slot_of.items() if known in stays}
                assert slot not in slot_of.values(), "it has somebody else's chunk"
                residents.enter(name, slot)
                slot_of[name] = slot
        assert set(slot_of) == set(model.main)
        idle = sorted(slot_of.keys() - being_read)
        if idle and chance.random() < 0.05:
            name = chance.choice(idle)
            [held] = residents.take([name])[0].values()
            model.load([name])
            residents.drop(name, held)
            residents.drop(name, held)  # two loads may find it out
            residents.give_back([held])
            model.main.remove(name)
            model.counts["device_chunks_damaged"] += 1
            del model.uses[name], slot_of[name]
    counts = tally.take()
    assert counts == {name: n for name, n in model.counts.items() if n}
    assert min(counts[f"device_chunks_{what}"] for what in ("hit", "admitted")) > 5
    assert counts["device_chunks_evicted"] > 0


def test_prompts_that_come_once_push_nothing_out() -> None:
    tally = Tally()
    residents = Residents(4, tally)
    hot = [f"hot {i}" for i in range(4)]
    for _ in range(2):
        _, wanted = residents.take(hot)
    for place in wanted:
        slot = residents.place(hot[place])
        assert slot is not None
        residents.enter(hot[place], slot)
    for number in range(1000):
        assert residents.take([f"once {number}"]) == ({}, set())
    assert len(residents.take(hot)[0]) == 4
    assert tally.take() == {"device_chunks_admitted": 4, "device_chunks_hit": 4}


def test_a_slot_that_was_not_filled_is_free() -> None:
    residents = Residents(1, Tally())
    residents.take(["a"])
    slot = residents.place("a")
    assert slot is not None
    assert residents.place("b") is None, "there is one slot"
    residents.free(slot)
    assert residents.place("b") == slot


def test_the_slot_of_what_was_damaged_is_free_when_nobody_reads_it() -> None:
    residents = Residents(1, Tally())
    residents.take(["a"])
    slot = residents.place("a")
    assert slot is not None
    residents.enter("a", slot)
    [one], [other] = (residents.take(["a"])[0].values() for _ in range(2))
    residents.drop("a", one)
    residents.give_back([one])
    assert residents.place("b") is None, "another load reads it"
    residents.give_back([other])
    assert residents.place("b") == slot
