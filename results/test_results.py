"""Tests of the comparison: its tables against its runs, plots and timings."""

import csv
import functools
import itertools
import json
import math
import random
import re
import shutil
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

import demo
import lamo
from lamo import GPT2, Config
from results import baselines, make, plot, report, run, timing
from test_lamo import HERE, SHORT, isolated, lm_folder, read_log, starting_lm, trained

NAMES = {
    "lamo": "lamo",
    "dt": "dt",
    "wiki-rl": "wiki-rl",
    "bc, best tenth": "best-bc",
    "td3+bc": "td3-bc",
}


INTERVAL = r"[-+]\d+\.\d \(-?\d+\.\d to -?\d+\.\d\)"  # a difference and its interval
LAST_STEPS = ["6000", "7000", "8000", "9000", "10000"]  # of the longer runs
NOT_EVALUATED = ["--env", "none", "--data", "demo/lamo/hopper/demo-v0"]


def t_quantile(probability, freedom):
    """A quantile of Student's t above its median, by adding up the density."""
    width = 1e-4  # of a slice
    x = np.arange(width / 2, 10, width)  # the middles of the slices
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    density /= math.sqrt(freedom * math.pi)
    return np.interp(probability, 0.5 + np.cumsum(density) * width, x + width / 2)


def read_evaluations(folder):
    """The rows of a comparison, one for each evaluation."""
    return list(csv.DictReader((HERE / "results" / folder / "runs.csv").open()))


def read_rows(folder):
    """The last row of each run of a comparison."""
    rows = read_evaluations(folder)
    return list({(r["task"], r["method"], r["options"], r["seed"]): r for r in rows}.values())


def read_text():
    """The page of the comparison, on one line."""
    return " ".join((HERE / "results" / "README.md").read_text("utf-8").split())


def checkpoint_weights(folder):
    weights = lamo.read_checkpoint(folder)["weights"]
    return {name: weight.tolist() for name, weight in weights.items()}


def read_tables(page, corner, after=""):
    """The tables of a page, after a text, whose first cell is `corner`; as lists of cells by line."""
    text = (HERE / "results" / page).read_text("utf-8")
    text = text[text.index(after) :]
    tables = re.findall(rf"(?m)^\| ?{corner} \|.*(?:\n\|.*)+", text)
    assert tables
    return [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]
        for table in tables
    ]


def read_settings():
    """The chosen rate and dropout of each method and domain, as the page says."""
    [[header, _, *lines]] = read_tables("README.md", "method")
    return {
        (method.lower(), domain): tuple(re.findall(r"lr (\S+), dropout (\S+)", cell)[0])
        for method, *cells in lines
        for domain, cell in zip(header[1:], cells, strict=True)
        if cell != "–"
    }


def rate_and_dropout(row):
    """The rate and dropout of a row of runs.csv; LoRA's dropout must be the trunk's."""
    options = row["options"].split()
    assert options[4:] in ([], ["--lora-dropout", options[3]])
    return options[1], options[3]


def runs_of(rows, task, method, settings):
    """The rows of a task and a method with the setting of the tables, by seed."""
    method = NAMES.get(method.lower(), method.lower())
    chosen = [
        row
        for row in rows
        if (row["task"], row["method"].lower()) == (task, method) and int(row["seed"]) < 100
    ]
    if (method, make.DOMAIN[task]) in settings:
        setting = settings[method, make.DOMAIN[task]]
        chosen = [row for row in chosen if rate_and_dropout(row) == setting]
    assert len({row["options"] for row in chosen}) == 1
    seeds = "012" if method in make.BASELINES else "01234"
    assert sorted(row["seed"] for row in chosen) == list(seeds)
    return {row["seed"]: row for row in chosen}


def check_spread(cell, numbers):
    """Check a cell of mean ± standard deviation against its numbers."""
    printed = cell.split(" (")[0].split(" ± ")
    digits = len(printed[0].partition(".")[2])
    expected = statistics.mean(numbers), statistics.stdev(numbers)
    assert [*map(float, printed)] == pytest.approx(expected, rel=0, abs=0.51 * 10**-digits)


def check_difference(cell, ours, theirs, name, rounding=0.06):
    """Check a cell of a mean difference and its interval; return the difference that would show."""
    pairs = [
        [float(their[seed][name]) - float(our[seed][name]) for seed in sorted(their)]
        for our, their in zip(ours, theirs, strict=True)
    ]
    by_seed = [statistics.mean(of_tasks) for of_tasks in zip(*pairs, strict=True)]
    mean, error = statistics.mean(by_seed), statistics.stdev(by_seed) / math.sqrt(len(by_seed))
    freedom = len(by_seed) - 1
    half, power = t_quantile(0.975, freedom), t_quantile(0.8, freedom)
    expected = [mean, mean - half * error, mean + half * error]
    printed = [float(number) for number in re.findall(r"[-+]?\d+\.\d", cell)]
    assert printed == pytest.approx(expected, abs=rounding + 1e-3 * error)
    return (half + power) * error


