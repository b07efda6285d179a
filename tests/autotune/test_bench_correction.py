"""What recorded trials teach of other schedules (tools/bench_correction.py), on a few kernels of the kept records."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune import corpus
from autotune.compiler import renderer_of
from autotune.guide import SHIPPED, Guide

CPU = renderer_of("CPU")
KEPT = Path(__file__).resolve().parents[2] / "benchmarks" / "records-mobilenet-v1-cpu.jsonl.gz"


@pytest.fixture
def bench(tool):
    return tool("bench_correction")


def test_relatives_teach_more_than_a_kernels_own_trials_and_those_more_than_nothing(bench):
    """Bar: of pairs three hundredths more by relatives. A correction of noise alone would score as nothing does."""
    histories = bench.histories_of(KEPT, CPU)
    assert len(histories) == 70 and not {k.key for k in corpus.load("train")} & set(histories)
    of_reduces = {key: own for key, own in histories.items() if "/" in own[0].name}
    found = bench.bench(of_reduces, Guide.load(SHIPPED / "guide-cpu"), CPU, seeds=1)
    pairs = {(s["corrected by"], s["own trials"]): s["pairwise"] for s in found["scores"]}
    print(pairs)
    assert found["kernels"] >= 10
    assert pairs["relatives", 0] > pairs["own", 0] + 0.03 and pairs["relatives", 4] > pairs["own", 4] + 0.03
    assert pairs["own", 8] > pairs["nothing", 8]
    assert pairs["own", 0] == pytest.approx(pairs["nothing", 0], abs=0.02)  # two baselines say little
