"""Runs what compares the methods fairly on the demo's tasks, and keeps a row for each run in runs.csv.

    python results/make.py            # many hours on two CPU cores; goes on where it stopped, the first questions first
    python -m results.report          # table.md and the pictures, of what has been run

For each of QUESTIONS, its methods are tuned, then run. Tuning tries the settings of GRID on TUNING_TASKS with TUNING_SEED,
which the tables do not use. A method has one setting for all tasks: the one with the highest score of the best target, as
a mean over the tuning tasks. It then runs with each of SEEDS. All of this was written down here before the runs that it is
about. A run that has a row is not run again. Two runs go on at a time, with one thread each.
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
COLUMNS = [
    "task",
    "method",
    "options",
    "seed",
    "best_target",
    "best_return",
    "best_score",
    "mean_return",
    "mean_score",
]
COLUMNS += ["text_loss_before", "text_loss_after", "commit"]
TASKS = {
    "hopper": "--env hopper",
    "hopper 30%": "--env hopper --ratio 0.3",
    "hopper 10%": "--env hopper --ratio 0.1",
    "hopper 3%": "--env hopper --ratio 0.03",
    "hopper delayed": "--env hopper --delayed",
    "halfcheetah": "--env halfcheetah",
    "halfcheetah 10%": "--env halfcheetah --ratio 0.1",
    "walker2d": "--env walker2d",
    "walker2d 10%": "--env walker2d --ratio 0.1",
    "reacher2d": "--env reacher2d",
    "kitchen-complete": "--env kitchen-complete",
    "kitchen-mixed": "--env kitchen-mixed",
    "kitchen-partial": "--env kitchen-partial",
    "kitchen-partial 30%": "--env kitchen-partial --ratio 0.3",
    "kitchen-partial 10%": "--env kitchen-partial --ratio 0.1",
    "kitchen-partial 3%": "--env kitchen-partial --ratio 0.03",
}
COMPARED = {"lamo": "--method lamo", "dt": "--method dt", "wiki-rl": "--method wiki-rl"}
VARIANTS = {  # of LaMo
    "random trunk": "--lm none --lang-coef 0",
    "no language loss": "--lang-coef 1e-9",  # as good as 0, but the loss on held-out text is measured
    "all trained": "--lora-rank 0 --train-trunk",
    "random trunk, all trained": "--lm none --lang-coef 0 --lora-rank 0 --train-trunk",
    "no LoRA": "--lora-rank 0 --lang-coef 0",  # a frozen trunk keeps its language by itself
    "linear embedders": "--embed linear",
}
LARGER = {"larger language model": "--lm demo/gpt2-mini"}
METHODS = COMPARED | VARIANTS | LARGER
# Questions in the order in which they are answered: the tasks, and the methods that run on each of them.
QUESTIONS = [
    (["hopper 10%", "reacher2d", "kitchen-partial"], COMPARED),
    (["kitchen-partial", "hopper 10%"], VARIANTS),  # sparse rewards, little data
    (["kitchen-mixed", "walker2d", "hopper delayed", "hopper", "halfcheetah"], COMPARED),
    (["kitchen-partial", "hopper 10%"], LARGER),
    (["walker2d"], VARIANTS),  # dense rewards
    (["hopper 3%", "kitchen-complete", "walker2d 10%", "halfcheetah 10%"], COMPARED),
    (["kitchen-partial 10%", "hopper 30%", "kitchen-partial 30%", "kitchen-partial 3%"], COMPARED),
    (["walker2d"], LARGER),
]
SEEDS = [0, 1, 2, 3, 4]
TUNING_TASKS = ["hopper 10%", "kitchen-partial"]  # one with dense rewards, one with sparse ones
TUNING_SEED = 100
LEARNING_RATES = "1e-3", "3e-3", "1e-2"


def grid(rates, others):
    return [f"--lr {rate} {other}".strip() for rate, other in itertools.product(rates, others)]


# Six settings for each method. A variant is one of LaMo with rank 64, which LaMo's tuning chose, and so has the three
# learning rates at that rank to choose from.
GRID = {
    "lamo": grid(LEARNING_RATES, ("--lora-rank 16", "--lora-rank 64")),
    "dt": grid(LEARNING_RATES, ("--dropout 0", "--dropout 0.1")),
    "wiki-rl": grid(LEARNING_RATES, ("--dropout 0", "--dropout 0.1")),
} | {
    variant: grid(
        LEARNING_RATES, [""] if "--lora-rank 0" in METHODS[variant] else ["--lora-rank 64"]
    )
    for variant in VARIANTS | LARGER
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
        command = (
            f"lamo.py --demo {TASKS[task]} {METHODS[method]} {options} --seed {seed} --out {out}"
        )
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=HERE.parent,
            env=threads,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return print(*job, "failed:", done.stderr.splitlines()[-1], flush=True)
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
        writer.writerow(
            {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in row.items()
            }
        )
    print(*job, f"{best['return_mean']:.2f}", flush=True)


def run(jobs):
    """Those of the jobs that have no row yet, two at a time."""
    done = finished()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, [job for job in jobs if job not in done]))


def tuned(method):
    """The best setting of GRID for a method, after its tuning runs."""
    run([(task, method, options, TUNING_SEED) for options in GRID[method] for task in TUNING_TASKS])
    rows, failed = finished(), {"best_score": "-inf"}  # failed: printed by train
    scores = {
        options: [
            float(rows.get((task, method, options, TUNING_SEED), failed)["best_score"])
            for task in TUNING_TASKS
        ]
        for options in GRID[method]
    }
    return max(scores, key=lambda options: np.mean(scores[options]))


def main():
    if not (HERE.parent / "demo/gpt2-mini").exists():
        sys.exit(
            "the larger language model is missing; first make it, in hours: python demo/make.py --only gpt2-mini"
        )
    for tasks, methods in QUESTIONS:
        best = {method: tuned(method) for method in methods}
        print(best, flush=True)
        run(
            [(task, *setting, seed) for task in tasks for seed in SEEDS for setting in best.items()]
        )


if __name__ == "__main__":
    main()