def test_tables_are_those_of_the_runs():
    rows, settings = read_rows(""), read_settings()
    returns, scores = (read_tables("README.md", corner) for corner in ("return", "score"))
    for table, (_, _, *lines) in zip(returns, scores, strict=True):
        del table[1]
        if table[0][1] in make.TASKS:
            table = list(zip(*table))
        methods = [name for name in table[0][1:] if not re.search(" minus |over all", name)]
        tasks = [line[0] for line in table[1:]]
        runs = {
            method: [runs_of(rows, task, method, settings) for task in tasks] for method in methods
        }
        seeds = "012" if "TD3+BC" in methods else "01234"
        for of_tasks in runs.values():
            of_tasks[:] = [{seed: results[seed] for seed in seeds} for results in of_tasks]
        for number, (_, *cells) in enumerate(table[1:]):
            for method, cell in zip(methods, cells):
                results = runs[method][number].values()
                check_spread(cell, [float(row["best_return"]) for row in results])
                over_targets = statistics.mean(float(row["mean_return"]) for row in results)
                in_brackets = cell.split("(")[1].rstrip(")")
                digits = len(in_brackets.partition(".")[2])
                assert float(in_brackets) == pytest.approx(
                    over_targets, rel=0, abs=0.51 * 10**-digits
                )
            differences = cells[len(methods) :]
            assert len(differences) == (2 * (len(methods) - 1) if len(tasks) > 1 else 0)
            pairs = itertools.product(methods[1:], ("best_score", "mean_score"))
            for (method, name), cell in zip(pairs, differences):
                ours, theirs = runs[methods[0]][number], runs[method][number]
                check_difference(cell, [ours], [theirs], name)

        assert [line[0] for line in lines] == [*methods]
        for method, middle, *cells in lines:
            scored = sorted(
                float(row["best_score"]) for results in runs[method] for row in results.values()
            )
            cut = len(scored) // 4
            assert float(middle.split()[0]) == pytest.approx(
                statistics.mean(scored[cut : len(scored) - cut]), abs=0.051
            )
            if method == methods[0]:
                continue
            for name, cell in zip(("best_score", "mean_score"), cells):
                visible = check_difference(cell, runs[methods[0]], runs[method], name)
                if name == "best_score":
                    assert float(cells[2]) == pytest.approx(visible, rel=1e-3, abs=0.06)


def test_the_table_of_dropout_is_that_of_the_runs():
    [[_, _, *lines]] = read_tables("README.md", "task")
    runs = defaultdict(dict)  # by task, method and dropout: the rows by seed
    for row in read_rows(""):
        if row["method"] in ("lamo", "dt") and int(row["seed"]) < 100:
            rate, dropout = rate_and_dropout(row)
            if rate == "1e-2":
                runs[row["task"], row["method"], dropout][row["seed"]] = row
    runs = {key: rows for key, rows in runs.items() if sorted(rows) == [*"01234"]}
    shown, tasks = 0, [line[0] for line in lines[:-1]]
    assert [line[0] for line in lines] == [*make.LOCOMOTION, "all"]
    for task, *cells in lines:
        for cell, choice in zip(cells[:2], (("lamo", "0"), ("dt", "0.1"))):
            key = task, *choice
            if key in runs:
                results = runs[key].values()
                check_spread(cell, [float(row["best_return"]) for row in results])
                shown += 1
            else:
                assert cell == ("" if task == "all" else "–")
        choices = ("0.1", "0"), ("0", "0"), ("0.1", "0.1")
        for cell, (of_lamo, of_dt) in zip(cells[2:], choices, strict=True):
            of = tasks if task == "all" else [task]
            if all((name, "lamo", of_lamo) in runs for name in of):
                ours = [runs[name, "lamo", of_lamo] for name in of]
                theirs = [runs[name, "dt", of_dt] for name in of]
                check_difference(cell, ours, theirs, "best_score")
            else:
                assert cell == "–"
    assert shown > 8


def test_tables_of_the_first_comparison_are_those_of_its_runs():
    rows = read_rows("first")
    for header, _, *lines in read_tables("first/README.md", ""):
        tasks = [line[0] for line in lines if line[0] in make.TASKS]
        runs = [[runs_of(rows, task, method, {}) for task in tasks] for method in header[1:]]
        for number, (_, *cells) in enumerate(lines[: len(tasks)]):
            for of_method, cell in zip(runs, cells, strict=True):
                results = of_method[number].values()
                check_spread(cell, [float(row["best_return"]) for row in results])
        differences = next(line for line in lines if line[0].startswith("mean difference from"))
        for of_method, cell in zip(runs[1:], differences[2:], strict=True):
            check_difference(cell, runs[0], of_method, "best_score")


def test_the_table_of_longer_training_is_that_of_the_runs():
    page, settings = (HERE / "results" / "README.md").read_text("utf-8"), read_settings()
    columns = {
        "score": "best_score",
        "action loss, held out": "held_out_loss",
        "language loss, docstrings": "documents_loss_after",
    }
    rows = read_evaluations("")
    setting_of_lamo = settings["lamo", "locomotion"]
    for of_controls, part in enumerate(page.split("<!-- controls -->")):
        tables = re.findall(r"(?m)^\| (.*, longer) \| (.*) \|\n.*((?:\n\|.*)+)", part)
        assert len(tables) == (1 if of_controls else 3)
        for task, methods, body in tables:
            when = r"(end of a |step |mean of steps 6,000 to )([\d,]+)"
            lines = re.findall(rf"(?m)^\| (.*), {when}.*? \| (.*) \|$", body)
            shorter = task.removesuffix(", longer")
            assert len(lines) == (4 if shorter in make.TASKS else 3) * len(columns) + 1
            methods = methods.lower().split(" | ")
            for title, end, step, cells in lines:
                for name, cell in zip(methods, cells.split(" | "), strict=True):
                    method = name.removesuffix(make.OF_LAMO.lower())
                    assert (method == name) == (not of_controls or method == "lamo")
                    tuned = setting_of_lamo if of_controls else settings[method, make.DOMAIN[task]]
                    steps = [step.replace(",", "")]
                    if end.startswith("mean"):
                        steps = LAST_STEPS
                    numbers = defaultdict(list)
                    for row in rows:
                        if (
                            row["task"] == (shorter if end == "end of a " else task)
                            and row["method"] == method
                            and row["seed"] in "012"
                            and rate_and_dropout(row) == tuned
                            and row["step"] in steps
                            and row[columns[title]]
                        ):
                            numbers[row["seed"]].append(float(row[columns[title]]))
                    if cell == "–":
                        assert not numbers
                    else:
                        assert sorted(numbers) == list("012")
                        assert all(len(part) == len(steps) for part in numbers.values())
                        check_spread(cell, [*map(statistics.mean, numbers.values())])


