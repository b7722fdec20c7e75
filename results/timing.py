"""Where the time of a run goes: python lamo.py ... --profile"""

import resource
import sys
import timeit

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lamo
from eval import ALIVE


def count_flops(function, vocabulary, tokens):
    """Floating-point operations of the matrix products in a function, which predicts `tokens` tokens of text."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # not every other kernel is counted
        function()
    products = 2 + vocabulary.requires_grad  # hidden in F.linear_cross_entropy: forward, and backward to what needs it
    return counter.get_total_flops() + 2 * products * tokens * vocabulary.numel()


def profile(model, trajectories, text, environments, config):
    """Print what a training step and an evaluation of this Config take: medians of five calls, after one to warm up."""

    def seconds(function):
        waiting = lambda: (function(), torch.zeros(1, device=config.device).item())  # until a GPU is done
        return np.median(timeit.repeat(waiting, number=1, repeat=6)[1:])

    optimizer = lamo.make_optimizer(model.train(), config)
    windows = trajectories.batch(config.batch, config.context)
    parts = {"sampling": seconds(lambda: trajectories.batch(config.batch, config.context))}
    parts["trajectories"] = seconds(lambda: model.action_loss(windows).backward())
    if text:
        crops = text.batch(config.text_batch).to(config.device)
        parts["sampling"] += seconds(lambda: text.batch(config.text_batch).to(config.device))
        parts["text"] = seconds(lambda: model.language_loss(crops).backward())
    parts["optimiser"] = seconds(optimizer.step)
    step = lambda: lamo.training_step(model, optimizer, trajectories, text, 0, config)
    parts["whole step"] = whole = seconds(step)
    for name, part in parts.items():
        print(f"{name:12} {1000 * part:10.2f} ms {part / whole:7.1%}")

    speed = count_flops(step, model.gpt2.wte.weight, crops[:, 1:].numel() if text else 0) / whole / 1e9
    matrix = torch.rand(4096, 4096, device=config.device, dtype=torch.bfloat16 if config.bf16 else torch.float32)
    peak = 2 * len(matrix) ** 3 / seconds(lambda: matrix @ matrix) / 1e9
    print(f"speed        {speed:10,.0f} GFLOP/s, {speed / peak:.0%} of the {peak:,.0f} GFLOP/s of a matrix product")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # in bytes
    if model.state_mean.is_cuda:
        memory = torch.cuda.max_memory_allocated(config.device)
    print(f"peak memory  {memory / 2**30:10.2f} GiB")

    rows = range(environments.grow(ALIVE))
    list(environments.threads.map(environments.reset, rows, rows))
    actions = [environments.action_space.sample() for _ in rows]
    stepping = seconds(lambda: list(environments.threads.map(environments.step, rows, actions))) / len(rows)
    history = trajectories.batch(len(rows), config.context)
    lengths = history.pop("mask").sum(dim=1)
    acting = seconds(lambda: model.eval().act(**history, lengths=lengths)) / len(rows)
    print(f"evaluation   {1 / stepping:10,.0f} environment steps/s, {1 / acting:,.0f} actions/s")
