"""Runs of benchmarks that take no time."""

import os
import signal
import sys
import time
from pathlib import Path


def run(configs, options, folder):
    """Score 0.1 for each unit of ``lr``, one second per step of which ``speed`` go into a second."""
    what = options.get("what", "measure")
    if what == "crash":
        raise RuntimeError("this one\nbreaks")
    if what == "exit":
        print("usage: x\nerror: a bad option", file=sys.stderr)
        sys.exit(2)
    if what == "package":
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    if what == "memory":
        raise MemoryError("too much")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hog":
        ballast = bytearray(2**30)
        ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])
        time.sleep(60)
    if what == "sleep":
        time.sleep(60)
    steps = options.get("trainer.max_steps", 100)
    seconds = steps / options.get("speed", 1)
    if what == "diverged":
        return {"val_accuracy": float("nan"), "val_loss": float("nan")}
    if what == "without metric":
        return {"val_f1": 0.5}
    score = min(1.0, 0.1 * options.get("lr", 1) + 0.001 * options.get("seed_everything", 0))
    texts = [Path(path).read_text() for path in configs]
    memory = {"parameters": 4.0, "gradients": 2.0, "state": 2.0, "residual": 1.0, "total": 9.0}
    return {
        "step": steps,
        "seconds": seconds,
        "cpu_seconds": seconds,
        "seconds_per_step": seconds / steps,
        "cpu_seconds_per_step": seconds / steps,
        "val_accuracy": score,
        "val_loss": 1 - score,
        "texts": texts,
        "memory": memory,
        "memory_by_group": {"a": memory, "b": memory},
        "losses": [{"seconds": float(s), "cpu_seconds": float(s), "loss": 1 / s} for s in range(1, 1 + min(steps, 50))],
        "curve": [
            {"step": s, "tokens": 7 * s, "seconds": t, "cpu_seconds": t, "val_accuracy": score / 2, "val_loss": 1.0}
            for s, t in ((1, seconds / steps), (steps, seconds))
        ],
    }