def test_the_text_on_less_data_says_what_the_runs_do():
    page = read_text()
    rows, settings = read_rows(""), read_settings()
    cells = re.findall(
        rf"changes by ({INTERVAL}) points for the best target, and by ({INTERVAL})", page
    )
    for task, pair in zip(("hopper", "kitchen-partial"), cells, strict=True):
        for name, cell in zip(("best_score", "mean_score"), pair):
            leads = []  # DT's over LaMo by seed: on all of the data, and on 3 % of it
            for share in task, f"{task} 3%":
                lamo_runs, dt_runs = (
                    runs_of(rows, share, method, settings) for method in ("lamo", "dt")
                )
                leads.append({
                    seed: {name: float(dt_runs[seed][name]) - float(lamo_runs[seed][name])}
                    for seed in lamo_runs
                })  # fmt: skip
            check_difference(cell, [leads[0]], [leads[1]], name)


@pytest.fixture
def longer():
    """A function that returns a column of runs of 10,000 steps, or of 1,000, by seed."""
    settings, values = read_settings(), defaultdict(dict)
    for row in read_evaluations(""):
        if row["seed"] in "012" and row["options"]:
            values[row["task"], row["method"], rate_and_dropout(row), row["step"]][row["seed"]] = (
                row
            )

    def column(task, name, measure, step="10000"):
        method = name.lower().removesuffix(make.OF_LAMO.lower())
        has_lamos = name.endswith(make.OF_LAMO)
        domain = make.DOMAIN.get(task) or make.DOMAIN[f"{task}, longer"]
        setting = settings["lamo" if has_lamos else method, domain]
        found = values[task, NAMES.get(method, method), setting, step]
        return {seed: float(found[seed][measure]) for seed in found if found[seed][measure]}

    return column


def test_the_tables_of_rises_are_those_of_the_runs(longer):
    def rise(shorter, task, name):
        first = longer(task, name, "held_out_loss", "1000")
        last = longer(f"{shorter}, longer", name, "held_out_loss")
        return {seed: {"rise": 100 * (last[seed] / first[seed] - 1)} for seed in first}

    count = 0
    for [corner, *_], _, *lines in read_tables("README.md", "held-out loss, [^|]*"):
        shorter = corner.split(", ")[1]
        for name, *cells in lines:
            for task, cell, more in zip((shorter, f"{shorter}, longer"), cells[::2], cells[1::2]):
                rises, lamos = (rise(shorter, task, method) for method in (name, "LaMo"))
                if cell == "–":
                    assert more == "–" and not {*"012"} <= rises.keys()
                    continue
                by_seed = [rises[seed]["rise"] for seed in "012"]
                printed = re.findall(r"-?[\d.]+", cell)
                assert [*map(float, printed[1:])] == [*map(round, by_seed)]
                assert float(printed[0]) == pytest.approx(statistics.mean(by_seed), abs=0.051)
                if name == "LaMo":
                    assert not more
                else:
                    pair = ({seed: part[seed] for seed in "012"} for part in (lamos, rises))
                    check_difference(more, *([part] for part in pair), "rise")
                count += 1
            if name != "LaMo":  # the losses, in units of the fourth digit
                pair = (
                    {
                        seed: {"loss": 1e4 * loss}
                        for seed, loss in longer(task, method, "held_out_loss").items()
                    }
                    for method in ("LaMo", name)
                )
                last = re.sub(r"(\d)\.(\d{4})", r"\1\2.0", cells[4])
                check_difference(last, *([part] for part in pair), "loss", 0.51)
    assert count >= 8 + 9 + 4 + 4 + 5


def test_the_table_of_scores_after_longer_training_is_that_of_the_runs(longer):
    [[_, _, *lines]] = read_tables("README.md", "score, steps 6,000 to 10,000")
    assert len(lines) >= 6
    for title, seeds, *cells in lines:
        task, pair = title.split(": ")
        second, first = pair.split(" − ")
        for measure, cell in zip(("best_score", "mean_score"), cells, strict=True):
            ours, theirs = {}, {}
            for scores, name in (ours, first), (theirs, second):
                parts = [longer(f"{task}, longer", name, measure, step) for step in LAST_STEPS]
                for seed in parts[0]:
                    scores[seed] = {measure: statistics.mean(part[seed] for part in parts)}
            check_difference(cell, [ours], [theirs], measure)
            if measure == "best_score":
                by_seed = [theirs[seed][measure] - ours[seed][measure] for seed in "012"]
                assert [*map(float, seeds.split(", "))] == pytest.approx(by_seed, abs=0.051)


def test_figures_in_the_text_are_those_of_a_table(longer):
    page = (HERE / "results" / "README.md").read_text("utf-8")
    lines = page.splitlines()
    tables = " ".join(line for line in lines if line.startswith("|"))
    text = " ".join(line for line in lines if not line.startswith("|"))

    # Differences with an interval, but for those that other tests check
    own = "domain counts once, DT minus LaMo is|, and Wiki-RL minus LaMo is|excludes zero: DT by"
    own += "|, Wiki-RL by|comparison, with other settings, has DT at"
    own += r"|changes by|best target, and by|minus DT without:|\([A-Za-z, -]+ minus [A-Za-z -]+:"
    own += r"|model with all weights trained,|neither with a tenth,|nor with 3 %,|but inconclusive,"
    for figure in re.findall(INTERVAL, re.sub(rf"({own}) {INTERVAL}", "", text)):
        assert figure in tables, figure

    # Rises, and losses after longer training
    text = text.split("## Longer")[1]
    for figure in re.findall(r"\d+\.\d(?= %)", text):
        rises = page.split("<!-- rises -->")[1].split("<!-- controls -->")[0]
        assert re.search(rf"[-+]{re.escape(figure)} \(", rises), figure
    ends = [
        statistics.mean(longer("kitchen-partial 10%, longer", name, "train_loss").values())
        for name in ("DT", "LaMo")
    ]
    ends = "DT's loss on them ends at {:.5f}, and LaMo's at {:.4f}".format(*ends)
    assert ends in text
    for figure in re.findall(r"\b0\.\d{4}", text.replace(ends, "")):
        assert figure in tables, figure


