"""What recorded trials teach of other schedules (tools/bench_correction.py), on a few kernels of the kept records."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune import corpus
from autotune.compiler import renderer_of
from autotune.files import DATA
from autotune.guide import Guide

CPU = renderer_of("CPU")
KEPT = Path(__file__).resolve().parents[2] / "benchmarks" / "records-mobilenet-v1-cpu.jsonl.gz"


@pytest.fixture
def bench(tool):
    return tool("bench_correction")


def test_relatives_teach_more_than_a_kernels_own_trials_and_those_more_than_nothing(bench):
    """Bar: of pairs two hundredths more by relatives where the kernel has no trial of its own (seen: five), one after four (seen:
    two). A correction of noise alone would score as nothing does."""
    histories = bench.histories_of(KEPT, CPU)
    assert not {k.key for k in corpus.load("train")} & set(histories)
    found = bench.bench(histories, Guide.load(DATA / "guide-cpu"), CPU, seeds=1)
    pairs = {(s["corrected by"], s["own trials"]): s["pairwise"] for s in found["scores"]}
    print(pairs)
    assert found["kernels"] >= 10
    assert pairs["relatives", 0] > pairs["own", 0] + 0.02 and pairs["relatives", 4] > pairs["own", 4] + 0.01
    assert pairs["own", 4] > pairs["nothing", 4] + 0.01
    assert pairs["own", 0] == pytest.approx(pairs["nothing", 0], abs=0.02)  # two baselines say little
