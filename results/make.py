"""Run the comparison of methods on the demo's tasks; keep a row for each evaluation in runs.csv.

    python -m results.make            # days on two CPU cores; goes on where it stopped
    python -m results.report          # tables and pictures of what has been run

The protocol, written down before the runs that it is about:

- A method has one setting for each domain. It is chosen on the domain's task in TUNED_ON, with seeds
  100 and 101, which the tables do not use, by the score of the best target.
- All methods choose from the same settings: learning rate 3e-4, 1e-3, 3e-3 or 1e-2, dropout 0 or
  0.1. Each is tried with seed 100, the better half again with seed 101, and the best mean of the two
  wins. If the lowest or highest rate wins, the next one is tried in the same way.
- Then a method runs with each of SEEDS on the tasks in QUESTIONS. No run is left out.
- Runs that are ten times as long have the first three seeds. So have the methods of
  results/baselines.py, whose settings are not tuned.

Some runs were added after the first results. In locomotion, LaMo and DT also run with the dropout
that the other chose. On 3 % of hopper, DT and variants of LaMo also run with LaMo's rate and
dropout, for 1,000 and 10,000 steps. On reacher2d, DT also runs with MLPs, which is tuned as all are.
And some of DT's runs are older than the protocol; README.md says which.

A run that has its rows is not run again. Two runs go on at a time, with one thread each.
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import demo
from eval import best_target

HERE = Path(__file__).resolve().parent
COLUMNS = ["task", "method", "options", "seed", "step"]
COLUMNS += ["best_target", "best_return", "best_score", "mean_return", "mean_score"]
COLUMNS += ["train_loss", "held_out_loss", "text_loss_before", "text_loss_after"]
COLUMNS += ["documents_loss_before", "documents_loss_after", "minutes", "commit"]

LONGER = "--steps 10000 --eval-every 1000"
TASKS = {  # the options of each
    "hopper": "--env hopper",
    "hopper 30%": "--env hopper --ratio 0.3",
    "hopper 10%": "--env hopper --ratio 0.1",
    "hopper 3%": "--env hopper --ratio 0.03",
    "hopper 3%, longer": f"--env hopper --ratio 0.03 {LONGER} --episodes 10",
    "hopper delayed": "--env hopper --delayed",
    "halfcheetah": "--env halfcheetah",
    "halfcheetah 10%": "--env halfcheetah --ratio 0.1",
    "walker2d": "--env walker2d",
    "walker2d 10%": "--env walker2d --ratio 0.1",
    "kitchen-complete": "--env kitchen-complete",
    "kitchen-mixed": "--env kitchen-mixed",
    "kitchen-partial": "--env kitchen-partial",
    "kitchen-partial 30%": "--env kitchen-partial --ratio 0.3",
    "kitchen-partial 10%": "--env kitchen-partial --ratio 0.1",
    "kitchen-partial 10%, longer": f"--env kitchen-partial --ratio 0.1 {LONGER} --episodes 10",
    "kitchen-partial 3%": "--env kitchen-partial --ratio 0.03",
    "reacher2d": "--env reacher2d",
    "reacher2d 10%, longer": f"--env reacher2d --ratio 0.1 {LONGER}",
}
DOMAIN = {task: demo.DOMAINS[options.split()[1]] for task, options in TASKS.items()}
TUNED_ON = {"locomotion": "hopper 10%", "kitchen": "kitchen-partial", "reacher2d": "reacher2d"}

COMPARED = {
    "lamo": "--method lamo --lora-rank 16",
    "dt": "--method dt",
    "wiki-rl": "--method wiki-rl",
}
VARIANTS = {  # of LaMo, each without one or more of its parts
    "random trunk": f"{COMPARED['lamo']} --lm none --lang-coef 0",
    "no language loss": f"{COMPARED['lamo']} --lang-coef 1e-9",  # as good as 0, but measured
    "all trained": "--method lamo --lora-rank 0 --train-trunk",
    "random trunk, all trained": "--method lamo --lm none --lang-coef 0 --lora-rank 0 --train-trunk",
    "no LoRA": "--method lamo --lora-rank 0 --lang-coef 0",  # a frozen trunk keeps its language
    "linear embedders": f"{COMPARED['lamo']} --embed linear",
}
DT_WITH_MLPS = {"dt, mlp embedders": "--method dt --embed mlp"}
CONTROL = {"all trained, no language loss": f"{VARIANTS['all trained']} --lang-coef 1e-9"}
OF_LAMO = ", LaMo's setting"  # ends the names of the controls, which have it
METHODS = COMPARED | VARIANTS | DT_WITH_MLPS | CONTROL
CHEAP_BASELINES = ["bc", "best-bc", "td3-bc", "iql"]  # of results/baselines.py
BASELINES = [*CHEAP_BASELINES, "cql"]  # CQL's step takes as long as eight of IQL's

LAMO_AND_DT = ["lamo", "dt"]
TRAINED = ["all trained", "random trunk, all trained"]
LESS_KITCHEN = ["kitchen-partial", "kitchen-partial 10%", "kitchen-partial 3%"]
LESS_HOPPER = ["hopper", "hopper 10%", "hopper 3%"]
OTHER_TASKS = ["walker2d", "halfcheetah", "kitchen-mixed", "kitchen-complete"]
HARDER = ["walker2d 10%", "halfcheetah 10%", "hopper delayed"]
SIX = ["hopper", "hopper 10%", "walker2d", "halfcheetah", "kitchen-partial", "reacher2d"]
QUESTIONS = [  # in the order in which they are answered: tasks, and the methods that run on them
    ([*LESS_KITCHEN, *LESS_HOPPER, "reacher2d"], LAMO_AND_DT),
    (["reacher2d"], [*VARIANTS, *DT_WITH_MLPS, "wiki-rl", *CHEAP_BASELINES]),
    ([*OTHER_TASKS, *HARDER, "hopper 30%", "kitchen-partial 30%"], LAMO_AND_DT),
    (["reacher2d 10%, longer"], [*LAMO_AND_DT, *TRAINED, *DT_WITH_MLPS]),
    (["hopper 3%, longer", "kitchen-partial 10%, longer"], LAMO_AND_DT + TRAINED),
    (["hopper 3%", "kitchen-partial 10%"], TRAINED),
    ([*LESS_KITCHEN, *LESS_HOPPER, *OTHER_TASKS, *HARDER], ["wiki-rl"]),
    (["kitchen-partial", "hopper 10%", "walker2d"], VARIANTS),
    (SIX, BASELINES),
]
# On these, LaMo and DT also run with the other's dropout: they chose the same rate, not the same
# dropout.
LOCOMOTION = ["hopper", "hopper 10%", "hopper 3%", "hopper delayed"]
LOCOMOTION += ["halfcheetah", "halfcheetah 10%", "walker2d", "walker2d 10%"]
SEEDS = [0, 1, 2, 3, 4]
TUNING_SEEDS = [100, 101]
RATES = ["3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1"]
FIRST_RATES = 2, 6  # where the rates that all methods try begin and end
DROPOUTS = ["0", "0.1"]


def seeds_of(task, method):
    return SEEDS[:3] if "longer" in task or method in BASELINES else SEEDS


def finished():
    """Return the rows of runs.csv, dicts by column, in lists by job: task, method, options, seed."""
    path = HERE / "runs.csv"
    runs = {}
    for row in csv.DictReader(path.open()) if path.exists() else []:
        job = row["task"], row["method"], row["options"], int(row["seed"])
        runs.setdefault(job, []).append(row)
    return runs


def setting(method, rate, dropout):
    """Return the options of a setting; LoRA has the same dropout as the trunk."""
    options = f"--lr {rate} --dropout {dropout}"
    if "--lora-rank 16" in METHODS[method]:
        options += f" --lora-dropout {dropout}"
    return options


def with_dropout(task, method, dropout):
    """Return the runs of a method in locomotion with the rate of LaMo and DT, and a dropout."""
    options = setting(method, "1e-2", dropout)
    return [(task, method, options, seed) for seed in seeds_of(task, method)]


def controls():
    """Return runs on 3 % of hopper with LaMo's rate and dropout, whatever the method chose, by name."""
    return {
        f"{method}{OF_LAMO}": [
            *with_dropout("hopper 3%", method, "0.1")[:3],  # the seeds of the longer runs
            *with_dropout("hopper 3%, longer", method, "0.1"),
        ]
        for method in ["dt", *TRAINED, *CONTROL, "random trunk", "no language loss"]
    }