def test_differences_in_the_text_are_those_of_the_runs():
    page = read_text()
    rows, settings = read_rows(""), read_settings()

    def check(text, ours, theirs):
        [cell] = re.findall(rf"{re.escape(text)} ({INTERVAL})", page)
        check_difference(cell, ours, theirs, "best_score")

    # Where each domain counts once, a seed's score is the mean over domains of the means over tasks.
    tables = read_tables("README.md", "return")
    scores = {method: defaultdict(float) for method in ("lamo", "dt", "wiki-rl")}
    tasks = [line[0] for line in tables[0][2:]]
    assert len(tasks) == 11
    for method, task, seed in itertools.product(scores, tasks, "01234"):
        in_domain = [other for other in tasks if make.DOMAIN[other] == make.DOMAIN[task]]
        row = runs_of(rows, task, method, settings)[seed]
        scores[method][seed] += float(row["best_score"]) / len(in_domain) / 3
    of_lamo, of_dt, of_wiki_rl = (
        [{seed: {"best_score": score} for seed, score in by_seed.items()}]
        for by_seed in scores.values()
    )
    check("If each domain counts once, DT minus LaMo is", of_lamo, of_dt)
    check("and Wiki-RL minus LaMo is", of_lamo, of_wiki_rl)
    of_lamo, of_dt, of_wiki_rl = (
        [runs_of(rows, task, method, settings) for task in tasks if make.DOMAIN[task] == "kitchen"]
        for method in scores
    )
    check("excludes zero: DT by", of_lamo, of_dt)
    check(", Wiki-RL by", of_lamo, of_wiki_rl)

    # What dropout does to DT in locomotion
    without, with_dropout = (
        [
            runs_of(rows, task, "dt", {("dt", "locomotion"): ("1e-2", dropout)})
            for task in make.LOCOMOTION
        ]
        for dropout in ("0", "0.1")
    )
    check("DT with it minus DT without:", without, with_dropout)

    # Between two that are not LaMo
    random, language_model = "random trunk, all trained", "all trained"
    for task, second, first, text in (
        ("reacher2d", "DT, MLP embedders", "DT", "(DT, MLP embedders minus DT:"),
        ("reacher2d", "all trained", "Wiki-RL", "(all trained minus Wiki-RL:"),
        (
            "reacher2d",
            "no language loss",
            "random trunk",
            "(no language loss minus random trunk:",
        ),
        ("kitchen-partial 10%", random, language_model, "model with all weights trained,"),
        ("hopper 10%", random, language_model, "neither with a tenth,"),
        ("hopper 3%", random, language_model, "nor with 3 %,"),
        ("kitchen-partial", random, language_model, "but inconclusive,"),
        ("kitchen-partial", "Wiki-RL", language_model, "(Wiki-RL minus all trained:"),
    ):
        of_first, of_second = ([runs_of(rows, task, name, settings)] for name in (first, second))
        check(text, of_first, of_second)


