"""Runs what compares the methods fairly on the demo's tasks, all tuned alike, and keeps a row for each in runs.csv.

    python results/make.py            # about three hours on two CPU cores; goes on where it stopped

First the tuning: the six settings of GRID for each method, on TUNING_TASKS with TUNING_SEED. A method has one setting for
all tasks: the one with the highest score of the best target, as a mean over the tuning tasks, on a seed that the table
does not use. Then each method with its setting on TASKS with SEEDS. The grid, the tasks and the seeds were written down
here before the runs. A run that has a row is not run again. Two runs go on at a time with one thread each.
"""

import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
COLUMNS = ["task", "method", "options", "seed", "best_target", "best_return", "best_score", "mean_return", "mean_score"]
COLUMNS += ["text_loss_before", "text_loss_after", "commit"]
TASKS = {
    "hopper 10%": "--env hopper --ratio 0.1",
    "reacher2d": "--env reacher2d",
    "kitchen-partial": "--env kitchen-partial",
}
TUNING_TASKS = ["hopper 10%", "kitchen-partial"]  # one with dense rewards, one with sparse ones
TUNING_SEED = 100
SEEDS = [0, 1, 2, 3, 4]
GRID = {  # six settings for each method
    method: [f"--lr {lr} {other}" for lr, other in itertools.product(("1e-3", "3e-3", "1e-2"), others)]
    for method, others in {
        "lamo": ("--lora-rank 16", "--lora-rank 64"),
        "dt": ("--dropout 0", "--dropout 0.1"),
        "wiki-rl": ("--dropout 0", "--dropout 0.1"),
    }.items()
}


def finished():
    """The rows of runs.csv, as dicts by column, by job: task, method, options and seed."""
    path = HERE / "runs.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    return {(row["task"], row["method"], row["options"], int(row["seed"])): row for row in rows}


def train(job):
    """One run of lamo.py, and its row at the end of runs.csv."""
    task, method, options, seed = job
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = f"lamo.py --demo {TASKS[task]} --method {method} {options} --seed {seed} --out {out}"
        subprocess.run(
            [sys.executable, *command.split()], cwd=HERE.parent, capture_output=True, check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        scores = json.loads((out / "scores.json").read_text())
        header = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    best, targets = scores["best"], scores["targets"].values()
    row = dict(zip(COLUMNS, job)) | {
        "best_target": best["target"], "best_return": best["return_mean"], "best_score": best["score"],
        "mean_return": np.mean([row["return_mean"] for row in targets]),
        "mean_score": np.mean([row["score"] for row in targets]),
        "text_loss_before": scores["text_loss_before"], "text_loss_after": scores["text_loss_after"],
        "commit": header["commit"],
    }  # fmt: skip
    new = not finished()
    with (HERE / "runs.csv").open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    print(*job, f"{best['return_mean']:.2f}", flush=True)


def run(jobs):
    """Those of the jobs that have no row yet, two at a time."""
    done = finished()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, [job for job in jobs if job not in done]))


def tuned():
    """The best setting of GRID for each method."""
    rows = finished()

    def score(method, options):
        return np.mean([float(rows[task, method, options, TUNING_SEED]["best_score"]) for task in TUNING_TASKS])

    return {method: max(grid, key=lambda options: score(method, options)) for method, grid in GRID.items()}


def main():
    settings = [(method, options) for turn in zip(*GRID.values()) for method, options in zip(GRID, turn)]
    run([(task, *setting, TUNING_SEED) for setting in settings for task in TUNING_TASKS])
    best = tuned()
    print(best, flush=True)
    run([(task, *setting, seed) for seed in SEEDS for task in TASKS for setting in best.items()])


if __name__ == "__main__":
    main()
