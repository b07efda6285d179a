"""Where the next trials of a program pay most: calls x time x what a few more trials promise to save of it.

A strategy that has a simulator promises what its best candidates are believed to gain (`MixedSearch.promise`). A simulator
that promises what the device does not keep is believed less with every visit that brought nothing. It knows well what the first
trials of a kernel bring, and nothing of later ones: these find what it did not expect. So no visit is taken to gain less than
visits of so many trials do on average: what is left to be gained after n of them is about LEFT / (n + 1). A kernel's first visit
is of one trial: what that shows says more of where the next ones pay than any promise. The second completes its first batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autotune.kernel import Kernel
from autotune.search.acquisition import BATCH

VISIT = 8  # trials of a visit, but the first two
DRY = 0.5  # share of a promise that is left after a visit without gain
LEFT = 0.8  # log2 units; of validation kernels, .39 were left after 1 trial, .23 after 3, .09 after 7 and .05 after 15
LEAST = 0.02  # log2 units: less than that is no gain, but luck of the timer
FROZEN = 2e-3  # share of the program's time: kernels that take less are not visited


@dataclass
class Account:
    """What has become of one kernel so far."""

    kernel: Kernel
    calls: int
    dry: int = 0  # visits in a row that brought nothing
    closed: bool = False  # its strategy has nothing new to say, or it does not run here


class Spending:
    """Picks the kernel to visit next. `seconds` says how long a kernel takes at present, None where it does not run;
    `promise` what its strategy promises of so many trials, in log2 units, None where it cannot say; `made` how many trials it
    has had."""

    def __init__(self, kernels: Sequence[Kernel], calls: Mapping[str, int], seconds: Callable[[Kernel], float | None],
                 promise: Callable[[Kernel, int], float | None], made: Callable[[Kernel], int]):  # fmt: skip
        self.accounts = {k.key: Account(k, calls[k.key]) for k in kernels}
        self.seconds, self.promise, self.made = seconds, promise, made
        # of the program, that each takes at present
        self._seconds = {key: self._own(account) for key, account in self.accounts.items()}
        # with each trial of a visit; what others' trials teach of a kernel is heard when it is asked anew, after its own next visit
        self._savings: dict[str, float] = {}

    def next(self) -> Kernel | None:
        """The kernel whose visit saves most with each trial; None where there is nothing more to say of any that takes time."""
        total = sum(self._seconds.values())
        for key, account in self.accounts.items():
            if self._seconds[key] < FROZEN * total:
                self._savings.pop(key, None)  # others may become as fast
            elif key not in self._savings:
                self._savings[key] = 0.0 if account.closed else self.saving(account) / self.size(account.kernel)
        best = max(self._savings, key=self._savings.__getitem__, default=None)
        return None if best is None or not self._savings[best] else self.accounts[best].kernel

    def size(self, kernel: Kernel) -> int:
        """Trials of the next visit."""
        made = self.made(kernel)
        return VISIT if made >= BATCH else BATCH - made if made else 1

    def saving(self, account: Account) -> float:
        """Seconds of the program that one more visit promises to save."""
        return self._seconds[account.kernel.key] * (1.0 - 2.0 ** -self.gain(account))

    def gain(self, account: Account) -> float:
        """Expected log2 speedup of a visit."""
        size, made = self.size(account.kernel), self.made(account.kernel)
        promised = self.promise(account.kernel, size) or 0.0
        return max(promised * DRY**account.dry, LEFT / (made + 1) - LEFT / (made + 1 + size))

    def visited(self, kernel: Kernel, before: float | None, trials: int) -> None:
        """Note a visit of so many trials, before which the kernel took `before` seconds."""
        account, after = self.accounts[kernel.key], self.seconds(kernel)
        self._seconds[kernel.key] = self._own(account)
        self._savings.pop(kernel.key, None)
        account.closed = trials == 0
        gained = before is not None and after is not None and math.log2(before / after) >= LEAST
        account.dry = 0 if gained else account.dry + 1

    def _own(self, account: Account) -> float:
        return account.calls * (self.seconds(account.kernel) or 0.0)
