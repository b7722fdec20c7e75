"""The demo: small assets and settings for a machine without a GPU or the Hugging Face hub."""

import torch

NOTICE = "DEMO ASSETS, NOT COMPARABLE TO THE PAPER"

# Minutes on two CPU cores.
SETTINGS = {
    "lm": "demo/gpt2-tiny",
    "layers": 3,
    "width": 128,
    "heads": 4,
    "dropout": 0.0,
    "text": "demo/text.txt",
    "text_block": 256,
    "steps": 1000,
    "batch": 32,
    "lr_schedule": "cosine",
    "warmup": 100,
    "eval_every": 1000,
}
TUNED = {  # by results/make.py, for each domain; for others, by results/first/
    "lamo": {
        "locomotion": {"lr": 1e-2, "dropout": 0.1},
        "kitchen": {"lr": 3e-3, "dropout": 0.1},
        "reacher2d": {"lr": 3e-3, "lora_dropout": 0.0},
        None: {"lr": 1e-2, "lora_rank": 64},
    },
    "dt": {
        "locomotion": {"lr": 1e-2},
        "kitchen": {"lr": 3e-3, "dropout": 0.1},
        "reacher2d": {"lr": 1e-3},
        None: {"lr": 1e-2, "dropout": 0.1},
    },
    "wiki-rl": {
        "locomotion": {"lr": 1e-2, "dropout": 0.1},
        "kitchen": {"lr": 3e-2},
        "reacher2d": {"lr": 3e-3},
        None: {"lr": 3e-3},
    },
}
DOMAINS = {
    "hopper": "locomotion",
    "halfcheetah": "locomotion",
    "walker2d": "locomotion",
    "kitchen-complete": "kitchen",
    "kitchen-partial": "kitchen",
    "kitchen-mixed": "kitchen",
    "reacher2d": "reacher2d",
}

# Tasks whose data is ours. reacher2d is the paper's, but Minari has no data of it.
TASKS = {
    name: {
        "env_id": env_id,
        "data": f"demo/lamo/{name}/demo-v0",
        "targets": targets,
        "return_scale": return_scale,
        "context": context,
        "reference": reference,
    }
    for name, env_id, targets, return_scale, context, reference in (
        ("reacher2d", "demo.reacher2d:lamo/Reacher2d-v0", [76, 40], 10, 5, (0, 100)),
        ("pointmaze", "gymnasium_robotics:PointMaze_UMaze-v3", [300, 50], 100, 20, (0, 300)),
        ("cartpole", "CartPole-v1", [500, 150], 100, 20, (0, 500)),
        ("catch", "demo.catch:lamo/Catch-v0", [10, 5, 1], 10, 20, (0, 10)),
    )
}


def settings(env, method):
    """Return the demo's options for a task and a method, as a dict.

    A task without data in the demo keeps its own.
    """
    tuned = TUNED[method]
    options = SETTINGS | tuned.get(DOMAINS.get(env), tuned[None])
    if env in DOMAINS:
        options["data"] = f"demo/lamo/{env}/demo-v0"
    return options


def reason(given, fetch):
    """Return why a run takes the demo, in words, or None if it does not.

    Args:
        given: the options on the command line, by name.
        fetch: gets the files of the paper's run; raises ValueError if it cannot.
    """
    if given.get("demo"):
        return "--demo"
    if given.keys() & {"lm", "data", "text", "device"}:
        return None  # what the user chose is never replaced
    if not torch.cuda.is_available():
        return "no CUDA GPU; to train with the paper's settings anyway, add --device cpu"
    try:
        fetch()
    except ValueError as error:
        return str(error)
