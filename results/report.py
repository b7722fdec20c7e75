"""Draw pictures of what runs.csv has, and write its tables into README.md.

    python -m results.report

A comparison shows the tasks and methods that have run with every seed, if README.md has a place for
it. The tables have all of their seeds, and each method's chosen setting.
"""

import argparse
import itertools
import math
import re

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from results.make import (
    BASELINES,
    COMPARED,
    DOMAIN,
    DT_WITH_MLPS,
    HARDER,
    HERE,
    LAMO_AND_DT,
    LESS_HOPPER,
    LESS_KITCHEN,
    LOCOMOTION,
    METHODS,
    OF_LAMO,
    OTHER_TASKS,
    SIX,
    TASKS,
    TRAINED,
    TUNED_ON,
    VARIANTS,
    controls,
    finished,
    seeds_of,
    tune,
    with_dropout,
)
from results.plot import STYLES, draw_curve, draw_interval, interval

NAMES = {
    "lamo": "LaMo",
    "dt": "DT",
    "dt, mlp embedders": "DT, MLP embedders",
    f"dt{OF_LAMO}": f"DT{OF_LAMO}",
    "wiki-rl": "Wiki-RL",
    "bc": "BC",
    "best-bc": "BC, best tenth",
    "td3-bc": "TD3+BC",
    "iql": "IQL",
    "cql": "CQL",
}
MAIN = ["hopper", "hopper 10%", "reacher2d", "kitchen-partial", *OTHER_TASKS, *HARDER]
COMPARISONS = {  # tasks and methods, by name; the first method is the one that others differ from
    "methods": (MAIN, [*COMPARED]),
    "less-hopper": ([*LESS_HOPPER, "hopper 30%"], LAMO_AND_DT),
    "less-kitchen": ([*LESS_KITCHEN, "kitchen-partial 30%"], LAMO_AND_DT),
    "reacher2d": (["reacher2d"], [*COMPARED, *VARIANTS, *DT_WITH_MLPS]),
    "trained": (["hopper 10%", "hopper 3%", "kitchen-partial 10%"], ["lamo", *TRAINED]),
    "kitchen-partial": (["kitchen-partial"], [*COMPARED, *VARIANTS]),
    "parts": (["hopper 10%", "walker2d"], ["lamo", *VARIANTS]),
    "baselines": (SIX, ["lamo", "dt", *BASELINES]),
}
# How a method is drawn, in all pictures. No picture has both baselines and variants of LaMo, or both
# Wiki-RL and the last of METHODS.
STYLE = dict(zip([*METHODS, *BASELINES], [*STYLES, *STYLES[2:]]))
LONGER = {  # the methods that train for longer, by the name of their table and picture
    "longer": ["lamo", "dt", *TRAINED, *DT_WITH_MLPS],
    "controls": ["lamo", *controls()],
}
LAST_STEPS = range(6000, 10_001, 1000)  # of longer runs: scores move too much for one evaluation
PAIRS = [  # on what task which methods are compared after longer training, second minus first
    ("hopper 3%, longer", "lamo", "dt"),
    ("hopper 3%, longer", *TRAINED),
    ("hopper 3%, longer", *(f"{method}{OF_LAMO}" for method in TRAINED)),
    ("hopper 3%, longer", f"all trained{OF_LAMO}", f"all trained, no language loss{OF_LAMO}"),
    ("hopper 3%, longer", "lamo", f"random trunk{OF_LAMO}"),
    ("kitchen-partial 10%, longer", "lamo", "dt"),
    ("kitchen-partial 10%, longer", *TRAINED),
]


def read_table():
    """Return the runs of each (task, method) that has run with all seeds, in the order of seeds.

    A run is a list of its rows, one for each evaluation.
    """
    runs, jobs = finished(), {}
    for task, domain in DOMAIN.items():
        for method in [*METHODS, *BASELINES]:
            options, _ = tune(method, domain, runs)
            seeds = seeds_of(task, method)
            jobs[task, method] = [(task, method, options, seed) for seed in seeds]
    for name, part in controls().items():
        for job in part:
            jobs.setdefault((job[0], name), []).append(job)
    return {
        key: [runs[job] for job in part] for key, part in jobs.items() if runs.keys() >= {*part}
    }


