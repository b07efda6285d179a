"""How fast agents are: seconds to a first update with cached captures, and the rate of an update beside the core's peak.

    python tools/bench_agents.py --json benchmarks/agents-speed.json

Run it on a machine that does nothing else. The update is PPO's with T=8, B=32 and an LSTM of 128, on states of 32 numbers
and 16 actions. Its kernels are then tuned by this project's own tuner, and the update is timed again, the two interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor
from tinygrad.helpers import GlobalCounters

import autotune
from agents.ppo import PPO, PPOConfig
from agents.protocol import Observation, Step
from agents.rollout import Rollout, Rollouts
from autotune.latency import core_peak

CONFIG = PPOConfig(steps=8, n_envs=32, hidden=128, epochs=1)
STATE, ACTIONS = 32, 16
FIRST_UPDATE_SECONDS = 5.0  # the bar
REPEATS = 15
START = """
import time; started = time.perf_counter()
import sys; sys.path[:0] = sys.argv[2:]
from bench_agents import first_update
first_update(sys.argv[1]); print(time.perf_counter() - started)
"""


class Noise:
    """Random states and rewards, all actions legal, no episode ends: only the shapes matter."""

    n_envs, state_dim, n_actions, action_dim = CONFIG.n_envs, STATE, ACTIONS, 0

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def reset(self, seed: int) -> Observation:
        return self._look()

    def step(self, actions: np.ndarray) -> Step:
        never = np.zeros(self.n_envs, bool)
        return Step(self._look(), self.rng.standard_normal(self.n_envs, np.float32), never, never)

    def _look(self) -> Observation:
        state = self.rng.standard_normal((self.n_envs, STATE), np.float32)
        return Observation(state, np.ones((self.n_envs, ACTIONS), bool))


def begun(cache_dir: str | Path) -> tuple[PPO, Rollout]:
    """A fresh agent and a rollout."""
    agent = PPO(STATE, ACTIONS, 0, CONFIG, 0, cache_dir)
    return agent, Rollouts(Noise(), agent).collect(CONFIG.steps)[0]


def first_update(cache_dir: str | Path) -> tuple[PPO, Rollout]:
    """These, and one update."""
    agent, rollout = begun(cache_dir)
    agent.update(rollout)
    return agent, rollout


def alone(code: str, *arguments: str) -> float:
    """A number that a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def interleaved(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, taken in turn."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            samples[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in samples.items()}


def flops_of(agent: PPO, rollout: Rollout) -> tuple[float, int]:
    """Operations and kernels of one update, as tinygrad counts them."""
    GlobalCounters.reset()
    agent.update(rollout)
    return float(GlobalCounters.global_ops), int(GlobalCounters.kernel_count)


def roofline(folder: Path, trials: int, seconds: float) -> dict[str, Any]:
    """The update with default schedules, with tuned ones, and one matmul of numpy's as the peak."""
    plain, rollout = first_update(folder / "plain")
    records = folder / "records.db"
    seen, tuned = (begun(folder / name)[0] for name in ("seen", "tuned"))
    with autotune.capture() as program:
        seen.update(rollout)
    report = autotune.tune(program, records=records, trials=trials, seconds=seconds)
    with autotune.apply(records) as applied:
        tuned.update(rollout)
    medians = interleaved({"default": lambda: plain.update(rollout), "tuned": lambda: tuned.update(rollout)})
    difference = np.abs(plain.policy.theta.numpy() - tuned.policy.theta.numpy()).max()  # after as many updates
    flops, kernels = flops_of(plain, rollout)
    peak = core_peak() / 1e9
    rates = {name: flops / s / 1e9 for name, s in medians.items()}
    batch = sum(x.nbytes for x in (rollout.state, rollout.mask, rollout.reset))
    slowest = sorted(report.kernels, key=lambda k: -k.calls * k.tuned_seconds)[:6]
    return {
        "flops": flops, "kernels": kernels, "batch_bytes": batch, "seconds": medians, "gflops": rates, "peak_gflops": peak,
        "share_of_peak": {name: rate / peak for name, rate in rates.items()}, "speedup": medians["default"] / medians["tuned"],
        "distinct_kernels": len(report.kernels), "tuned_kernels": applied.tuned, "trials": sum(k.trials for k in report.kernels),
        "kernel_ms": {"hand_coded": report.hand_coded_seconds * 1e3, "tuned": report.tuned_seconds * 1e3},
        "parameters_differ_by": float(difference),
        "slowest": [{"kernel": k.kernel.name, "calls": k.calls, "ms": k.calls * k.tuned_seconds * 1e3,
                     "gflops": k.kernel.operations / k.tuned_seconds / 1e9} for k in slowest],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=16, help="for each kernel of the update")
    parser.add_argument("--seconds", type=float, default=480.0, help="of tuning at most")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    Tensor.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [str(folder / "start"), str(Path(__file__).parent), str(Path(__file__).parents[1])]
        (folder / "start").mkdir(mode=0o700)
        starts = {"captured": alone(START, *paths), "cached": statistics.median(alone(START, *paths) for _ in range(3))}
        found = {"device": os.environ.get("DEV", ""), "first_update_seconds": starts, "bar_seconds": FIRST_UPDATE_SECONDS,
                 "update": roofline(folder, args.trials, args.seconds)}  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    met = starts["cached"] < FIRST_UPDATE_SECONDS
    print(f"first update with cached captures: bar under {FIRST_UPDATE_SECONDS} s, figure {starts['cached']:.2f} s, "
          f"without a cache {starts['captured']:.2f} s: {'met' if met else 'MISSED'}")  # fmt: skip
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
