"""Tests of the comparison: its tables against its runs, plots and timings."""

import csv
import json
import random
import re
import statistics
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lamo
from lamo import GPT2, Config
from results import plot, timing
from test_lamo import HERE, SHORT, isolated, lm_folder, read_log, trained


def test_tables_and_figures_are_those_of_the_runs():
    rows = [
        row
        for row in csv.DictReader((HERE / "results" / "runs.csv").open())
        if row["seed"] != "100"
    ]
    tables = (HERE / "results" / "table.md").read_text()
    answers = " ".join(
        (HERE / "README.md").read_text().split("## Does it work?")[1].split("\n## ")[0].split()
    )
    figures = re.findall(r"[-+]?\d+\.\d \(-?\d+\.\d to -?\d+\.\d\)|[\d.]+ ± [\d.]+\d", answers)
    assert len(figures) > 4 and all(figure in tables for figure in figures)
    for table in tables.strip().split("\n\n"):
        assert f"\n\n{table}\n" in (HERE / "results" / "README.md").read_text()
        header, _, *lines, _, differences = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")
        )
        methods, scores = [name.lower() for name in header[1:]], {}
        for task, *cells in lines:
            for method, cell in zip(methods, cells, strict=True):
                chosen = [
                    row for row in rows if (row["task"], row["method"].lower()) == (task, method)
                ]
                assert sorted(row["seed"] for row in chosen) == list("01234")
                assert len({row["options"] for row in chosen}) == 1
                returns = [float(row["best_return"]) for row in chosen]
                printed = cell.split(" (")[0].split(" ± ")
                digits = len(printed[0].partition(".")[2])
                expected = statistics.mean(returns), statistics.stdev(returns)
                assert [float(part) for part in printed] == pytest.approx(
                    expected, rel=0, abs=0.51 * 10**-digits
                )
                scores |= {(task, method, row["seed"]): float(row["best_score"]) for row in chosen}
        for method, cell in zip(methods[1:], differences[2:], strict=True):
            pairs = [
                score - scores[task, methods[0], seed]
                for (task, other, seed), score in scores.items()
                if other == method
            ]
            assert float(cell.split()[0]) == pytest.approx(statistics.mean(pairs), abs=0.051)


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
    plot.main([*map(str, range(len(runs))), "--out", "out.png"])
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
        base | {"env": None, "data": "ant", "seed": seed, "targets": [10 * seed, 5 * seed]}
        for seed in (1, 2)
    ]
    assert plot.label_runs(seeds) == [("ant 100%", "lamo")] * 2


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
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frozen", [True, False])
def test_profile_counts_the_products_of_all_logits_too(frozen):
    gpt2 = GPT2(50, 16, 8, 1, 2, dropout=0.0).requires_grad_(not frozen)
    gpt2.add_lora(4, 8, 0.0)
    gpt2.wte.weight.requires_grad_(not frozen)
    tokens = torch.randint(50, (3, 16))

    def plain():
        logits = (gpt2.logits(tokens))[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        plain()
    counted = timing.count_flops(lambda: gpt2.language_loss(tokens).backward())
    assert counted == counter.get_total_flops()
