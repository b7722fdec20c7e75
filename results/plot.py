"""Draw the scores of runs: learning curves for each task, and final scores over all tasks.

    python -m results.plot runs/* --out runs.png

A score is that of the best target. Points are interquartile means over the seeds, bands and bars their
95 % intervals.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from glob import glob
from itertools import chain, cycle
from pathlib import Path

import matplotlib
import numpy as np

import lamo
from eval import best_target

matplotlib.use("Agg")  # draws without a screen
import matplotlib.pyplot as plt

STYLES = [  # one for each method, told apart without colour
    {"color": "#1b3a8f", "linestyle": "-", "marker": "o"},
    {"color": "#d9622b", "linestyle": "--", "marker": "s"},
    {"color": "#7fa8c9", "linestyle": ":", "marker": "D"},
    {"color": "#000000", "linestyle": "-.", "marker": "^"},
    {"color": "#a33b6f", "linestyle": (0, (5, 1)), "marker": "v"},
    {"color": "#8c8c8c", "linestyle": (0, (1, 1)), "marker": "P"},
    {"color": "#3f7d3a", "linestyle": (0, (3, 1, 1, 1)), "marker": "X"},
    {"color": "#b07d12", "linestyle": (0, (4, 2, 1, 2, 1, 2)), "marker": "<"},
    {"color": "#5b2c83", "linestyle": (0, (2, 2)), "marker": ">"},
    {"color": "#0f9aa8", "linestyle": (0, (6, 2)), "marker": "*"},
]


def iqm(scores):
    """Return the interquartile mean over the last axis: without the lowest and highest quarter."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def interval(tasks, statistic=iqm):
    """Return a statistic of the scores (seeds,) of several tasks, and its 95 % confidence interval.

    The interval comes from 10,000 stratified bootstrap samples, each with as many seeds of a task as
    the task has (Agarwal et al. 2021, section 4).
    """
    rng = np.random.default_rng(0)
    samples = [rng.choice(scores, (10_000, len(scores))) for scores in tasks]
    samples = np.concatenate(samples, axis=1)
    low, high = np.percentile(statistic(samples), (2.5, 97.5))
    return statistic(np.concatenate(tasks)), low, high


def draw_interval(axes, tasks, row, style):
    """Draw the interquartile mean of several tasks' scores and its interval; return the numbers."""
    middle, low, high = interval(tasks)
    bars = [[middle - low], [high - middle]]
    marker = {"color": style["color"], "marker": style["marker"], "markersize": 5, "capsize": 2}
    axes.errorbar(middle, row, xerr=bars, **marker)
    return middle, low, high


def read_run(folder):
    """Return the config of a run, as a dict, and the best target's score at each evaluation."""
    header, *lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    evaluations = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    if header["config"]["env"] == "none":
        raise ValueError(f"{folder} has no evaluations: it was trained with --env none")
    if header["config"]["steps"] not in evaluations:
        raise ValueError(f"{folder} has not ended")
    config = asdict(lamo.Config()) | header["config"]  # a log may be older than an option
    curve = {}
    for step, scores in evaluations.items():
        _, best = best_target(scores)
        if best:  # not every episode failed
            curve[step] = best["score"]
    if config["steps"] not in curve:
        raise ValueError(f"{folder} has no score at its end: every episode failed")
    return config, curve


def label_runs(configs):
    """Return a (task, label) for each run.

    A task is named after its environment, or after its dataset if the runs have several datasets of
    that environment, or none. A label is the method, with the settings in which the method's runs on
    this task differ.
    """
    task_settings = "env", "data", "ratio", "delayed"
    datasets = defaultdict(set)  # of each environment
    for config in configs:
        datasets[config["env"], config["demo"]].add(config["data"])
    labels = []
    for config in configs:
        one_dataset = len(datasets[config["env"], config["demo"]]) == 1
        name = config["env"] if config["env"] and one_dataset else config["data"]
        task = f"{name} {100 * config['ratio']:g}%"
        if config["delayed"]:
            task += " delayed"
        if config["demo"]:
            task += " (demo)"

        ignored = {"method", "seed", "out", "device", "demo", *task_settings}
        if config["env"] not in lamo.TASKS:
            ignored.add("targets")  # they come from the trajectories that the seed drew
        same = ["method", *task_settings]
        alike = [other for other in configs if all(other[key] == config[key] for key in same)]
        label = config["method"]
        for key, value in config.items():
            if key not in ignored and any(other[key] != value for other in alike):
                label += f", {key} {value}"
        labels.append((task, label))
    return labels


def plot_runs(folders, path):
    """Draw the scores of runs, given by their folders, and print the final ones."""
    configs, curves = zip(*map(read_run, folders))
    runs = defaultdict(lambda: defaultdict(list))  # curves by method and task
    tasks = []
    for (task, method), curve in zip(label_runs(configs), curves):
        runs[method][task].append(curve)
        if task not in tasks:
            tasks.append(task)

    size = 3.2 * len(tasks) + 3.6, 3
    figure, panels = plt.subplots(1, len(tasks) + 1, figsize=size, layout="constrained")
    for task, axes in zip(tasks, panels):
        for group, style in zip(runs.values(), cycle(STYLES)):
            if task in group:
                draw_curve(axes, group[task], style)
        axes.set(title=task, xlabel="training steps", ylabel="score")

    last = panels[-1]
    for row, ((method, group), style) in enumerate(zip(runs.items(), cycle(STYLES))):
        final = [np.array([curve[max(curve)] for curve in curves]) for curves in group.values()]
        middle, low, high = draw_interval(last, final, -row, style)
        count = sum(len(scores) for scores in final)
        interval_text = f"{middle:.1f} ({low:.1f} to {high:.1f})"
        print(f"{method}: {interval_text}, {count} runs on {', '.join(group)}")
    last.set_yticks([-row for row in range(len(runs))], runs)
    last.set(
        title="at the end", xlabel="score, interquartile mean", ylim=(0.5 - len(runs), 0.5)
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def draw_curve(axes, curves, style):
    """Draw the interquartile mean and the interval of several runs, at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    intervals = [interval([np.array([curve[step] for curve in curves])]) for step in steps]
    middle, low, high = np.transpose(intervals)
    axes.plot(steps, middle, markersize=4, **style)
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def main(arguments):
    parser = argparse.ArgumentParser(
        "results.plot", usage=argparse.SUPPRESS, description=__doc__.split("\n")[0]
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a run of lamo.py")
    parser.add_argument("--out", default="runs.png", help=".png or .pdf; default: runs.png")
    options = parser.parse_args(arguments)
    advice = "give folders of runs that have ended, and a .png or .pdf for --out"
    with lamo.on_error(f"cannot draw {options.out}; {advice}"):
        # Windows' shells hand a * over as it is.
        folders = [sorted(glob(name)) or [name] for name in options.folders]
        plot_runs(chain(*folders), options.out)


if __name__ == "__main__":
    lamo.run_command(main, "results.plot")