def test_returns_in_the_text_are_those_of_the_runs():
    page = read_text()
    rows = read_evaluations("")

    def of(task, method, setting, seed, step="1000", name="best_return"):
        [row] = [
            row
            for row in rows
            if (row["task"], row["method"], row["seed"], row["step"])
            == (task, method, str(seed), step)
            and (rate_and_dropout(row) if row["options"] else None) == setting
        ]
        return float(row[name])

    def tuning(task, method, rate, seeds=(100, 101), dropout="0.1"):
        return [of(task, method, (rate, dropout), seed) for seed in seeds]

    def no_dropout(task, method, rate):
        return tuning(task, method, rate, dropout="0")

    ours = [tuning("hopper 10%", "lamo", "3e-2", [100], dropout) for dropout in ("0", "0.1")]
    text = "LaMo's best targets then have returns of {:.0f} and {:.0f} with seed 100"
    assert text.format(*sorted(sum(ours, []), reverse=True)) in page
    for method, name in ("dt", "DT"), ("wiki-rl", "Wiki-RL"):
        theirs = [tuning("hopper 10%", method, "3e-2", dropout=dropout) for dropout in ("0", "0.1")]
        text = "{}'s {:.0f} and {:.0f} with seed 100 but {:.0f} and {:.0f} with seed 101"
        first, second = zip(*sorted(theirs))
        assert text.format(name, *first, *second) in page
    kitchen = [
        tuning("kitchen-partial", "wiki-rl", rate, dropout=dropout)
        for rate, dropout in (("3e-2", "0"), ("1e-2", "0.1"))
    ]
    assert sum(kitchen[0]) == sum(kitchen[1])
    text = (
        "3e-2 without dropout ({:.2f} and {:.2f}) is level with 1e-2 with dropout ({:.2f} and"
        " {:.2f}), and was taken for its higher return with seed 100; 1e-1 has {:.2f} and {:.2f}"
    )
    for dropout in "0", "0.1":
        kitchen.append(tuning("kitchen-partial", "wiki-rl", "1e-1", [100], dropout))
    assert text.format(*sum(kitchen, [])) in page
    text = "tried 3e-2 ({:.2f} and {:.2f}; {:.2f} and {:.2f})"
    linear = [
        of(task, "linear embedders", ("3e-2", dropout), 100)
        for task in ("reacher2d", "kitchen-partial")
        for dropout in ("0", "0.1")
    ]
    assert text.format(*linear) in page
    text = "(DT at 3e-4 with dropout: {:.0f} and {:.0f})"
    assert text.format(*tuning("hopper 10%", "dt", "3e-4")) in page

    text = "had {:.2f} and {:.2f} there, but {:.2f} with seeds 0 to 4"
    tuned = tuning("kitchen-partial", "all trained", "1e-3")
    later = [of("kitchen-partial", "all trained", ("1e-3", "0.1"), seed) for seed in range(5)]
    assert text.format(*tuned, statistics.mean(later)) in page

    for task, *of_lamo_and_dt in (
        ("hopper 10%", ("1e-2", "0.1"), ("1e-2", "0")),
        ("kitchen-partial", ("3e-3", "0.1"), ("3e-3", "0.1")),
        ("reacher2d", ("3e-3", "0"), ("1e-3", "0")),
    ):  # LaMo was ahead with both of the seeds that tuned it
        for seed in (100, 101):
            lamos, dts = (
                of(task, method, setting, seed)
                for method, setting in zip(("lamo", "dt"), of_lamo_and_dt, strict=True)
            )
            assert lamos > dts

    losses = [
        of("hopper 10%", method, ("3e-4", "0.1"), 100, name="held_out_loss")
        for method in ("dt", "lamo")
    ]
    assert "with seed 100, it is {:.4f}, LaMo's {:.4f}".format(*losses) in page

    def baseline(task, method, seed, start):
        return [of(task, method, None, seed, step) for step in (start, "20000")]

    bc = [*baseline("hopper 10%", "bc", 1, "15000"), *baseline("hopper 10%", "bc", 2, "15000")]
    text = "from {:.0f} to {:.0f} with seed 1, and from {:.0f} to {:.0f} with seed 2"
    assert text.format(*bc) in page
    text = "BC's go from {:.0f} after 5,000 steps to {:.0f} at the end with seed 1, while the other"
    assert text.format(*baseline("hopper", "bc", 1, "5000")) in page
    for seed in (0, 2):
        *before, last = (of("hopper", "bc", None, seed, f"{step}000") for step in (5, 10, 15, 20))
        assert last > max(before)
    iql = [baseline("kitchen-partial", "iql", seed, "5000") for seed in (0, 2)]
    text = (
        "from {:.2f} after 5,000 steps to {:.2f} with seed 0, and from {:.2f} to {:.2f} with seed 2"
    )
    assert text.format(*sum(iql, [])) in page
    td3_bc = [of("reacher2d", "td3-bc", None, seed, "20000") for seed in range(3)]
    lamos = [of("reacher2d", "lamo", ("3e-3", "0"), seed) for seed in range(3)]
    leads = [their - our for their, our in zip(td3_bc, lamos)]
    assert f"{min(leads):.0f} to {max(leads):.0f} points above LaMo with the same seed" in page

    # Those that fit kitchen-partial best score best, DT and Wiki-RL above LaMo with every seed.
    at_the_end, settings = read_rows(""), read_settings()
    names = "LaMo", "DT", "Wiki-RL", "all trained", "random trunk, all trained", "linear embedders"
    runs = {name: runs_of(at_the_end, "kitchen-partial", name, settings) for name in names}
    fits, scores = (
        {
            name: statistics.mean(float(row[column]) for row in by_seed.values())
            for name, by_seed in runs.items()
        }
        for column in ("train_loss", "best_score")
    )
    fit_dt, fit_wiki_rl = fits.pop("DT"), fits.pop("Wiki-RL")
    text = "is {:.4f} for DT and {:.4f} for Wiki-RL, and from {:.4f} to {:.4f} for LaMo"
    assert text.format(fit_dt, fit_wiki_rl, min(fits.values()), max(fits.values())) in page
    assert {*sorted(scores, key=scores.get)[-2:]} == {"DT", "Wiki-RL"}
    for name, seed in itertools.product(("DT", "Wiki-RL"), "01234"):
        of_lamo, other = (float(runs[key][seed]["best_score"]) for key in ("LaMo", name))
        assert other > of_lamo

    tasks = [line[0] for line in read_tables("README.md", "return")[0][2:]]
    scores = {method: np.zeros(5) for method in ("lamo", "dt", "wiki-rl")}  # means over tasks
    for task, method in itertools.product(tasks, scores):
        by_seed = runs_of(at_the_end, task, method, settings)
        scores[method] += [float(by_seed[seed]["best_score"]) / len(tasks) for seed in "01234"]
    for task in ("kitchen-complete", "kitchen-mixed", "kitchen-partial"):
        [of_data] = re.findall(rf"(\d\.\d) on {task}\b", page)
        for method in scores:  # none reaches the mean return of its data
            by_seed = runs_of(at_the_end, task, method, settings).values()
            assert statistics.mean(float(row["best_return"]) for row in by_seed) < float(of_data)
    text = "{} minus LaMo is {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f}"
    for method, name in ("dt", "DT"), ("wiki-rl", "Wiki-RL"):
        assert text.format(name, *scores[method] - scores["lamo"]) in page


def test_losses_in_the_page_are_those_of_the_runs():
    page, settings = (HERE / "results" / "README.md").read_text("utf-8"), read_settings()
    rows = read_rows("")
    lines = re.findall(r"(?m)^\| ([a-z][^|]*) \| ([\d.]+) \| (.+) \| ([\d.]+) \| (.+) \|$", page)
    assert len(lines) == 16
    language = defaultdict(list)
    for task, *cells in lines:
        columns = itertools.product(("lamo", "dt"), ("train_loss", "held_out_loss"))
        for (method, name), cell in zip(columns, cells, strict=True):
            losses = [row[name] for row in runs_of(rows, task, method, settings).values()]
            expected = f"{statistics.mean(map(float, losses)):.4f}" if losses[0] else "–"
            assert cell == expected
        for row in runs_of(rows, task, "lamo", settings).values():
            for name in ("text_loss", "documents_loss"):
                for when in ("before", "after"):
                    language[name, when].append(float(row[f"{name}_{when}"]))
    no_dropout = {("lamo", "locomotion"): ("1e-2", "0")}
    runs = runs_of(rows, "halfcheetah 10%", "lamo", no_dropout)
    loss = statistics.mean(float(row["held_out_loss"]) for row in runs.values())
    assert f"LaMo's held-out loss is {loss:.4f}" in " ".join(page.split())
    runs = runs_of(rows, "kitchen-partial 3%", "lamo", settings)
    seeds = [f"{float(row['held_out_loss']):.3f}" for row in runs.values()]
    assert f"{', '.join(seeds)} for LaMo" in " ".join(page.split())
    tuned = {  # with the second tuning seed
        (row["method"], *rate_and_dropout(row)): row["held_out_loss"]
        for row in rows
        if (row["task"], row["seed"]) == ("hopper 10%", "101")
    }
    lines = re.findall(r"(?m)^\| lr (\S+), dropout (\S+) \| ([\d.]+) \| ([\d.]+) \|$", page)
    assert len(lines) == 3
    for rate, dropout, *cells in lines:
        for method, cell in zip(("lamo", "dt"), cells, strict=True):
            assert cell == f"{float(tuned[method, rate, dropout]):.4f}"
    for name in ("text_loss", "documents_loss"):
        before, after = (statistics.mean(language[name, when]) for when in ("before", "after"))
        assert f"from {before:.2f} to {after:.2f}" in " ".join(page.split())


