"""What monitors add to a training step, paired: python tests/benchmarks/monitor_overhead.py [STEPS]

One loop on a tiny Llama (batch 8, 64 tokens). Every step is timed whole, and beside it the time spent in the monitors'
own calls within it; the share is that of a whole window from look to look, since a look costs and the steps between do
not. In CPU time of the one thread, which other processes do not disturb; median and range over windows.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from fixtures.subjects import build
from lmconform import monitors

EVERY = 10


def measure(names: list[str], steps: int) -> tuple[list[float], float]:
    """The monitors' share of the step in percent, window by window, and the step in milliseconds."""
    torch.manual_seed(0)
    model = build("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    watching = monitors.Monitors(
        monitor for monitor in monitors.standard(eos_token_id=2, every=EVERY) if type(monitor).__name__ in names
    )
    whole, own = [], []
    for _ in range(steps):
        ids = torch.randint(3, 90, (8, 64))
        started = time.thread_time()
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        before = time.thread_time()
        watching.step(
            model=model, optimizer=optimizer, scheduler=scheduler, logits=output.logits.detach(),
            loss=output.loss.detach(), labels=ids, input_ids=ids, total=steps,
        )  # fmt: skip
        spent = time.thread_time() - before
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        own.append(spent)
        whole.append(time.thread_time() - started - spent)
    windows = range(2 * EVERY, steps - 2 * EVERY + 1, 2 * EVERY)
    shares = [100 * sum(own[i : i + 2 * EVERY]) / sum(whole[i : i + 2 * EVERY]) for i in windows]
    return shares, 1000 * statistics.median(whole)


def main() -> None:
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    every = ["CollapseMonitor", "GradientMonitor", "UpdateMonitor", "EffectiveRateMonitor", "ReplicaMonitor"]
    for names in (*([name] for name in every), every):
        shares, step = measure(names, steps)
        print(
            f"{names[0] if len(names) == 1 else 'all five':24} {statistics.median(shares):6.2f} % "
            f"[{min(shares):.2f}, {max(shares):.2f}] of a step of {step:.1f} ms"
        )


if __name__ == "__main__":
    main()
