"""Draws the scores of runs, with intervals: python eval.py runs/a runs/b ... --plot out.png"""

import json
from collections import defaultdict
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

from eval import best_target
from lamo import Config

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
]


def iqm(scores):
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter, rounded down."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def interval(tasks, statistic=iqm):
    """Scores (seeds,) of one or several tasks -> a statistic of all of them, and the bounds of its 95 % confidence interval.

    From 10,000 stratified bootstrap samples, each with as many seeds of a task as it has (Agarwal et al. 2021, section 4).
    """
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.choice(scores, (10_000, len(scores))) for scores in tasks], axis=1)
    return statistic(np.concatenate(tasks)), *np.percentile(statistic(samples), (2.5, 97.5))


def draw_interval(axes, tasks, row, style):
    """In a row, a marker at the interquartile mean of several tasks' scores, a bar for its interval -> the three numbers."""
    middle, low, high = interval(tasks)
    bars = [[middle - low], [high - middle]]
    axes.errorbar(middle, row, xerr=bars, color=style["color"], marker=style["marker"], markersize=5, capsize=2)
    return middle, low, high


def read_run(folder):
    """A run's folder -> its Config as a dict, and the best target's score by training step."""
    header, *lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    evaluations = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    if header["config"]["steps"] not in evaluations:
        raise ValueError(f"{folder} has not ended")
    config = asdict(Config()) | header["config"]  # whose log may be older than an option
    return config, {step: best_target(scores)[1]["score"] for step, scores in evaluations.items()}


def label_runs(configs):
    """A task and a label for each run; the label is its method, and the settings in which its runs on this task differ.

    A task has the name of its environment, or of its dataset where the runs have several for that environment, or none.
    """
    task_settings = "env", "data", "ratio", "delayed"
    datasets = defaultdict(set)  # of each environment
    for config in configs:
        datasets[config["env"], bool(config["demo"])].add(config["data"])
    labels = []
    for config in configs:
        demo = bool(config["demo"])
        name = config["env"] if config["env"] and len(datasets[config["env"], demo]) == 1 else config["data"]
        task = f"{name} {100 * config['ratio']:g}%" + " delayed" * config["delayed"] + " (demo)" * demo
        apart = {"method", "seed", "out", "device", "demo", *task_settings}
        if not config["env"]:
            apart.add("targets")  # which then are from the trajectories that the seed drew
        alike = [other for other in configs if all(other[name] == config[name] for name in ("method", *task_settings))]
        differ = [name for name in config if name not in apart and any(other[name] != config[name] for other in alike)]
        labels.append((task, ", ".join([config["method"], *(f"{name} {config[name]}" for name in differ)])))
    return labels


def plot_runs(folders, path):
    """Draw and print scores of runs, given by folder: learning curves on each task, and final scores over all tasks.

    A score is that of the best target. Points are interquartile means over seeds, bands and bars their 95 % intervals.
    """
    configs, curves = zip(*map(read_run, folders))
    runs = defaultdict(lambda: defaultdict(list))  # by method and task
    for (task, method), curve in zip(label_runs(configs), curves):
        runs[method][task].append(curve)
    tasks = list(dict.fromkeys(task for group in runs.values() for task in group))
    figure, (*panels, last) = plt.subplots(1, len(tasks) + 1, figsize=(3.2 * len(tasks) + 3.6, 3), layout="constrained")
    for task, axes in zip(tasks, panels):
        for group, style in zip(runs.values(), cycle(STYLES)):
            if task in group:
                steps = sorted(set.intersection(*(set(curve) for curve in group[task])))
                scores = [np.array([curve[step] for curve in group[task]]) for step in steps]
                middle, low, high = np.transpose([interval([values]) for values in scores])
                axes.plot(steps, middle, markersize=4, **style)
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=task, xlabel="training steps", ylabel="score")
    for row, ((method, group), style) in enumerate(zip(runs.items(), cycle(STYLES))):
        final = [np.array([curve[max(curve)] for curve in curves]) for curves in group.values()]
        middle, low, high = draw_interval(last, final, -row, style)
        count = sum(len(scores) for scores in final)
        print(f"{method}: {middle:.1f} ({low:.1f} to {high:.1f}), {count} runs on {', '.join(group)}")
    last.set_yticks([-row for row in range(len(runs))], runs)
    last.set(title="at the end", xlabel="score, interquartile mean", ylim=(-len(runs) + 0.5, 0.5))
    figure.savefig(path, dpi=150)
