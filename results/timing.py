"""Show where the time of a run goes. Takes the options of lamo.py and leaves nothing behind.

python -m results.timing --env hopper --ratio 0.1
"""

import sys
import timeit

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lamo
from eval import NUM_ENVS


def count_flops(function):
    """Return the floating-point operations of the matrix products in a function."""
    # The counter knows the products of plain attention, not those of every faster kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def peak_memory(device):
    """Return the most bytes that were in use on a GPU or by this process; None on Windows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def profile(config, model, trajectories, text, environments):
    """Print the time of a training step, of its parts, and of an evaluation.

    Each figure is the median of five calls, after one to warm up. Parts are timed by themselves, so
    they need not add up to the whole step.
    """

    def seconds(function):
        def wait():
            function()
            torch.zeros(1, device=config.device).item()  # a GPU works on while Python goes ahead

        return np.median(timeit.repeat(wait, number=1, repeat=6)[1:])

    optimizer = lamo.make_optimizer(model.train(), config)
    batch, tokens = lamo.draw(trajectories, text, config, 0)

    def step():
        batch, tokens = lamo.draw(trajectories, text, config, 0)
        lamo.train_step(model, optimizer, batch, tokens, config, 0)

    parts = {
        "drawing": seconds(lambda: lamo.draw(trajectories, text, config, 0)),
        "trajectories": seconds(lambda: model.action_loss(batch).backward()),
    }
    if text:
        parts["text"] = seconds(lambda: model.trunk.language_loss(tokens).backward())
    parts["optimiser"] = seconds(optimizer.step)
    parts["whole step"] = whole = seconds(step)
    for name, part in parts.items():
        print(f"{name:12} {1000 * part:10.2f} ms {part / whole:7.1%}")

    # Beside the speed of the step, that of the fastest thing the machine does
    speed = count_flops(step) / whole / 1e9
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    matrix = torch.rand(4096, 4096, device=config.device, dtype=dtype)
    peak = 2 * len(matrix) ** 3 / seconds(lambda: matrix @ matrix) / 1e9
    print(f"speed        {speed:10,.0f} GFLOP/s, ", end="")
    print(f"{speed / peak:.0%} of the {peak:,.0f} GFLOP/s of a matrix product")
    memory = peak_memory(config.device)
    if memory:
        print(f"peak memory  {memory / 2**30:10.2f} GiB")

    # An evaluation: simulating, and asking the policy
    if environments is None:
        return
    rows = range(environments.ready(NUM_ENVS))
    environments.reset(rows, list(rows))
    actions = [environments.action_space.sample() for _ in rows]
    stepping = seconds(lambda: environments.step(rows, actions)) / len(rows)
    history = trajectories.batch(len(rows), config.context)
    lengths = (history.pop("weight") > 0).sum(dim=1)
    acting = seconds(lambda: model.eval().act(**history, lengths=lengths)) / len(rows)
    print(f"evaluation   {1 / stepping:10,.0f} environment steps/s, {1 / acting:,.0f} actions/s")


def main(arguments):
    config, title = lamo.configure(lamo.parse(arguments, "results.timing"))
    print(title)
    config, _, model, trajectories, text, environments = lamo.prepare(config, title)
    profile(config, model, trajectories, text, environments)


if __name__ == "__main__":
    lamo.run_command(main, "results.timing")
