"""Tables and pictures of what runs.csv has: table.md, and a picture for each of COMPARISONS.

    python -m results.report

They cover each task on which every method of a comparison has run with every seed.
"""

import functools
import math
from collections import defaultdict
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np

from results.make import COMPARED, HERE, LARGER, SEEDS, VARIANTS, finished
from results.plot import STYLES, draw_interval, interval

NAMES = {"lamo": "LaMo", "dt": "DT", "wiki-rl": "Wiki-RL"}
MAIN = [
    "hopper",
    "hopper 10%",
    "hopper delayed",
    "halfcheetah",
    "halfcheetah 10%",
    "walker2d",
    "walker2d 10%",
]
MAIN += ["reacher2d", "kitchen-complete", "kitchen-mixed", "kitchen-partial"]
SHARES = [
    task
    for name in ("hopper", "kitchen-partial")
    for task in (name, f"{name} 30%", f"{name} 10%", f"{name} 3%")
]
COMPARISONS = {  # methods and tasks, by picture
    "methods.png": ([*COMPARED], MAIN),
    "parts.png": (["lamo", *VARIANTS], MAIN),
    "data.png": ([*COMPARED], SHARES),
    "larger.png": (["lamo", *LARGER], MAIN),
}


def read_table():
    """Rows of runs.csv that are not tuning, by task and method, in the order of SEEDS; only where all of them have run."""
    groups = defaultdict(dict)
    for (task, method, _, seed), row in finished().items():
        groups[task, method][seed] = row
    return {
        key: [rows[seed] for seed in SEEDS]
        for key, rows in groups.items()
        if rows.keys() >= set(SEEDS)
    }


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def write_table(table, tasks, methods):
    """Lines of a Markdown table: for each task and method the best target's return, mean and spread over the seeds.

    Below, the scores of all tasks, and how much they differ from the first method's with the same seed.
    """
    lines = [
        "| | " + " | ".join(NAMES.get(method, method) for method in methods) + " |",
        "|---" * (len(methods) + 1) + "|",
    ]
    for task in tasks:
        cells = []
        for method in methods:
            returns, over_targets = (
                column(table[task, method], name) for name in ("best_return", "mean_return")
            )
            digits = 0 if returns.mean() > 100 else 1 if returns.mean() > 10 else 2
            cells.append(
                f"{returns.mean():.{digits}f} ± {returns.std(ddof=1):.{digits}f} ({over_targets.mean():.{digits}f})"
            )
        lines.append(f"| {task} | {' | '.join(cells)} |")
    scores = [[column(table[task, method], "best_score") for task in tasks] for method in methods]
    differences = [np.subtract(others, scores[0]) for others in scores[1:]]
    mean = functools.partial(np.mean, axis=-1)
    cells = ["{:.1f} ({:.1f} to {:.1f})".format(*interval(group)) for group in scores]
    lines.append(f"| score, interquartile mean and 95 % interval | {' | '.join(cells)} |")
    cells = ["{:+.1f} ({:.1f} to {:.1f})".format(*interval(group, mean)) for group in differences]
    lines.append(
        f"| mean difference from {NAMES[methods[0]]}, seed by seed | | {' | '.join(cells)} |"
    )
    return lines


def draw(table, tasks, methods, path):
    """A panel for all tasks and one for each, a row for each method; dots are seeds, the first method is shaded."""
    groups = [tasks, *([task] for task in tasks)]
    columns = min(3 if len(groups) % 4 == 1 else 4, len(groups))  # no line of a single panel
    lines = math.ceil(len(groups) / columns)
    size = 1 + 2.5 * columns, lines * (0.9 + 0.27 * len(methods))
    how = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(lines, columns, figsize=size, **how)
    for axes, group in zip(panels.flat, groups):
        for row, (method, style) in enumerate(zip(methods, cycle(STYLES))):
            scores = [column(table[task, method], "best_score") for task in group]
            _, low, high = draw_interval(axes, scores, -row, style)
            if row == 0:
                axes.axvspan(low, high, color=style["color"], alpha=0.12, linewidth=0)
            if len(group) == 1:
                axes.plot(
                    scores[0],
                    np.full(len(scores[0]), -row - 0.25),
                    ".",
                    color=style["color"],
                    markersize=3,
                )
        axes.set_title(group[0] if len(group) == 1 else "all of these", fontsize="medium")
    for axes in panels.flat[len(groups) - columns : len(groups)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    panels[0, 0].set_yticks(
        [-row for row in range(len(methods))], [NAMES.get(method, method) for method in methods]
    )
    panels[0, 0].set(
        xlim=(min(0, panels[0, 0].get_xlim()[0]), None), ylim=(-len(methods) + 0.4, 0.6)
    )
    figure.supxlabel("score of the best target", fontsize="medium")
    figure.savefig(path, dpi=150)


def main():
    table = read_table()
    lines = []
    for picture, (methods, tasks) in COMPARISONS.items():
        tasks = [task for task in tasks if all((task, method) in table for method in methods)]
        lines += [*write_table(table, tasks, methods), ""]
        draw(table, tasks, methods, HERE / picture)
    (HERE / "table.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
