"""Which of many candidates are measured next: a batch chosen from what an ensemble believes of each.

Three kinds of score, all in log2 seconds and minimised: `thompson` is in the first slot the upper bound mean + KAPPA std,
since the least of many means is the luckiest one (the winner's curse: of all candidates the surest to be fast is wanted
there), and one random member in each other (Thompson 1933; of ensembles Lu and Van Roy 2017), `ucb` the lower confidence bound mean - KAPPA std
(Cox and John 1992; Srinivas et al. 2010), `greedy` the mean. Whatever the kind, a batch keeps its distance from itself:
every choice pushes those like it back (compare local penalisation, Gonzalez et al. 2016). The last slot of two and more goes
where nothing was measured: what is like anything known is pushed back by a whole AWAY. Members that learned from the same
trials are wrong together, and a search that believes them measures one kind of schedule again and again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from autotune.errors import UsageError

KINDS = ("thompson", "ucb", "greedy")
BATCH = 4  # candidates chosen at once: enough to compile in parallel, few enough to learn from
KAPPA = 1.0  # standard deviations that `ucb` grants to doubt, and `thompson` holds against it in its first slot
CROWDING = 0.5  # log2 units by which a chosen candidate pushes back its like in the same batch
AWAY = 1.0  # and by which all that was chosen or measured does in the last slot; chosen on validation kernels


def choose(members: np.ndarray, similarity: Callable[[int], np.ndarray], rng: np.random.Generator, count: int = BATCH,
           kind: str = "thompson", known: np.ndarray | None = None, crowding: float = CROWDING,
           away: float | None = AWAY) -> list[int]:  # fmt: skip
    """Up to `count` different candidates, in the order in which they were chosen.

    `members` [M, C] is each member's log2 time of each candidate, finite; `similarity(i)` [C], from 0 to 1, how like
    candidate i each of them is (`matrix.__getitem__`, where there is a matrix); `known` [C] the greatest similarity of each to
    what was measured before (None: nothing was). The last slot of two and more is for what is unlike all chosen or measured:
    the least of mean + `away` times similarity; with None it is a slot like any other. Of equals the first is taken. Only
    `thompson` draws from `rng`. Raises UsageError for an unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown acquisition {kind!r}; choose one of {', '.join(KINDS)}")
    candidates = members.shape[1]
    count = min(count, candidates)
    if count <= 0:
        return []
    free = np.ones(candidates, bool)
    crowd = np.zeros(candidates)  # greatest similarity to what this batch holds
    chosen: list[int] = []
    for slot in range(count):
        if away is not None and 0 < slot == count - 1:
            score = members.mean(0) + away * (crowd if known is None else np.maximum(crowd, known))
        else:
            score = _believed(members, kind, slot, rng) + crowding * crowd
        chosen.append(int(np.where(free, score, np.inf).argmin()))
        free[chosen[-1]] = False
        if slot + 1 < count:
            crowd = np.maximum(crowd, similarity(chosen[-1]))
    return chosen


def _believed(members: np.ndarray, kind: str, slot: int, rng: np.random.Generator) -> np.ndarray:
    """The log2 time by which one slot judges the candidates [C]."""
    if kind == "thompson" and slot > 0:
        return members[int(rng.integers(len(members)))]
    sign = {"thompson": 1.0, "ucb": -1.0, "greedy": 0.0}[kind]
    return members.mean(0) + sign * KAPPA * members.std(0)