def tune(method, domain, runs):
    """Return the setting of a method for a domain, and the tuning runs that are missing.

    The setting is None as long as any are missing. That of a baseline is its published one.
    """
    if method in BASELINES:
        return "", []
    task = TUNED_ON[domain]
    start, end = FIRST_RATES
    while True:
        settings = {
            setting(method, rate, dropout): rate
            for rate in RATES[start:end]
            for dropout in DROPOUTS
        }

        # All settings with the first seed
        first = {options: (task, method, options, TUNING_SEEDS[0]) for options in settings}
        missing = [job for job in first.values() if job not in runs]
        if missing:
            return None, missing
        scores = {options: score(runs[job]) for options, job in first.items()}

        # The better half with the second seed
        better = sorted(scores, key=scores.get, reverse=True)[: len(scores) // 2]
        second = {options: (task, method, options, TUNING_SEEDS[1]) for options in better}
        missing = [job for job in second.values() if job not in runs]
        if missing:
            return None, missing
        means = {
            options: (scores[options] + score(runs[second[options]])) / 2 for options in better
        }
        best = max(means, key=means.get)

        # Beyond the edge, if it was the edge that won
        if settings[best] == RATES[start] and start > 0:
            start -= 1
        elif settings[best] == RATES[end - 1] and end < len(RATES):
            end += 1
        else:
            return best, []


def choose(method, domain):
    """Return the setting of a method for a domain, after the tuning runs that are missing."""
    while True:
        options, missing = tune(method, domain, finished())
        if not missing:
            return options
        run(missing)


def score(rows):
    """Return the best target's score at the end of a run."""
    return float(rows[-1]["best_score"])


def train(job):
    """Run lamo.py, and append a row for each of its evaluations to runs.csv."""
    task, method, options, seed = job
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        program = (
            f"baselines {method}" if method in BASELINES else f"run {METHODS[method]} {options}"
        )
        command = f"-m results.{program} --demo {TASKS[task]} --seed {seed}"
        done = subprocess.run(
            [sys.executable, *command.split(), "--out", out],
            cwd=HERE.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            cause = done.stderr.splitlines()[-1:] or [f"code {done.returncode}"]
            raise RuntimeError(f"{command} failed: {cause[0]}")
        rows = read_rows(out)
    minutes = (time.monotonic() - started) / 60
    write_rows([dict(zip(COLUMNS, job)) | row | {"minutes": minutes} for row in rows])
    print(*job, f"{rows[-1]['best_return']:.2f}, {minutes:.1f} min", flush=True)


def read_rows(out):
    """Return what COLUMNS says about each evaluation in the folder of a run, as dicts."""
    header, *lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    measured = {line["step"]: line for line in lines if "train_loss" in line}
    start = measured.get(0, {})
    rows = []
    for line in lines:
        if "evaluation" not in line:
            continue
        targets = line["evaluation"]
        target, best = best_target(targets)
        now = measured.get(line["step"], {})
        rows.append({
            "step": line["step"],
            "best_target": target,
            "best_return": best["return_mean"],
            "best_score": best["score"],
            "mean_return": np.mean([row["return_mean"] for row in targets.values()]),
            "mean_score": np.mean([row["score"] for row in targets.values()]),
            "train_loss": now.get("train_loss"),
            "held_out_loss": now.get("held_out_loss"),
            "documents_loss_before": start.get("documents_loss"),
            "documents_loss_after": now.get("documents_loss"),
            "commit": header["commit"],
        })  # fmt: skip
    if (out / "scores.json").exists():
        scores = json.loads((out / "scores.json").read_text())
        rows[-1] |= {key: scores[key] for key in ("text_loss_before", "text_loss_after")}
    return rows


def write_rows(rows):
    """Append rows to runs.csv."""
    path = HERE / "runs.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for row in rows:
            numbers = {key: f"{x:.6g}" for key, x in row.items() if isinstance(x, float)}
            writer.writerow(row | numbers)


def run(jobs):
    """Run those of the jobs that have no rows yet, two at a time."""
    runs = finished()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, [job for job in jobs if job not in runs]))


def main():
    options = argparse.ArgumentParser("results.make", description=__doc__.split("\n")[0])
    options.parse_args()  # it has none; --help starts nothing
    for tasks, methods in QUESTIONS:
        domains = dict.fromkeys(DOMAIN[task] for task in tasks)
        best = {pair: choose(*pair) for pair in itertools.product(methods, domains)}
        print(best, flush=True)
        run([
            (task, method, best[method, DOMAIN[task]], seed)
            for task in tasks
            for seed in SEEDS
            for method in methods
            if seed in seeds_of(task, method)
        ])  # fmt: skip
    for jobs in controls().values():
        run(jobs)
    for choice in itertools.product(LOCOMOTION, LAMO_AND_DT, DROPOUTS):
        run(with_dropout(*choice))


if __name__ == "__main__":
    main()
