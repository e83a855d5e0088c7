"""The generator splitmix64 (Steele, Lea and Flood, OOPSLA 2014) in Python's integers."""

from __future__ import annotations

WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def output(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def next_of(state: int) -> int:
    return (state + GOLDEN) & WORD


def chained(*words: int) -> int:
    """One word of several, each mixed into what the ones before it gave."""
    state = 0
    for word in words:
        state = output(next_of(state ^ (word & WORD)))
    return state


def uniform(seed: int, step: int, stream: int, count: int) -> list[float]:
    """Numbers in [0, 1), 53 bits each, of the generator that starts where the three words lead."""
    state = chained(seed, step, stream)
    found = []
    for _ in range(count):
        state = next_of(state)
        found.append((output(state) >> 11) * 2.0**-53)
    return found
