"""The default suite beside AutoAttack's standard version: robust accuracy, time, and what each finds that the other misses.

    git clone https://github.com/fra31/auto-attack
    python -m advkit.benchmarks.autoattack --autoattack auto-attack --data DATA --threat "linf(0.3)" --model robust.safetensors

AutoAttack is the authors' code at its full settings (APGD-CE, targeted APGD and targeted FAB with 100 steps and 9 targets,
Square with 5,000 queries). Both see the same examples in the same batches, one after the other in the same process; times are
CPU seconds of one thread. ``--keep`` writes which examples AutoAttack left standing to a file, and reads them from there the
next time. With ``--parts``, Auto-PGD and its targeted version alone beside the authors', at 100 steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit.attacks import APGD, APGDL1, MultiTargeted
from advkit.benchmarks.evaluate import evaluate
from advkit.benchmarks.plan import parse_ball
from advkit.data import from_tensors
from advkit.engine import Attack, frozen, run
from advkit.norms import norm_name
from advkit.threat import Lp

BATCH = 250


def autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: Lp) -> tuple[Tensor, float]:
    """Which rows the authors' standard version leaves standing, (N,) bool, and its CPU seconds."""
    from autoattack import AutoAttack  # type: ignore[import-not-found]

    norm = norm_name(threat.p).replace("l_", "L")
    began = time.process_time()
    with torch.random.fork_rng(devices=[]):
        adversary = AutoAttack(model.eval(), norm=norm, eps=threat.eps, version="standard", device="cpu", seed=0)
        with torch.enable_grad():
            x_adv = adversary.run_standard_evaluation(x, y, bs=BATCH)
    seconds = time.process_time() - began
    with torch.no_grad(), frozen(model):
        right = torch.cat([model(part).argmax(1) for part in x_adv.split(BATCH)]) == y
    assert bool(Lp(threat.p, threat.eps * (1 + 1e-5) + 1e-6).allows(x_adv, x).all()), "outside the threat model"
    return right, seconds


def parts(model: nn.Module, x: Tensor, y: Tensor, threat: Lp) -> None:
    """Auto-PGD with each loss, and its targeted version with 9 targets, beside the authors' own."""
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted  # type: ignore[import-not-found]

    norm, make = norm_name(threat.p).replace("l_", "L"), APGDL1 if threat.p == 1 else APGD
    given = {"n_iter": 100, "norm": norm, "eps": threat.eps, "n_restarts": 1, "seed": 0, "device": "cpu", "verbose": False}
    given["use_largereps"] = threat.p == 1
    for loss in ("ce", "dlr", "targeted"):
        theirs = APGDAttack_targeted(model, n_target_classes=9, **given) if loss == "targeted" else None
        theirs = theirs or APGDAttack(model, loss=loss, **given)
        theirs.eps_orig = threat.eps
        attack: Attack = MultiTargeted(make(100), 9, "dlr") if loss == "targeted" else make(100, loss)
        began = time.process_time()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            z = torch.cat([theirs.perturb(a, b) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)])
        middle = time.process_time()
        results = [run(attack, model, a, b, threat) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]
        ended = time.process_time()
        with torch.no_grad(), frozen(model):
            right = (model(z).argmax(1) == y) & (model(x).argmax(1) == y)
        robust = 1 - float(torch.cat([result.success for result in results]).float().mean())
        print(f"  APGD {loss:8} authors {100 * float(right.float().mean()):.2f} % in {middle - began:.1f} s", end="")
        print(f", advkit {100 * robust:.2f} % in {ended - middle:.1f} s", flush=True)


def kept(path: Path | None, key: str, make: Any) -> tuple[Tensor, float]:
    """What ``make`` returns, or what a file has kept of it."""
    known = json.loads(path.read_text()) if path is not None and path.exists() else {}
    if key not in known:
        right, seconds = make()
        known[key] = {"right": right.tolist(), "seconds": seconds}
        if path is not None:
            path.write_text(json.dumps(known))
    return torch.tensor(known[key]["right"]), known[key]["seconds"]


def main() -> None:
    """Compare on the checkpoints given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoattack", required=True, help="the folder of the authors' code")
    parser.add_argument("--data", required=True)
    parser.add_argument("--threat", required=True)
    parser.add_argument("--model", required=True, action="append")
    parser.add_argument("--examples", type=int, default=1000, help="how many test images (default 1000)")
    parser.add_argument("--attack", action="append", help="in place of the default suite")
    parser.add_argument("--parts", action="store_true", help="Auto-PGD alone")
    parser.add_argument("--keep", type=Path, help="a JSON file for AutoAttack's results")
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.autoattack)
    torch.set_num_threads(1)
    data = data_by_name.load(arguments.data, split="test")
    threat = parse_ball(arguments.threat, data)
    x, y = data.batch(0, arguments.examples)
    for name in arguments.model:
        model = models_by_name.load(name).module
        assert isinstance(model, nn.Module)
        if arguments.parts:
            print(f"{name}, {arguments.threat}, {len(x)} examples")
            parts(model, x, y, threat)
            continue
        key = f"{name} {arguments.threat} {len(x)}"
        theirs, slow = kept(arguments.keep, key, lambda model=model: autoattack(model, x, y, threat))
        began = time.process_time()
        result = evaluate(model, from_tensors(x, y), threat=threat, attacks=arguments.attack, batch_size=BATCH, quantize=False)
        quick = time.process_time() - began
        ours = torch.tensor([row["correct"] and not row["success"] for row in result.rows])
        show(name, theirs, slow, ours, quick)
        for row in result.by_attack():
            print(f"  {row['attack']:60} on {row['examples']:5} broke {row['broke']:5} {row['seconds']:8.1f} s", flush=True)


def show(name: str, theirs: Tensor, slow: float, ours: Tensor, quick: float) -> None:
    """Print one comparison."""
    union = theirs & ours
    accuracies = [100 * float(left.float().mean()) for left in (theirs, ours, union)]
    print(f"{name}: AutoAttack {accuracies[0]:.2f} % in {slow:.1f} s, advkit {accuracies[1]:.2f} % in {quick:.1f} s", end="")
    print(f" ({quick / slow:.3f} of the time); union {accuracies[2]:.2f} %", end="")
    print(f"; only AutoAttack broke {int((ours & ~theirs).sum())}, only advkit {int((theirs & ~ours).sum())}", flush=True)


if __name__ == "__main__":
    main()
