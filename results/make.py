"""Runs what the README's table shows and draws it: LaMo and DT on the demo's tasks, three seeds.

    python results/make.py            # about an hour on two CPU cores; goes on where it stopped

Both methods get the same tuning first: each learning rate of LEARNING_RATES on each of TUNING_TASKS with TUNING_SEED,
which the table does not use; the one with the higher mean score is the method's for all tasks. Writes table.md,
returns.png (needs matplotlib) and scores.json. Two runs go on at a time with one thread each, so their seconds are not
the README's.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TASKS = [  # environment, ratio, other options
    ("hopper", "0.1", ""),
    ("reacher2d", "1", ""),
    ("kitchen-partial", "1", ""),
    ("kitchen-mixed", "1", ""),
]
METHODS = ["lamo", "dt"]
SEEDS = [0, 1, 2]
LEARNING_RATES = ["1e-3", "3e-3"]
TUNING_TASKS = [("hopper", "0.1", ""), ("kitchen-partial", "1", "")]  # one with dense rewards, one with sparse ones
TUNING_SEED = 100


def train(job):
    """One run of lamo.py, unless it is there already -> its scores."""
    (env, ratio, options), method, lr, seed = job
    folder = HERE / "runs" / f"{env}-{ratio}{options[1:]}-{method}-{lr}-{seed}"
    if not (folder / "scores.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        task = f"--env {env} --ratio {ratio} {options} --method {method}"
        command = f"lamo.py --demo {task} --lr {lr} --seed {seed} --out {folder}"
        with open(f"{folder}.txt", "w") as output:
            subprocess.run(
                [sys.executable, *command.split()], cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT, check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
    scores = json.loads((folder / "scores.json").read_text())
    print(folder.name, round(scores["best"]["return_mean"], 2), flush=True)
    return scores


def dataset_mean(env):
    """Mean return of a demo dataset."""
    import minari

    dataset = minari.MinariDataset(HERE.parent / "demo" / "lamo" / env / "demo-v0" / "data")
    return float(np.mean([episode.rewards.sum() for episode in dataset]))


def draw(rows, path):
    """Bars of the return in units of the dataset's mean return, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 3.0), layout="constrained")
    for k, (method, colour) in enumerate(zip(METHODS, ("#4063d8", "#bbbbbb"))):
        for i, row in enumerate(rows):
            returns = np.array(row[method]) / row["dataset"]
            axes.bar(i + 0.36 * (k - 0.5), returns.mean(), 0.34, color=colour, label=method if i == 0 else None)
            axes.plot(np.full(len(returns), i + 0.36 * (k - 0.5)), returns, "k.", markersize=4)
    axes.axhline(1, color="k", linewidth=0.8, linestyle="--")
    notes = [row["options"][2:] or f"{float(row['ratio']):.0%} of data" for row in rows]
    labels = [f"{row['env']}\n{note}" for row, note in zip(rows, notes)]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("return / dataset's mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    figure.savefig(path, dpi=150)


def main():
    (HERE / "runs").mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        grid = [(task, method, lr, TUNING_SEED) for method in METHODS for lr in LEARNING_RATES for task in TUNING_TASKS]
        tuning = {method: {lr: [] for lr in LEARNING_RATES} for method in METHODS}
        for (_, method, lr, _), scores in zip(grid, pool.map(train, grid)):
            tuning[method][lr].append(scores["best"]["score"])
        best = {method: max(LEARNING_RATES, key=lambda lr: np.mean(tuning[method][lr])) for method in METHODS}
        print(tuning, best, flush=True)
        jobs = [(task, method, best[method], seed) for seed in SEEDS for task in TASKS for method in METHODS]
        scores = dict(zip(jobs, pool.map(train, jobs)))
    rows = []
    for task in TASKS:
        env, ratio, options = task
        row = {"env": env, "ratio": ratio, "options": options, "dataset": dataset_mean(env)}
        for method in METHODS:
            row[method] = [scores[task, method, best[method], seed]["best"]["return_mean"] for seed in SEEDS]
        for when in ("before", "after"):
            losses = [scores[task, "lamo", best["lamo"], seed][f"text_loss_{when}"] for seed in SEEDS]
            row[f"text_loss_{when}"] = losses
        rows.append(row)
    (HERE / "scores.json").write_text(json.dumps({"tuning": tuning, "rows": rows}, indent=2) + "\n")
    lines = ["| task | data | dataset's mean return | LaMo | DT | LaMo, each seed | DT, each seed |", "|---" * 7 + "|"]
    for row in rows:
        digits = 0 if row["dataset"] > 10 else 2
        cells = [f"{np.mean(row[method]):.{digits}f} ± {np.std(row[method]):.{digits}f}" for method in METHODS]
        seeds = [", ".join(f"{value:.{digits}f}" for value in row[method]) for method in METHODS]
        name = f"{row['env']} {row['options']}".strip()
        mean = f"{row['dataset']:.{digits}f}"
        lines.append(f"| {name} | {float(row['ratio']):.0%} | {' | '.join([mean, *cells, *seeds])} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(rows, HERE / "returns.png")


if __name__ == "__main__":
    main()
