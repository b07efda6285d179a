"""The data card: what a records file holds of this device, in numbers that say what can be learned from it."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from autotune.corpus import split_of
from autotune.records import Records, Trial
from sims.metrics import noise_ceiling


@dataclass(frozen=True)
class Card:
    """Counts of trials (baselines left out), and how much of their spread is noise. Sigmas in log2 seconds."""

    kernels: dict[str, int]  # by split, and by family as "split/family"
    trials: dict[str, int]  # by split
    strategies: dict[str, int]
    verdicts: dict[str, int]
    binaries: int  # timed trials without those whose kernel has an earlier one with the same code
    sigma: float  # spread of the measured times of one kernel's binaries, mean over kernels
    sigma_noise: float  # of one measurement, from binaries that were measured twice; NaN where none was
    repeated: int  # pairs of measurements that this rests on

    @property
    def ceiling(self) -> float:
        """The pairwise accuracy that a perfect simulator would reach against these times (sims.metrics.noise_ceiling)."""
        known = not math.isnan(self.sigma_noise) and self.sigma > 0
        true = math.sqrt(max(0.0, self.sigma**2 - self.sigma_noise**2))  # what was measured holds the noise, too
        return noise_ceiling(true, self.sigma_noise) if known else math.nan

    @property
    def censored(self) -> float:
        """Share of trials that gave no time."""
        total = sum(self.verdicts.values())
        return 1 - self.verdicts.get("ok", 0) / total if total else math.nan

    def table(self) -> str:
        """For people."""
        if not self.verdicts:
            return "no trials on record"
        splits = [s for s in self.kernels if "/" not in s]
        lines = [f"{s:12} {self.kernels[s]:5} kernels {self.trials[s]:7} trials   " +
                 ", ".join(f"{name.split('/')[1]} {n}" for name, n in self.kernels.items() if name.startswith(f"{s}/"))
                 for s in splits]  # fmt: skip
        lines.append("strategies   " + ", ".join(f"{name or 'unnamed'} {n}" for name, n in self.strategies.items()))
        lines.append("verdicts     " + ", ".join(f"{name} {n}" for name, n in self.verdicts.items())
                     + f"; without a time: {self.censored:.1%}")  # fmt: skip
        lines.append(f"binaries     {self.binaries} different ones")
        lines.append(f"noise        {self._noise()}")
        return "\n".join(lines)

    def _noise(self) -> str:
        if math.isnan(self.ceiling):
            return "unknown: no binary was measured twice"
        return (f"{2**self.sigma_noise - 1:.1%} of a time ({self.repeated} pairs of one binary), times of a kernel spread by "
                f"{2**self.sigma:.2f}x: no simulator can order more than {self.ceiling:.1%} of pairs as measured")  # fmt: skip


def card_of(records: Records, fingerprint: str) -> Card:
    """The card of everything on record for one device."""
    kernels, trials, strategies, verdicts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    spreads, differences, binaries = [], [], 0
    for kernel in records.kernels():
        tried = [t for t in records.history(kernel.key, fingerprint).trials if t.kind == "trial"]
        if not tried:
            continue
        split = split_of(kernel)
        kernels.update((split, f"{split}/{kernel.family}"))
        trials[split] += len(tried)
        strategies.update(t.strategy for t in tried)
        verdicts.update(t.verdict for t in tried)
        times = _times_by_binary(tried)
        binaries += len(times)
        differences += [a - b for same in times.values() for a, b in combinations(same[:3], 2)]
        if len(times) > 1:
            spreads.append(statistics.stdev(same[0] for same in times.values()))
    noise = statistics.median(map(abs, differences)) / (0.6745 * math.sqrt(2)) if differences else math.nan
    return Card(dict(sorted(kernels.items())), dict(trials), dict(strategies.most_common()), dict(verdicts.most_common()),
                binaries, statistics.mean(spreads) if spreads else 0.0, noise, len(differences))  # fmt: skip


def _times_by_binary(trials: Iterable[Trial]) -> dict[str, list[float]]:
    """log2 seconds of each code hash, in the order measured."""
    times = defaultdict(list)
    for trial in trials:
        if trial.seconds is not None:
            times[trial.code_hash].append(math.log2(trial.seconds))
    return times
