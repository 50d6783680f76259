"""Which words the spelling dictionary is told, and how often."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from workers import spelling
from workers.spelling import Dictionary


class Database:
    """Counts what is added."""

    def __init__(self) -> None:
        self.frequency: Counter[str] = Counter()
        self.writes = 0

    def add_spelling(self, word: str, more: int) -> None:
        assert more > 0
        self.frequency[word] += more
        self.writes += 1


def test_dictionary_notes_words_and_nothing_else() -> None:
    dictionary, database = Dictionary(), Database()
    dictionary.read("The Café's (grand) opening: 2024 at b4 x " + "y" * 40 + " 東京都の図書館")
    dictionary.write(database, 1)
    assert set(database.frequency) >= {"the", "café", "grand", "opening"}
    assert not {"2024", "at", "b", "x", "東京都の図書館"} & set(database.frequency)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_dictionary_knows_a_frequency_within_a_factor_of_four(counts: list[int]) -> None:
    dictionary, database = Dictionary(), Database()
    for count in counts:
        dictionary.read("word " * count)
        dictionary.write(database, 1)
    assert database.frequency["word"] <= sum(counts) < 4 * database.frequency["word"]
    assert database.writes <= 6


def test_dictionary_writes_several_batches_together_when_it_is_busy() -> None:
    dictionary, database = Dictionary(), Database()
    written = []
    for number in range(2 * spelling.WAIT):
        dictionary.read(f"word{'abcdefghijklmnopqrst'[number]}")
        dictionary.write(database, spelling.BUSY)
        written.append(database.writes)
    # The first batch at once, so that a small index has its suggestions.
    assert written == [1] * 10 + [11] * 10
    dictionary.write(database, 1)
    assert database.writes == 20


def test_dictionary_starts_anew_when_it_remembers_too_much() -> None:
    dictionary, database = Dictionary(), Database()
    for number in range(spelling.KEPT // 1000 + 2):
        dictionary.read(" ".join(f"{number}x{n}" for n in range(1000)))
        dictionary.write(database, 1)
    assert len(dictionary._counts) < spelling.KEPT