def complete(table, tasks, methods):
    """Drop the methods that have run on none of the tasks, then the tasks on which any other has not."""
    methods = [method for method in methods if any((task, method) in table for task in tasks)]
    tasks = [task for task in TASKS if task in tasks]
    return [task for task in tasks if all((task, method) in table for method in methods)], methods


def column(runs, name):
    """Return a column of runs.csv at the end of several runs, as an array."""
    return np.array([float(rows[-1][name]) for rows in runs])


def name_of(method):
    return NAMES.get(method, method)


def same_seeds(table, tasks, methods):
    """Return the runs of each (task, method), with as many seeds as all methods have."""
    pairs = [*itertools.product(tasks, methods)]
    count = min(len(table[pair]) for pair in pairs)
    return {pair: table[pair][:count] for pair in pairs}


def format_spread(numbers, digits):
    """Return the mean ± standard deviation of some numbers, as text."""
    return f"{np.mean(numbers):.{digits}f} ± {np.std(numbers, ddof=1):.{digits}f}"


def markdown(rows):
    """Return the lines of a Markdown table; the first of its rows of cells is the header."""
    header, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return [header, "|---" * len(rows[0]) + "|", *lines]


def format_difference(result, digits=1):
    """Return what `difference` returned, without its last number, as text."""
    middle, low, high, _ = result
    return f"{middle:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def settings_lines(table):
    """Return the lines of a table of the settings that were chosen."""
    chosen = {}
    for (task, method), runs in table.items():
        if runs[0][0]["options"]:
            _, rate, _, dropout, *_ = runs[0][0]["options"].split()
            chosen[method, DOMAIN[task]] = f"lr {rate}, dropout {dropout}"
    methods = [method for method in METHODS if any(method == key[0] for key in chosen)]
    rows = [["method", *TUNED_ON]]
    for method in methods:
        rows.append([name_of(method), *(chosen.get((method, domain), "–") for domain in TUNED_ON)])
    return markdown(rows)


def returns_lines(table, tasks, methods):
    """Return the lines of a table of returns.

    A cell has the best target's return, mean and spread over seeds, and in brackets the mean over
    all targets. Several tasks also have the differences of the scores.
    """
    first = methods[0]
    others = methods[1:] if len(tasks) > 1 else []
    rows = [["return", *map(name_of, methods)]]
    for other in others:
        rows[0] += [f"{name_of(other)} minus {name_of(first)}, score", "over all targets"]
    for task in tasks:
        row = [task]
        for method in methods:
            returns = column(table[task, method], "best_return")
            over_targets = column(table[task, method], "mean_return").mean()
            digits = 0 if returns.mean() > 100 else 1 if returns.mean() > 10 else 2
            row.append(f"{format_spread(returns, digits)} ({over_targets:.{digits}f})")
        for other, name in itertools.product(others, ("best_score", "mean_score")):
            ours, theirs = ([column(table[task, method], name)] for method in (first, other))
            row.append(format_difference(difference(ours, theirs)))
        rows.append(row)
    if len(methods) >= len(tasks):
        rows = list(zip(*rows))  # rather long than wide
    return markdown(rows)


def scores_lines(table, tasks, methods):
    """Return the lines of a table of the scores over all tasks.

    It says how much they differ from the first method's with the same seed, for the best target and
    over all targets, and about how large a difference would be detected.
    """

    def columns(method, name):
        return [column(table[task, method], name) for task in tasks]

    first = methods[0]
    rows = [["score", "interquartile mean", f"minus {name_of(first)}"]]
    rows[0] += ["over all targets", "detectable"]
    for method in methods:
        row = [name_of(method)]
        row.append("{:.1f} ({:.1f} to {:.1f})".format(*interval(columns(method, "best_score"))))
        if method == first:
            rows.append([*row, "", "", ""])
            continue
        best, over_targets = (
            difference(columns(first, name), columns(method, name))
            for name in ("best_score", "mean_score")
        )
        row += [format_difference(best), format_difference(over_targets)]
        rows.append([*row, f"{best[-1]:.1f}"])
    return markdown(rows)