def test_settings_are_those_that_tuning_found_best():
    rows, settings = read_rows(""), read_settings()
    assert settings
    for (method, domain), setting in settings.items():
        scores = defaultdict(dict)  # by setting and seed
        for row in rows:
            tuned_on = make.TUNED_ON[domain]
            is_ours = (row["task"], row["method"].lower()) == (tuned_on, method)
            if is_ours and int(row["seed"]) >= 100:
                scores[rate_and_dropout(row)][row["seed"]] = float(row["best_score"])
        rates = {float(rate) for rate, _ in scores}
        assert rates >= {3e-4, 1e-3, 3e-3, 1e-2} and len(scores) == 2 * len(rates)
        twice = {key: sum(pair.values()) for key, pair in scores.items() if len(pair) == 2}
        assert twice[setting] == max(twice.values()) and len(twice) >= len(rates)
        assert min(rates) < float(setting[0]) < max(rates)
        least = min(scores[key]["100"] for key in twice)
        assert all(pair["100"] <= least for key, pair in scores.items() if key not in twice)


def test_the_demo_has_the_settings_of_the_comparison():
    for (method, domain), (rate, dropout) in read_settings().items():
        if method not in lamo.METHODS:
            continue  # a variant
        for options_of_task in make.TASKS.values():
            env = options_of_task.split()[1]
            if demo.DOMAINS[env] != domain:
                continue
            config, _ = lamo.configure({"env": env, "demo": True, "method": method})
            assert (config.lr, config.dropout) == (float(rate), float(dropout))
            assert config.lora_rank == (16 if method == "lamo" else 0)
            if method == "lamo":
                assert config.lora_dropout == float(dropout)


def test_tuning_tries_more_where_the_edge_wins():
    def run_all(best_rate, best_dropout):
        """Tune on made-up scores, as make.choose does; return the setting and the rates tried."""
        runs = {}
        while True:
            options, missing = make.tune("dt", "kitchen", runs)
            if not missing:
                return options, sorted({float(job[2].split()[1]) for job in runs})
            for job in missing:
                assert job[0] == "kitchen-partial" and job[3] in (100, 101) and job not in runs
                _, rate, _, dropout = job[2].split()
                far = abs(math.log10(float(rate) / best_rate)) + abs(float(dropout) - best_dropout)
                runs[job] = [{"best_score": -far + 0.01 * (job[3] == 101)}]

    grid = [3e-4, 1e-3, 3e-3, 1e-2]
    assert run_all(1e-3, 0.1) == ("--lr 1e-3 --dropout 0.1", grid)
    assert run_all(1e-2, 0.0) == ("--lr 1e-2 --dropout 0", [*grid, 3e-2])
    assert run_all(3e-2, 0.0) == ("--lr 3e-2 --dropout 0", [*grid, 3e-2, 1e-1])
    assert run_all(1e-4, 0.1) == ("--lr 1e-4 --dropout 0.1", [3e-5, 1e-4, *grid])


def test_figures_of_the_readme_are_those_of_the_tables():
    answers = (HERE / "README.md").read_text("utf-8").split("## Does it work?")[1].split("\n## ")[0]

    def cell(corner, line, column, after=""):
        header, _, *lines = read_tables("README.md", corner, after)[0]
        [cells] = [cells for cells in lines if cells[0] == line]
        return cells[header.index(column)]

    rises = "held-out loss, {}, rise in %"
    docstrings = "language loss, docstrings, step 10,000 of 10,000"
    cells = {
        "DT minus LaMo {}, Wiki-RL minus LaMo {}": [
            cell("score", name, "minus LaMo") for name in ("DT", "Wiki-RL")
        ],
        "DT {}, DT with MLPs {}, random trunk {}": [
            cell("score", name, "minus LaMo", "<!-- reacher2d -->")
            for name in ("DT", "DT, MLP embedders", "random trunk")
        ],
        "kitchen-partial {}, hopper {}": [
            cell(rises.format(task), "DT", "minus LaMo's")
            for task in ("kitchen-partial 10%", "hopper 3%")
        ],
        "LaMo {}, all weights trained {}": [
            cell("reacher2d 10%, longer", docstrings, name) for name in ("LaMo", "all trained")
        ],
        "reacher2d {}, six tasks {}": [
            cell("return", "TD3+BC minus LaMo, score", "reacher2d", "<!-- baselines -->"),
            cell("score", "TD3+BC", "minus LaMo", "<!-- baselines -->"),
        ],
        "hopper {}, kitchen-partial {}": re.findall(
            rf"changes by ({INTERVAL}) points", read_text()
        ),
        "on a tenth of kitchen-partial: {}": re.findall(
            rf"model with all weights trained, ({INTERVAL})", read_text()
        ),
    }  # fmt: skip
    for template, figures in cells.items():
        assert template.format(*figures) in answers
    assert len(re.findall(INTERVAL, answers)) == sum(
        len(re.findall(INTERVAL, figure)) for figures in cells.values() for figure in figures
    )


