"""What the harness costs: the time of a whole benchmark beside that of its calls of attacks.

    python -m advkit.benchmarks.overhead SUITE --model m.safetensors --data mnist-5k --rounds 3

Everything but the attacks counts as cost: loading, the looks at the models, clean answers, writing and reading rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from advkit.benchmarks import runner, suitefile


def measure(suite: suitefile.Suite, models: dict[str, str], data: str | None) -> tuple[float, float]:
    """The seconds of one benchmark, checks left out, and of the attacks in it."""
    began = time.perf_counter()
    records = runner.run(replace(suite, checks=False), models=models, data=data)
    whole = time.perf_counter() - began
    return whole, float(records.costs["seconds"].sum())


def main() -> None:
    """Print a line a round, and the median."""
    parser = argparse.ArgumentParser(description="What the harness costs on top of its attacks.")
    parser.add_argument("suite")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--data")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    suite = suitefile.read(arguments.suite)
    ratios = []
    for _ in range(arguments.rounds):
        whole, attacks = measure(suite, {Path(model).stem: model for model in arguments.model}, arguments.data)
        ratios.append(whole / attacks)
        print(f"whole {whole:.2f} s, attacks {attacks:.2f} s, ratio {ratios[-1]:.4f}")
    print(f"median ratio {statistics.median(ratios):.4f}")


if __name__ == "__main__":
    main()