def losses_lines(table):
    """Return the lines of a table of the action losses after training, means over seeds."""
    tasks, methods = complete(table, [task for task in TASKS if "longer" not in task], LAMO_AND_DT)
    rows = [["action loss"]]
    for method in methods:
        rows[0] += [f"{name_of(method)}, trained on", f"{name_of(method)}, held out"]
    for task in tasks:
        row = [task]
        for method, name in itertools.product(methods, ("train_loss", "held_out_loss")):
            losses = [run[-1][name] for run in table[task, method]]
            row.append(f"{np.mean([*map(float, losses)]):.4f}" if all(losses) else "–")
        rows.append(row)
    return markdown(rows)


def difference(ours, theirs):
    """Return how much scores differ in pairs of runs with the same seed: lists of (seeds,) by task.

    Returns the mean over tasks and seeds and its 95 % t interval, low and high; and about the
    smallest true difference that such an interval excludes zero for with a probability of 80 %. Only
    seeds are independent: from task to task, a seed has the same draws, and often trajectories.
    """
    pairs = [second - first for first, second in zip(ours, theirs)]
    by_seed = np.mean(pairs, axis=0)
    middle, error = by_seed.mean(), stats.sem(by_seed)
    half, power = stats.t.ppf([0.975, 0.8], len(by_seed) - 1)
    return middle, middle - half * error, middle + half * error, (half + power) * error


def dropout_lines():
    """Return the lines of a table of LaMo and DT with the dropout that they did not choose.

    A dash stands for what has not run with every seed.
    """
    runs = finished()

    def measured(task, method, dropout, name):
        jobs = with_dropout(task, method, dropout)
        return column([runs[job] for job in jobs], name) if runs.keys() >= {*jobs} else None

    def spread(task, method, dropout):
        returns = measured(task, method, dropout, "best_return")
        return "–" if returns is None else format_spread(returns, 0)

    def differ(tasks, dropout_of_lamo, dropout_of_dt):
        lamo = [measured(task, "lamo", dropout_of_lamo, "best_score") for task in tasks]
        dt = [measured(task, "dt", dropout_of_dt, "best_score") for task in tasks]
        missing = any(scores is None for scores in lamo + dt)
        return "–" if missing else format_difference(difference(lamo, dt))

    rows = [["task", "LaMo, dropout 0", "DT, dropout 0.1"]]
    rows[0] += ["DT minus LaMo, as tuned", "both 0", "both 0.1"]
    pairs = [("0.1", "0"), ("0", "0"), ("0.1", "0.1")]  # as tuned: what each of them chose
    for task in LOCOMOTION:
        row = [task, spread(task, "lamo", "0"), spread(task, "dt", "0.1")]
        rows.append([*row, *(differ([task], *pair) for pair in pairs)])
    rows.append(["all", "", "", *(differ(LOCOMOTION, *pair) for pair in pairs)])
    return markdown(rows)


