"""The mixing function of the generator splitmix64, on Python's integers and on tensors of them."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1
# Shifts and factors, round by round, and the last shift.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def mixed(*words: int) -> int:
    """64 well-mixed bits of several integers, chained."""
    state = 0
    for word in words:
        state = mixed_in(state, word)
    return state


def mixed_in(state: int, word: int) -> int:
    """One integer more."""
    state = (state ^ (word & _WORD)) + GOLDEN & _WORD
    for shift, factor in _ROUNDS:
        state = (state ^ (state >> shift)) * factor & _WORD
    return state ^ (state >> _LAST_SHIFT)


def each_mixed_in(state: int | Tensor, words: int | Tensor) -> Tensor:
    """The same for many at once: int64 tensors, signed as torch's are; one of the two may be an integer."""
    own, other = (int64(x) if isinstance(x, int) else x for x in (state, words))
    return output((own ^ other) + int64(GOLDEN))  # type: ignore[arg-type]


def output(states: Tensor) -> Tensor:
    """What the generator returns in these states."""
    for shift, factor in _ROUNDS:
        states = (states ^ shifted(states, shift)) * int64(factor)
    return states ^ shifted(states, _LAST_SHIFT)


def shifted(words: Tensor, shift: int) -> Tensor:
    """To the right, with zeros from the left: torch's own shift copies the sign."""
    return (words >> shift) & ((1 << (64 - shift)) - 1)


def int64(word: int) -> int:
    """The low 64 bits as a signed number."""
    word &= _WORD
    return word - 2**64 if word >= 2**63 else word
