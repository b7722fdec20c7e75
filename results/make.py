"""Runs what the README's table shows and draws it: every task of the demo, LaMo and DT, three seeds.

    python results/make.py            # about an hour and a half on two CPU cores; goes on where it stopped
    python results/make.py --only dt  # the runs of one method

Writes results/table.md, results/returns.png (needs matplotlib) and, as they were printed, results/scores.json.
Two runs go on at a time with one thread each, so their seconds are not the README's.
"""

import argparse
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
    ("hopper", "1", ""),
    ("hopper", "1", "--delayed"),
    ("halfcheetah", "1", ""),
    ("walker2d", "1", ""),
    ("reacher2d", "1", ""),
    ("kitchen-complete", "1", ""),
    ("kitchen-partial", "1", ""),
    ("kitchen-mixed", "1", ""),
]
METHODS = ["lamo", "dt"]
SEEDS = [0, 1, 2]


def train(job):
    """One run of lamo.py, unless it is there already -> its scores."""
    (env, ratio, options), method, seed = job
    folder = HERE / "runs" / f"{env}-{ratio}{options[1:]}-{method}-{seed}"
    if not (folder / "scores.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        command = f"lamo.py --env {env} --ratio {ratio} {options} --method {method} --seed {seed} --demo --out {folder}"
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=METHODS)
    options = parser.parse_args()
    (HERE / "runs").mkdir(exist_ok=True)
    methods = [options.only] if options.only else METHODS
    jobs = [(task, method, seed) for method in methods for task in TASKS for seed in SEEDS]
    with ThreadPoolExecutor(2) as pool:
        scores = dict(zip(jobs, pool.map(train, jobs)))
    if options.only:
        return
    rows = []
    for task in TASKS:
        env, ratio, options = task
        row = {"env": env, "ratio": ratio, "options": options, "dataset": dataset_mean(env)}
        for method in METHODS:
            row[method] = [scores[task, method, seed]["best"]["return_mean"] for seed in SEEDS]
            row[f"{method} score"] = [scores[task, method, seed]["best"]["score"] for seed in SEEDS]
        losses = [[scores[task, "lamo", seed][f"text_loss_{when}"] for seed in SEEDS] for when in ("before", "after")]
        row["text_loss_before"], row["text_loss_after"] = losses
        rows.append(row)
    (HERE / "scores.json").write_text(json.dumps(rows, indent=2) + "\n")
    lines = [
        "| task | data | dataset's mean return | LaMo | DT | LaMo, three seeds | DT, three seeds |",
        "|---|---|---|---|---|---|---|",
    ]
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