@pytest.mark.slow
def test_the_page_is_what_the_report_writes(tmp_path, monkeypatch):
    for name in "README.md", "runs.csv":
        shutil.copy(HERE / "results" / name, tmp_path)
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(make, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.report"])
    report.main()
    assert (tmp_path / "README.md").read_text("utf-8") == (
        HERE / "results" / "README.md"
    ).read_text("utf-8")
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == set(
        re.findall(r"\]\((\w[\w-]*\.png)\)", (tmp_path / "README.md").read_text("utf-8"))
    )


def test_docstrings_start_as_the_models_texts_do(starting_lm):
    folder, start = starting_lm
    crops = run.read_documents(str(folder), 64).batch(4)
    assert crops.shape == (4, 64)
    assert (crops[:, 0] == start).all() and (crops[:, 1:] != start).all()


@pytest.mark.slow
def test_run_trains_as_lamo_does_and_measures_more(lm_folder, tmp_path, monkeypatch):
    arguments = f"{SHORT} --eval-every 2 --lm {lm_folder} --out".split()
    lamo.main([*arguments, str(tmp_path / "plain")])
    monkeypatch.setattr(lamo, "Recorder", lamo.Recorder)  # main replaces it
    run.main([*arguments, str(tmp_path / "measured")])
    assert checkpoint_weights(tmp_path / "plain") == checkpoint_weights(tmp_path / "measured")

    measured = [line for line in read_log(tmp_path / "measured") if "train_loss" in line]
    assert [line["step"] for line in measured] == [0, 2, 4]
    model, config, _ = lamo.load(tmp_path / "measured")
    dataset = lamo.load_dataset(config.data)
    ours = lamo.read_trajectories(dataset, config.ratio, config.seed)
    everything = {episode.id: episode for episode in dataset}
    is_chosen = {  # by the first state, which no two episodes share
        number: (ours.states == torch.from_numpy(episode.observations[0])).all(dim=1).any().item()
        for number, episode in everything.items()
    }
    chosen, others = lamo.split_episodes(dataset, config.ratio, config.seed)
    assert 0 < len(chosen) < len(everything) == len(chosen) + len(others)
    assert all(is_chosen[number] for number in chosen)
    assert not any(is_chosen[number] for number in others)

    # The loss on one long window of each held-out trajectory, acted out step by step, is alike.
    errors = []
    for episode in dataset.iterate_episodes(others[:5]):
        returns_to_go = episode.rewards[::-1].cumsum()[::-1].copy()
        for start in range(0, len(episode.actions) - model.context, model.context):
            steps = slice(start, start + model.context)
            window = [returns_to_go[steps], episode.observations[steps], episode.actions[steps]]
            window.append(np.arange(start, start + model.context))
            with torch.no_grad():
                predicted = model.predict(*(torch.as_tensor(part)[None] for part in window))
            errors.append((predicted[0] - torch.from_numpy(window[2])).square().mean().item())
    assert np.mean(errors) == pytest.approx(measured[-1]["held_out_loss"], rel=0.3)

    theirs = GPT2LMHeadModel.from_pretrained(lm_folder)
    tokens = run.read_documents(lm_folder, config.text_block).tokens.long()
    crops = np.linspace(0, len(tokens) - config.text_block, 32).astype(int)
    crops = torch.stack([tokens[i : i + config.text_block] for i in crops])
    with torch.no_grad():
        expected = theirs.eval()(input_ids=crops, labels=crops).loss.item()
    assert measured[0]["documents_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best-bc", "iql"])
def test_baselines_see_the_same_trajectories_and_episodes(name, tmp_path, monkeypatch):
    pytest.importorskip("d3rlpy", reason="needs results/requirements.txt")
    made = []
    monkeypatch.setattr(baselines, "STEPS", 4)
    monkeypatch.setattr(baselines, "EVALUATE_EVERY", 2)
    policy = baselines.Policy
    monkeypatch.setattr(baselines, "Policy", lambda it: made.append(policy(it)) or made[-1])
    out = tmp_path / "out"
    baselines.main([name, *f"{SHORT} --seed 3 --episodes 2 --out {out}".split()])
    first, second = (line for line in read_log(out) if "evaluation" in line)
    assert (first["step"], second["step"]) == (2, 4)

    # One environment at a time, and d3rlpy's own prediction
    env, returns = gym.make("Hopper-v5"), []
    for seed in (30_000, 30_001):
        (state, _), total, ended = env.reset(seed=seed), 0, False
        while not ended:
            action = made[-1].algorithm.predict(state[None].astype(np.float32))[0]
            state, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    [row] = second["evaluation"].values()
    assert row["return_mean"] == pytest.approx(np.mean(returns), rel=1e-3)

    trajectories = lamo.read_trajectories(lamo.load_dataset("demo/lamo/hopper/demo-v0"), 0.1, 3)
    episodes = baselines.to_episodes(trajectories)
    assert [episode.compute_return() for episode in episodes] == pytest.approx(
        trajectories.returns, rel=1e-5
    )
    assert [len(episode) for episode in episodes] == list(trajectories.lengths)
    best = baselines.to_episodes(trajectories, best=0.1)
    assert sorted(episode.compute_return() for episode in best) == pytest.approx(
        sorted(trajectories.returns)[-len(best) :], rel=1e-5
    )
    assert len(best) == round(0.1 * len(episodes))


@pytest.mark.parametrize("arguments", [[], ["iqi"], ["--help"]])
def test_a_baseline_must_be_named(arguments):
    with pytest.raises(lamo.InputError, match="name a method first, one of bc, best-bc"):
        baselines.main(arguments)


def test_a_baseline_needs_an_environment():
    pytest.importorskip("d3rlpy", reason="needs results/requirements.txt")
    with pytest.raises(lamo.InputError, match="--env none: a baseline needs an environment"):
        baselines.main(["bc", *SHORT.split(), *NOT_EVALUATED])