def draw(table, tasks, methods, path):
    """Draw a panel for all tasks and, if there are several, one for each; a row for each method.

    Dots are seeds. The interval of the first method is shaded.
    """
    groups = [[task] for task in tasks]
    if len(tasks) > 1:
        groups.insert(0, tasks)
    columns = min(3 if len(groups) % 4 == 1 else 4, len(groups))  # no line of a single panel
    lines = math.ceil(len(groups) / columns)
    size = 1 + 2.5 * columns, lines * (0.9 + 0.27 * len(methods))
    how = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(lines, columns, figsize=size, **how)
    for axes, group in zip(panels.flat, groups):
        for row, method in enumerate(methods):
            style = STYLE[method]
            scores = [column(table[task, method], "best_score") for task in group]
            _, low, high = draw_interval(axes, scores, -row, style)
            if row == 0:
                axes.axvspan(low, high, color=style["color"], alpha=0.12, linewidth=0)
            if len(group) == 1:
                height = np.full(len(scores[0]), -row - 0.25)
                axes.plot(scores[0], height, ".", color=style["color"], markersize=3)
        axes.set_title(group[0] if len(group) == 1 else "all of these", fontsize="medium")
    for axes in panels.flat[len(groups) - columns : len(groups)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    panels[0, 0].set_yticks([-row for row in range(len(methods))], map(name_of, methods))
    left = min(0, panels[0, 0].get_xlim()[0])
    panels[0, 0].set(xlim=(left, None), ylim=(0.4 - len(methods), 0.6))
    figure.supxlabel("score of the best target", fontsize="medium")
    figure.savefig(path, dpi=150)


MEASURES = {  # columns of runs.csv that are shown over time
    "best_score": "score",
    "held_out_loss": "action loss, held out",
    "train_loss": "action loss, trained on",
    "documents_loss_after": "language loss, docstrings",
}


def curves(table, task, method, measure):
    """Return a measure of a method's runs by training step, as dicts; None if it has none."""
    runs = table.get((task, method))
    if not runs or not runs[0][0][measure]:
        return None
    return [{int(row["step"]): float(row[measure]) for row in rows} for rows in runs]


def means(runs, steps):
    """Return the mean of each run of `curves` over some of its steps, as an array."""
    return np.array([np.mean([run[step] for step in steps]) for run in runs])


def longer_lines(table, task, methods):
    """Return the lines of a table of what longer training does, mean and spread over seeds.

    Runs of 1,000 steps are shown beside it. There, the learning rate has come down to zero.
    """
    rows = [[task, *map(name_of, methods)]]

    def add_row(title, trained_on, measure, steps, digits):
        cells = []
        for method in methods:
            runs = curves(table, trained_on, method, measure) or []
            runs = runs[: len(table[task, method])]
            numbers = means(runs, steps)
            cells.append(format_spread(numbers, digits) if runs else "–")
        if set(cells) != {"–"}:
            rows.append([f"{MEASURES[measure]}, {title}", *cells])

    for measure, digits in ("best_score", 1), ("held_out_loss", 4), ("documents_loss_after", 2):
        add_row("end of a 1,000-step run", task.split(",")[0], measure, [1000], digits)
        for step in 1000, 3000, 10000:
            add_row(f"step {step:,} of 10,000", task, measure, [step], digits)
        if measure == "best_score":
            add_row("mean of steps 6,000 to 10,000", task, measure, LAST_STEPS, digits)
    return markdown(rows)


def rises_lines(table, task):
    """Return the lines of a table of how much the held-out loss rises to the end of longer training.

    Rises are in %: the mean over seeds, and in brackets each seed; then how much more than LaMo's,
    and its interval. The last column compares the losses themselves. A dash stands for what was not
    measured.
    """
    shorter = task.split(",")[0]
    rows = [[f"held-out loss, {shorter}, rise in %"]]
    rows[0] += ["since the end of a 1,000-step run", "minus LaMo's"]
    rows[0] += ["since step 1,000 of the same run", "minus LaMo's"]
    rows[0] += ["loss at step 10,000, minus LaMo's"]

    def rises(trained_on, method):
        longer = curves(table, task, method, "held_out_loss")
        starts = curves(table, trained_on, method, "held_out_loss")
        return starts and np.array([
            100 * (last[10000] / first[1000] - 1) for first, last in zip(starts, longer)
        ])  # fmt: skip

    for method in dict.fromkeys([*LONGER["longer"], *LONGER["controls"]]):
        if (task, method) not in table:
            continue
        is_lamo = method == "lamo"
        row = [name_of(method)]
        for trained_on in shorter, task:
            ours, lamos = (rises(trained_on, name) for name in (method, "lamo"))
            if ours is None:
                row += ["–", "–"]
                continue
            row.append(f"{ours.mean():+.1f} ({', '.join(f'{round(rise)}' for rise in ours)})")
            row.append("" if is_lamo else format_difference(difference([lamos], [ours])))
        ours, lamos = (column(table[task, name], "held_out_loss") for name in (method, "lamo"))
        row.append("" if is_lamo else format_difference(difference([lamos], [ours]), 4))
        rows.append(row)
    return markdown(rows)


def pairs_lines(table):
    """Return the lines of a table of scores in longer training, differences of pairs of methods.

    A score is the mean of the evaluations at LAST_STEPS.
    """
    rows = [["score, steps 6,000 to 10,000", "by seed", "best target", "over all targets"]]

    for task, first, second in PAIRS:
        if {(task, first), (task, second)} <= table.keys():
            best, over_targets = (
                [means(curves(table, task, method, name), LAST_STEPS) for method in (first, second)]
                for name in ("best_score", "mean_score")
            )
            title = f"{task.split(',')[0]}: {name_of(second)} − {name_of(first)}"
            by_seed = ", ".join(f"{round(lead, 1) + 0:.1f}" for lead in best[1] - best[0])
            results = (difference([ours], [theirs]) for ours, theirs in (best, over_targets))
            rows.append([title, by_seed, *map(format_difference, results)])
    return markdown(rows)


def draw_longer(table, tasks, methods, path):
    """Draw what longer training does: a line of panels for each task, a panel for each measure."""
    size = 3 * len(MEASURES), 2.8 * len(tasks)
    figure, panels = plt.subplots(
        len(tasks), len(MEASURES), figsize=size, squeeze=False, layout="constrained"
    )
    for task, line in zip(tasks, panels):
        for (measure, title), axes in zip(MEASURES.items(), line):
            # Seeds have other trajectories, whose losses differ more than those of methods do.
            relative = measure == "held_out_loss"
            if relative:
                title += ": change"
            for method in methods:
                runs = curves(table, task, method, measure)
                if not runs:
                    continue
                if relative:
                    runs = [{step: run[step] - run[1000] for step in run} for run in runs]
                style = STYLE[method.removesuffix(OF_LAMO)]
                draw_curve(axes, runs, style | {"label": name_of(method)})
            axes.set_title(f"{task.split(',')[0]}\n{title}", fontsize="medium")
            axes.set_xlabel("training steps")
            if measure == "train_loss":
                axes.set_yscale("log")
            elif measure == "best_score":
                axes.set_ylim(bottom=0)
    # The legend names a method once, however many tasks it ran on.
    handles = {curve.get_label(): curve for axes in panels.flat for curve in axes.lines}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def main():
    options = argparse.ArgumentParser("results.report", description=__doc__.split("\n")[0])
    options.parse_args()  # it has none; --help writes nothing
    table = read_table()
    tables = {"settings": settings_lines(table), "losses": losses_lines(table)}
    tables["dropout"] = dropout_lines()
    rises = [rises_lines(table, task) for task in TASKS if "longer" in task]
    tables["rises"] = [*itertools.chain(*([*lines, ""] for lines in rises if len(lines) > 2))]
    tables["pairs"] = pairs_lines(table)
    page = (HERE / "README.md").read_text("utf-8")
    for name, comparison in COMPARISONS.items():
        tasks, methods = complete(table, *comparison)
        if tasks and len(methods) > 1 and f"<!-- {name} -->" in page:
            runs = same_seeds(table, tasks, methods)
            tables[name] = returns_lines(runs, tasks, methods)
            tables[name] += ["", *scores_lines(runs, tasks, methods)]
            draw(runs, tasks, methods, HERE / f"{name}.png")
    for name, methods in LONGER.items():
        longer = {}
        for task in TASKS:
            ours = [method for method in methods if (task, method) in table]
            if "longer" in task and len(ours) > 1:
                longer[task] = [*longer_lines(table, task, ours), ""]
        tables[name] = [*itertools.chain(*longer.values())]
        draw_longer(table, longer, methods, HERE / f"{name}.png")

    for name, lines in tables.items():
        print(name, *lines, "", sep="\n")
        # The table after the comment with its name, and what was there before
        old = rf"<!-- {name} -->\n+(?:\|.*\n+)*"
        new = "\n".join([f"<!-- {name} -->", "", *lines]).strip() + "\n\n"
        page, count = re.subn(old, new, page)
        if count != 1:
            raise ValueError(f"README.md must have <!-- {name} --> once, not {count} times")
    (HERE / "README.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
