"""Train a method of d3rlpy on the trajectories of lamo.py, and evaluate it on the same episodes.

    pip install --no-deps -r results/requirements.txt
    python -m results.baselines iql --demo --env hopper --ratio 0.1      # then options of lamo.py

The methods are behaviour cloning (bc), of the best tenth of the trajectories (best-bc), TD3+BC
(td3-bc), IQL (iql) and CQL (cql). They take STEPS steps, where the published runs take 500,000 or
more. Of the options, those for data have an effect, and --episodes, --max-steps, --seed, --device and --out.
"""

from pathlib import Path

import numpy as np
import torch

import demo
import lamo
from eval import evaluate
from results.make import BASELINES

STEPS, EVALUATE_EVERY = 20_000, 5_000


def make_algorithm(name, domain, device):
    """Return an algorithm of d3rlpy (https://github.com/takuseno/d3rlpy).

    TD3+BC, CQL and IQL have the settings of its reproductions/offline, except that IQL has those of
    its authors in the kitchen, and scales rewards in locomotion alone, as they do. BC has d3rlpy's
    defaults, with standardised states, as LaMo and DT have them.
    """
    from d3rlpy import algos, models, optimizers, preprocessing

    standardised = {"observation_scaler": preprocessing.StandardObservationScaler()}
    if name == "td3-bc":
        config = algos.TD3PlusBCConfig(**standardised)
    elif name == "iql":
        schedule = optimizers.CosineAnnealingLRFactory(T_max=STEPS)
        settings = {"actor_optim_factory": optimizers.AdamFactory(lr_scheduler_factory=schedule)}
        if domain == "locomotion":
            settings["reward_scaler"] = preprocessing.ReturnBasedRewardScaler(multiplier=1000.0)
        if domain == "kitchen":
            encoder = models.encoders.VectorEncoderFactory([256, 256], dropout_rate=0.1)
            settings |= {"weight_temp": 0.5, "actor_encoder_factory": encoder}
        config = algos.IQLConfig(**settings)
    elif name == "cql":
        encoder = models.encoders.VectorEncoderFactory([256, 256, 256])
        config = algos.CQLConfig(
            actor_encoder_factory=encoder, critic_encoder_factory=encoder, alpha_learning_rate=0.0
        )
    else:
        config = algos.BCConfig(**standardised)
    return config.create(device=device)


def to_episodes(trajectories, best=1.0):
    """Return Trajectories, or the share of them with the best returns, as d3rlpy's episodes."""
    from d3rlpy.dataset import Episode

    ends = trajectories.lengths.cumsum()
    count = max(1, round(best * len(ends)))
    chosen = np.sort(np.argsort(-trajectories.returns, kind="stable")[:count])
    episodes = []
    for number in chosen:
        steps = slice(ends[number] - trajectories.lengths[number], ends[number])
        returns_to_go = np.append(trajectories.returns_to_go[steps].cpu().numpy(), 0)
        episodes.append(
            Episode(
                observations=trajectories.states[steps].cpu().numpy().astype(np.float32),
                actions=trajectories.actions[steps].cpu().numpy().astype(np.float32),
                rewards=-np.diff(returns_to_go).astype(np.float32)[:, None],
                terminated=bool(trajectories.terminated[number]),
            )
        )
    return episodes


class Policy(torch.nn.Module):
    """An algorithm of d3rlpy as a policy for `rollout`. It sees the state alone."""

    context = 1

    def __init__(self, algorithm):
        super().__init__()
        self.algorithm, self.network = algorithm, algorithm.impl.policy

    def act(self, returns_to_go, states, actions, timesteps, lengths):
        states = states[:, 0].cpu().numpy().astype(np.float32)
        return torch.from_numpy(self.algorithm.predict(states))


def main(arguments):
    """Train and evaluate as the command line says."""
    if not arguments or arguments[0] not in BASELINES:
        raise lamo.InputError(f"name a method first, one of {', '.join(BASELINES)}")
    with lamo.on_error("cannot import d3rlpy; pip install --no-deps -r results/requirements.txt"):
        import d3rlpy

    name, *arguments = arguments
    given = lamo.parse(arguments, "results.baselines") | {"method": "dt"}  # which loads no text
    config, title = lamo.configure(given)
    config, header, _, trajectories, _, environments = lamo.prepare(config, title)
    if environments is None:
        raise lamo.InputError("--env none: a baseline needs an environment for its evaluation")
    out = Path(config.out or f"runs/{config.env}-{name}-{config.ratio:g}-{config.seed}")
    out.mkdir(parents=True)
    recorder = lamo.Recorder(out, header)

    d3rlpy.seed(config.seed)
    episodes = to_episodes(trajectories, best=0.1 if name == "best-bc" else 1.0)
    buffer = d3rlpy.dataset.create_infinite_replay_buffer(episodes)
    algorithm = make_algorithm(name, demo.DOMAINS.get(config.env), config.device)
    quietly = {"logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "show_progress": False}
    for epoch, _ in algorithm.fitter(buffer, STEPS, EVALUATE_EVERY, **quietly):
        scores = evaluate(
            Policy(algorithm), environments, [0.0], config.episodes, lamo.first_seed(config),
            header["reference"],
        )  # fmt: skip
        recorder.log_scores(epoch * EVALUATE_EVERY, scores)


if __name__ == "__main__":
    lamo.run_command(main, "results.baselines")