def test_only_lamo_resumes(capsys):
    with pytest.raises(SystemExit, match="2"):
        timing.main(["--resume", "runs/mine"])
    assert "unrecognized arguments: --resume" in capsys.readouterr().err


def test_without_d3rlpy_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "d3rlpy", None)
    with pytest.raises(lamo.InputError, match="pip install --no-deps -r results/requirements"):
        baselines.main(["iql"])


def test_intervals_are_those_of_a_plain_loop():
    tasks = [np.array([10.0, 50, 20, 40, 90]), np.array([0.0, 5, 100])]
    rng, means = random.Random(0), []
    for _ in range(10_000):
        drawn = sorted(rng.choice(scores) for scores in tasks for _ in scores)
        means.append(sum(drawn[2:6]) / 4)  # of eight, without the two lowest and the two highest
    middle, low, high = plot.interval(tasks)
    assert middle == (10 + 20 + 40 + 50) / 4
    assert [low, high] == pytest.approx([sorted(means)[250], sorted(means)[9750]], abs=3)


@pytest.mark.slow
def test_plot_draws_runs_by_task_and_method(trained, tmp_path, monkeypatch, capsys):
    header, *lines = read_log(trained[0])
    last = {"step": 4, "evaluation": lines[-1]["evaluation"]}
    runs = [
        ("lamo", 16, 10),
        ("lamo", 16, 20),
        ("lamo", 16, 60),
        ("lamo", 16, 30),
        ("lamo", 64, 5),
        ("dt", 0, 7),
    ]
    for number, (method, rank, score) in enumerate(runs):
        config = header["config"] | {
            "steps": 4,
            "method": method,
            "lora_rank": rank,
            "seed": number,
            "out": str(number),
        }
        first, best = (
            {"800": last["evaluation"]["800"] | {"score": value}} for value in (1, score)
        )
        log = [
            header | {"config": config},
            {"step": 2, "evaluation": first},
            last | {"evaluation": best},
        ]
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    monkeypatch.chdir(tmp_path)
    plot.main(["[0-4]", "5", "--out", "out.png"])  # a pattern, as Windows' shells hand it over
    assert (
        capsys.readouterr().out.splitlines()
        == [
            "lamo, lora_rank 16: 25.0 (10.0 to 60.0), 4 runs on hopper 10% (demo)",  # three of four draws alike: 5 % at each end
            "lamo, lora_rank 64: 5.0 (5.0 to 5.0), 1 runs on hopper 10% (demo)",
            "dt: 7.0 (7.0 to 7.0), 1 runs on hopper 10% (demo)",
        ]
    )
    with Image.open("out.png") as image:
        assert len(image.convert("RGB").getcolors(10**6)) > 100


def test_plot_tells_datasets_apart_but_not_seeds():
    base = asdict(Config())
    changes = {"data": "medium"}, {"data": "expert"}, {"data": "demo/medium", "demo": True}
    labels = plot.label_runs([base | change for change in changes])
    assert labels == [
        ("medium 100%", "lamo"),
        ("expert 100%", "lamo"),
        ("hopper 100% (demo)", "lamo"),
    ]
    seeds = [
        base | {"env": env, "data": "ant", "seed": seed, "targets": [10 * seed, 5 * seed]}
        for env in (None, "mine:Ant-v0")
        for seed in (1, 2)
    ]
    labels = [("ant 100%", "lamo")] * 2 + [("mine:Ant-v0 100%", "lamo")] * 2
    assert plot.label_runs(seeds) == labels


def test_plot_takes_what_was_evaluated(tmp_path):
    good = {"800": {"return_mean": 5.0, "score": 1.0}}
    failed = {"800": {"return_mean": None, "score": None}}

    def read_run(env, evaluations):
        log = [{"config": {"env": env, "steps": 2}}]
        log += [{"step": step, "evaluation": scores} for step, scores in evaluations.items()]
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
        return plot.read_run(tmp_path)[1]

    assert read_run("hopper", {1: failed, 2: good}) == {2: 1.0}
    with pytest.raises(ValueError, match="no score at its end: every episode failed"):
        read_run("hopper", {1: good, 2: failed})
    with pytest.raises(ValueError, match="has not ended"):
        read_run("hopper", {1: good})
    with pytest.raises(ValueError, match="it was trained with --env none"):
        read_run("none", {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, words",
    [
        ("{run} --out out.xyz", "a .png or .pdf for --out"),
        ("{bad} --out out.png", "log.jsonl"),
        ("{run} --out nowhere/out.png", "nowhere/out.png"),
    ],
)
def test_plot_refuses_in_words(trained, tmp_path, arguments, words):
    with pytest.raises(lamo.InputError, match=words):
        plot.main(arguments.format(run=trained[0], bad=tmp_path).split())


@pytest.mark.slow
def test_profile_measures_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for method, count in ("lamo", 8), ("dt", 7):
        timing.main(f"{SHORT} --method {method}".split())
        lines = capsys.readouterr().out.splitlines()[-count:]
        assert [line.split()[0] for line in lines[-4:]] == ["whole", "speed", "peak", "evaluation"]
        parts = {
            line[:12].strip(): float(line[12:].split()[0]) for line in lines[:-3] if " ms " in line
        }
        whole = parts.pop("whole step")
        assert 0.5 * whole < sum(parts.values()) < 2 * whole
    timing.main([*SHORT.split(), *NOT_EVALUATED])
    assert capsys.readouterr().out.splitlines()[-1].startswith("peak memory")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frozen", [True, False])
def test_profile_counts_the_products_of_the_logits_too(frozen):
    gpt2 = GPT2(50, 16, 8, 1, 2, dropout=0.0).requires_grad_(not frozen)
    gpt2.add_lora(4, 8, 0.0)
    gpt2.wte.weight.requires_grad_(not frozen)
    tokens = torch.randint(50, (3, 16))

    def plain():
        logits = gpt2.logits(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        plain()
    counted = timing.count_flops(lambda: gpt2.language_loss(tokens).backward())
    assert counted == counter.get_total_flops()
