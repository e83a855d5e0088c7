"""Counts of events, and the message to the user about missing scores."""

from __future__ import annotations

from collections import Counter


class Seen:
    """Counts of events, in total and since the last score."""

    def __init__(self) -> None:
        """Start with all counts at 0."""
        self.total: Counter[str] = Counter()
        self.recent: Counter[str] = Counter()

    def note(self, what: str) -> None:
        """Count an event."""
        self.total[what] += 1
        self.recent[what] += 1

    def note_score(self) -> None:
        """Clear the recent counts, since a pass was scored."""
        self.recent.clear()


def why_silent(seen: Seen, *, compiled: bool) -> str:
    """Describe for the user why no pass may have been scored recently."""
    recent = seen.recent
    reasons = []
    uncalled = _uncalled(recent)
    if compiled and (uncalled or not recent["heads"]):
        reasons.append(
            "the model was compiled, or another one of its class: build the monitor before the first call of the "
            "compiled model, or call torch._dynamo.reset()"
        )
    reasons += uncalled
    if recent["forwards"] and not recent["heads"]:
        reasons.append("the head's hook did not fire: the head was replaced, or only its weights are used")
    elif not recent["forwards"] and recent["reruns"]:
        reasons.append(
            "the whole model is inside reentrant activation checkpointing, whose first run has no gradients: use "
            "checkpoint(..., use_reentrant=False)"
        )
    elif not recent["forwards"]:
        reasons.append(
            "no forward of the model in training mode was seen (fine-tuning in eval mode: train_only=False; "
            "torch.func transforms are not watched: call loss.backward())"
        )
    elif recent["thrown"]:
        reasons.append(
            "zero_grad (or monitor.reset) came between backward and step, and the scores went with the gradients: call "
            "it before backward"
        )
    elif not recent["passes"] and recent["to inputs"]:
        reasons.append(
            "backward reached the head's output and no parameter (torch.autograd.grad to the inputs, frozen parameters)"
        )
    elif not recent["passes"]:
        reasons.append("no backward reached the head's output (frozen model, or no loss on it)")
    elif recent["unscored"]:
        reasons.append("no labels or no features came with the pass: call monitor.observe(labels)")
    reasons.append(
        ("otherwise: " if reasons else "")
        + "model compiled before the monitor was built, wrong or replaced head, head used functionally, frozen model"
    )
    return "; ".join(reasons)


def _uncalled(recent: Counter[str]) -> list[str]:
    missing = [
        w.split(":", 1)[1] for w, n in recent.items() if w.startswith("missing:") and n >= recent["forwards"]
    ]
    return [
        f"the encoder of {name!r} was never called: give the module that the model calls" for name in missing
    ]
