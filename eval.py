"""Roll out a return-conditioned policy in Gymnasium environments, and score it.

    python eval.py runs/hopper-lamo-0.1-0                                  # evaluate a run again
    python eval.py runs/hopper-lamo-0.1-0 --targets 3600 --episodes 50
    python eval.py runs/hopper-lamo-0.1-0 --video hopper.gif               # and render an episode

A rollout needs a policy and an environment. It does not ask how the policy was trained.
"""

import argparse
import importlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from farama_notifications import notifications
from gymnasium.envs.registration import WrapperSpec
from gymnasium.spaces import Box, Dict, Discrete
from tqdm import tqdm

import atari

notifications.pop("gymnasium_robotics", None)  # silences a notice about other environments
NUM_ENVS = 20  # at a time; a kitchen takes 90 MB

# Gymnasium's wrappers that cannot be made again from a file: they depend on earlier episodes, write
# files, or open a window.
LOST_WRAPPERS = "NormalizeObservation", "NormalizeReward", "RecordVideo", "HumanRendering"


# A dataset or a checkpoint may come from anyone, so no code that its EnvSpec names is run. Only
# registered environments are made, with wrappers of Gymnasium or of their own registration.
def spec_of(env_id, recorded=None):
    """Return the EnvSpec of an id that the user names. `module:ID` imports the module first.

    `recorded` is an EnvSpec as text. If it is of the same environment, its settings and wrappers
    are taken. Prints the wrappers that are lost.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)  # it registers the environment
    registered = gym.spec(name)
    recorded = json.loads(recorded or "{}")
    wrappers = [WrapperSpec(**wrapper) for wrapper in recorded.get("additional_wrappers", ())]
    if recorded.get("id") == registered.id:
        settings = recorded
        kept = [wrapper for wrapper in wrappers if can_rebuild(wrapper, registered)]
    else:
        settings = {"max_episode_steps": registered.max_episode_steps}
        kept = registered.additional_wrappers
    for wrapper in wrappers:
        if wrapper not in kept:
            print(f"evaluating without the wrapper {wrapper.name}")
    return with_settings(registered, settings, kept)


def can_rebuild(wrapper, registered):
    """Return whether a recorded wrapper is Gymnasium's, or one that comes with its environment."""
    if wrapper in registered.additional_wrappers:
        return True
    known = getattr(gym.wrappers, wrapper.name, None)
    is_known = known and wrapper.entry_point == f"{known.__module__}:{known.__name__}"
    return is_known and wrapper.kwargs is not None and wrapper.name not in LOST_WRAPPERS


def with_settings(registered, recorded, wrappers):
    """Return a copy of a registered EnvSpec, with the settings of a recorded one, a dict."""
    kwargs = registered.kwargs | recorded.get("kwargs", {})
    if kwargs.get("render_mode") != "rgb_array":  # others open a window, or keep all pictures
        kwargs.pop("render_mode", None)
    if registered.name == "FrankaKitchen":  # a subtask is rewarded once; see `recorded_rewards`
        kwargs |= {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
    limit = recorded.get("max_episode_steps")
    return replace(
        registered,
        kwargs=kwargs,
        max_episode_steps=int(limit) if limit else None,  # some specs store it as a float
        additional_wrappers=tuple(wrappers),
    )


def spec_to_json(spec):
    """Return an EnvSpec as text for `spec_from_json`; None if it holds what text cannot express."""
    try:
        return spec.to_json()
    except (TypeError, ValueError):  # an array or a function
        return None


def spec_from_json(text):
    """Return the EnvSpec that a file describes. Nothing in the file runs as code.

    The environment must be in Gymnasium's registry, after importing gymnasium_robotics, demo/ and
    Atari's games, and its wrappers must be Gymnasium's, or registered with it. Raises ValueError if
    not, or if there is no text.
    """
    if not text:
        raise ValueError("no environment is recorded")
    recorded = json.loads(text)
    if recorded["id"] not in gym.registry:
        import gymnasium_robotics  # noqa: F401

        from demo import catch, reacher2d  # noqa: F401

        if recorded["id"].startswith("ALE/"):
            atari.import_games()
    registered = gym.registry.get(recorded["id"])
    package = recorded["entry_point"].split(".")[0]
    if registered is None or str(registered.entry_point).split(".")[0] != package:
        raise ValueError(f"Gymnasium does not know the environment {recorded['id']}")
    wrappers = [WrapperSpec(**wrapper) for wrapper in recorded.get("additional_wrappers", ())]
    for wrapper in wrappers:
        if not can_rebuild(wrapper, registered):
            raise ValueError(f"the wrapper {wrapper.name} of {registered.id} cannot be rebuilt")
    return with_settings(registered, recorded, wrappers)


def policy_observation(observation):
    """Return what a policy sees of an observation, or of those of an episode.

    From a dict it sees the arrays, joined in alphabetical order; dicts inside it are left out.
    """
    if not isinstance(observation, dict):
        return np.asarray(observation)
    parts = [part for _, part in sorted(observation.items()) if not isinstance(part, dict)]
    return np.concatenate(parts, axis=-1)


def policy_spaces(env):
    """Return the Boxes of a policy's observations and actions in an environment or MinariDataset.

    Observations are vectors, or images of uint8 with three axes. Actions are vectors, one-hot where
    an action is one of several choices (Discrete). Raises ValueError if the spaces are others.
    """

    def is_vector(space):
        return isinstance(space, Box) and len(space.shape) == 1 and space.dtype != bool

    observations, actions = env.observation_space, env.action_space
    if isinstance(observations, Dict):
        entries = sorted(observations.items())
        entries = {name: part for name, part in entries if not isinstance(part, Dict)}
        if not entries:
            raise ValueError(
                "its observations have vectors only in nested dicts, which are ignored"
            )
        for name, part in entries.items():
            if not is_vector(part):
                raise ValueError(f"the entry {name} of its observations is {part}, not a vector")
        observations = gym.spaces.flatten_space(gym.spaces.Tuple(entries.values()))
    is_image = len(observations.shape or ()) == 3 and observations.dtype == np.uint8
    if not (is_vector(observations) or is_image):
        kinds = "vectors of numbers (Box), or images (H, W, C) or (C, H, W) of uint8"
        raise ValueError(f"its observations are {observations}; LaMo can see only {kinds}")
    if isinstance(actions, Discrete):
        actions = Box(0, 1, (int(actions.n),), np.float32)
    if not is_vector(actions):
        kinds = "vectors of real numbers (Box), or one choice (Discrete)"
        raise ValueError(f"its actions are {actions}; LaMo can take only {kinds}")
    return observations, actions


class Environments:
    """Copies of an environment, made when they are first needed, and stepped by a thread per core.

    Threads help because MuJoCo releases Python's interpreter lock while it simulates. Environments
    that observe pictures run in the main thread: in any other, MuJoCo draws black ones.

    Args:
        spec: the EnvSpec of the environment.
        num_envs: the most copies to run at a time, at most NUM_ENVS.
        render_mode: Gymnasium's, for `rollout` to take pictures.
    Raises:
        ValueError: a policy cannot handle its observations or actions; see `policy_spaces` and
            `see`. Errors of the environment's own `reset` pass through.
    """

    def __init__(self, spec, num_envs=NUM_ENVS, render_mode=None):
        self.spec, self.num_envs, self.render_mode = spec, min(num_envs, NUM_ENVS), render_mode
        self.envs = [self.make()]
        self.observation_space, self.action_space = policy_spaces(self.envs[0])
        observation, _ = self.envs[0].reset(seed=0)
        self.see(observation)  # if it fails, then now, not in the middle of a run
        draws = len(self.observation_space.shape) == 3 and not spec.id.startswith("ALE/")
        self.map = map if draws else ThreadPoolExecutor(os.cpu_count()).map

    def make(self):
        keywords = {}  # not every environment takes a render_mode
        wrappers = [wrapper.name for wrapper in self.spec.additional_wrappers]
        sees_pictures = "AddRenderObservation" in wrappers
        if self.render_mode or sees_pictures:
            if sys.platform == "linux" and not os.environ.get("DISPLAY"):
                os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
        if self.render_mode:
            keywords["render_mode"] = self.render_mode
            # From Gymnasium 1.4 on, the default camera would let a robot leave the picture. But a
            # policy that sees pictures needs those of the camera that it was trained with.
            is_mujoco = str(self.spec.entry_point).startswith("gymnasium.envs.mujoco")
            has_camera = sees_pictures or {"camera_name", "camera_id"} & self.spec.kwargs.keys()
            if is_mujoco and not has_camera:
                keywords["camera_name"] = "track"
        return atari.preprocess_env(gym.make(self.spec, disable_env_checker=True, **keywords))

    def ready(self, count):
        """Make copies until there are `count`, but no more than `num_envs`; return how many.

        If no other copy can be made, those that exist have to do.
        """
        while len(self.envs) < min(count, self.num_envs):
            try:
                self.envs.append(self.make())
            except Exception as error:  # environments raise anything
                self.num_envs = len(self.envs)
                tqdm.write(f"only {self.num_envs} at a time of {self.spec.id}: {error!r}")
        return min(count, self.num_envs)

    def reset(self, rows, seeds):
        """Start episodes in some rows. Returns what `step` returns, with a reward of 0."""

        def reset(env, seed):
            observation, _ = env.reset(seed=seed)
            return observation, 0.0, False, False, {}

        return list(self.map(partial(self._attempt, reset), rows, seeds))

    def step(self, rows, actions):
        """Take a step in some rows.

        Returns for each row (observation, reward, whether the episode has ended, whether it is a
        success). Success is NaN where the environment gives no number. Where the simulator fails,
        the row has (None, NaN, True, NaN).
        """

        def step(env, action):
            if isinstance(env.action_space, Discrete):
                action = int(env.action_space.start + action.argmax())
            return env.step(action)

        return list(self.map(partial(self._attempt, step), rows, actions))

    def see(self, observation):
        """Return what a policy sees of an observation. Raises ValueError if it is not valid."""
        observation = policy_observation(observation)
        if observation.shape != self.observation_space.shape:
            raise ValueError(f"an observation has the shape {observation.shape}")
        if not np.isfinite(observation).all():
            raise ValueError("an observation is not finite")
        return observation

    def _attempt(self, function, row, argument):
        try:
            if self.envs[row] is None:  # it failed in its last episode
                self.envs[row] = self.make()
            observation, reward, terminated, truncated, info = function(self.envs[row], argument)
            observation, reward = self.see(observation), float(np.squeeze(reward))
            if not np.isfinite(reward):
                raise ValueError("a reward is not finite")
            success = np.asarray(info.get("success", info.get("is_success")))
            is_number = success.size == 1 and success.dtype.kind in "biuf"
            success = float(success.item()) if is_number else np.nan
            return observation, reward, terminated or truncated, success
        except Exception as error:  # environments raise anything
            tqdm.write(f"an episode of {self.spec.id} failed: {error!r}")
            self.envs[row] = None
            return None, np.nan, True, np.nan


class Histories:
    """The last K steps of `count` episodes, one row for each, starting at the left of the row.

    Numbers are float64, as simulators have them; the policy centres them before it rounds them.
    Images stay uint8.
    """

    def __init__(self, count, context, observation_space, action_space):
        self.returns_to_go = np.zeros((count, context))
        images = len(observation_space.shape) == 3
        shape = count, context, *observation_space.shape
        self.states = np.zeros(shape, np.uint8 if images else np.float64)
        self.actions = np.zeros((count, context, *action_space.shape))
        self.timesteps = np.zeros((count, context), np.int64)
        self.lengths = np.zeros(count, np.int64)  # real steps in each row
        self.episode_steps = np.zeros(count, np.int64)  # of each row's episode
        self.action_space = action_space

    def arrays(self):
        return self.returns_to_go, self.states, self.actions, self.timesteps

    def clear(self, row):
        """Forget the episode of a row."""
        self.lengths[row] = self.episode_steps[row] = 0

    def add(self, row, return_to_go, state):
        """Add a step whose action is not known yet. In a full row, drop the oldest step."""
        if self.lengths[row] == self.timesteps.shape[1]:
            for array in self.arrays():
                array[row, :-1] = array[row, 1:]
        else:
            self.lengths[row] += 1
        newest = self.lengths[row] - 1
        self.returns_to_go[row, newest] = return_to_go
        self.states[row, newest] = state
        self.timesteps[row, newest] = self.episode_steps[row]
        self.episode_steps[row] += 1

    def act(self, policy, rows, batch=None):
        """Return a policy's actions for some rows, as `Environments.step` takes them, and add them.

        Repeats rows until the policy has a batch of the given size.
        """
        device = next(policy.parameters()).device
        repeated = np.resize(rows, batch or len(rows))
        inputs = [array[repeated] for array in (*self.arrays(), self.lengths)]
        actions = policy.act(*(torch.as_tensor(array, device=device) for array in inputs))
        actions = actions[: len(rows)].cpu().numpy()
        space = self.action_space
        if np.issubdtype(space.dtype, np.integer):
            actions = np.rint(actions)
        # Clip in the environment's own type: rounding must not lead beyond the bounds.
        actions = np.clip(actions.astype(space.dtype), space.low, space.high)
        self.actions[rows, self.lengths[rows] - 1] = actions
        return actions


@torch.no_grad()
def rollout(
    policy, environments, targets, episodes, seed, delayed=False, frames=None, frame_every=1
):
    """Run `episodes` episodes for each target, several at a time. Where one ends, another starts.

    Args:
        policy: a torch module in evaluation mode, whose parameters are on the device to use. It has
            `context` (K, the steps that it sees), and `act(returns_to_go (B, K), states (B, K, S),
            actions (B, K, A), timesteps (B, K), lengths (B,)) -> (B, A)`; see LaMo.act. Numbers are
            float64, images uint8. A discrete action is one-hot.
        environments: an Environments.
        targets: returns to condition the policy on.
        seed: episode i of each target starts from the environment's seed `seed + i`.
        delayed: rewards count at the end of an episode, so that the return-to-go stays the target.
        frames: a list that gets a picture (H, W, 3) every `frame_every` steps of a single episode.
    Returns:
        returns, lengths, successes: arrays (targets, episodes). A return is NaN if the simulator
            failed. A success is 1 if a step reported one, and NaN if the environment never says.
    """
    spaces = environments.observation_space, environments.action_space
    target_of = np.repeat(targets, episodes).astype(float)
    returns, lengths = np.zeros(len(target_of)), np.zeros(len(target_of), int)
    successes = np.full(len(target_of), np.nan)
    waiting = list(range(len(target_of)))

    # Each row is an environment, with the number of the episode that it runs, or -1.
    count = environments.ready(len(target_of))
    episode = np.full(count, -1)
    histories = Histories(count, policy.context, *spaces)
    progress = tqdm(
        total=len(target_of), desc="simulating", unit="episode", leave=False, disable=None
    )

    def end(row):
        episode[row] = -1
        histories.clear(row)
        progress.update()

    while waiting or (episode >= 0).any():
        # Start the next episodes in rows that are free.
        free = np.flatnonzero(episode < 0)[: len(waiting)]
        for row in free:
            episode[row] = waiting.pop(0)
        seeds = [int(seed + number % episodes) for number in episode[free]]
        for row, (state, _, ended, _) in zip(free, environments.reset(free, seeds)):
            if ended:  # the simulator failed
                returns[episode[row]] = np.nan
                end(row)
            else:
                histories.add(row, target_of[episode[row]], state)

        # Ask the policy for the actions. The batch always has NUM_ENVS rows: rounding depends on
        # its size, and returns must not.
        running = np.flatnonzero(episode >= 0)
        if len(running) == 0:
            continue
        actions = histories.act(policy, running, NUM_ENVS)

        # Take a picture of what the policy acts on, then step the environments.
        if frames is not None and lengths[0] % frame_every == 0:
            frames.append(environments.envs[0].render())
        steps = environments.step(running, actions)
        for row, (state, reward, ended, success) in zip(running, steps):
            number = episode[row]
            returns[number] += reward
            lengths[number] += 1
            successes[number] = np.fmax(successes[number], success)
            if ended:
                end(row)
                continue
            # The return-to-go is the target minus the rewards so far.
            rewarded = 0.0 if delayed else returns[number]
            histories.add(row, target_of[number] - rewarded, state)

    progress.close()
    return tuple(part.reshape(len(targets), episodes) for part in (returns, lengths, successes))


def evaluate(policy, environments, targets, episodes, seed, reference, delayed=False):
    """Roll a policy out, and summarise the returns of each target.

    Args:
        reference: (low, high) returns that score 0 and 100. The others are those of `rollout`.
    Returns:
        a dict {target as text: row}, where a row is a dict of return_mean, return_std (of the
        population), return_interval (95 % confidence in the mean, from 10,000 bootstrap samples),
        score, success (the share of episodes, if the environment reports it), length_mean (in
        steps), and failed, the number of episodes in which the simulator failed. Those count in
        length_mean only. Where all have failed, the other numbers are None.
    """
    was_training = policy.training
    policy.eval()
    results = rollout(policy, environments, targets, episodes, seed, delayed)
    policy.train(was_training)

    low, high = reference
    scores = {}
    for target, target_returns, lengths, successes in zip(targets, *results):
        worked = np.isfinite(target_returns)
        good = target_returns[worked]
        row = dict.fromkeys(("return_mean", "return_std", "return_interval", "score"))
        if len(good) > 0:
            resamples = np.random.default_rng(0).choice(good, (10_000, len(good)))
            row["return_mean"] = float(good.mean())
            row["return_std"] = float(good.std())
            row["return_interval"] = np.percentile(resamples.mean(axis=1), (2.5, 97.5)).tolist()
            row["score"] = float(100 * (good.mean() - low) / (high - low))
            if np.isfinite(successes[worked]).any():
                row["success"] = float(np.nanmean(successes[worked]))
        row["length_mean"] = float(lengths.mean())
        row["failed"] = episodes - len(good)
        scores[f"{target:.9g}"] = row
    return scores


def best_target(scores):
    """Return the target with the highest mean return and its row; None, None if all failed."""
    rated = [item for item in scores.items() if item[1]["return_mean"] is not None]
    return max(rated, key=lambda item: item[1]["return_mean"], default=(None, None))


def format_scores(scores, reference):
    """Return the table of an evaluation as text: a line for each target, the best one marked."""
    best, _ = best_target(scores)
    width = max([8, *map(len, scores)])
    title = f"{'target':>{width}} {'return':>18} {'95 % interval':>19} {'score':>7} {'length':>7}"
    reports_success = any("success" in row for row in scores.values())
    if reports_success:
        title += f" {'success':>8}"
    lines = [title]
    for target, row in scores.items():
        mean_and_std, interval, score = "", "", ""
        if row["return_mean"] is not None:
            mean_and_std = f"{row['return_mean']:.1f} ± {row['return_std']:.1f}"
            interval = "{:.1f} to {:.1f}".format(*row["return_interval"])
            score = f"{row['score']:.1f}"
        line = f"{target:>{width}} {mean_and_std:>18} {interval:>19} {score:>7}"
        line += f" {row['length_mean']:7.1f}"
        if reports_success:
            line += f" {100 * row['success']:7.0f}%" if "success" in row else " " * 9
        if row["failed"] > 0:
            line += f"  {row['failed']} failed"
        if target == best:
            line += "  best"
        lines.append(line)
    low, high = reference
    lines.append(f"score: 0 for a return of {low:g}, 100 for {high:g}")
    return "\n".join(lines)


def record(policy, spec, target, seed, path, delayed=False):
    """Write a .gif or .mp4 of an episode; return the episode's return and its length in steps."""
    import imageio.v2 as imageio

    environments = Environments(spec, num_envs=1, render_mode="rgb_array")
    fps = environments.envs[0].metadata.get("render_fps") or 25
    every = max(1, round(fps / 25))
    frames = []
    returns, lengths, _ = rollout(policy, environments, [target], 1, seed, delayed, frames, every)
    if np.isnan(returns).any():
        raise ValueError("the episode failed, see above")
    if any(frame is None for frame in frames):
        raise ValueError(f"{spec.id} draws no pictures")
    imageio.mimsave(path, frames, fps=fps / every)
    return float(returns[0, 0]), int(lengths[0, 0])


def make_environments(env, policy, config, header):
    """Return the Environments of a run, or those of an id `env`.

    Raises ValueError if the policy was trained on other observations or actions.
    """
    import lamo

    if env:
        spec = spec_of(env, header["env_spec"])
    else:
        spec = spec_from_json(header["env_spec"])
    spec.max_episode_steps = lamo.episode_limit(
        config, spec, policy.max_timesteps, header["longest_was_cut"]
    )
    environments = Environments(spec)

    def describe(observation_shape, action_size, discrete):
        actions = f"{action_size} choices" if discrete else f"actions of {action_size} numbers"
        return f"observations of shape {tuple(observation_shape)} and {actions}"

    discrete = isinstance(environments.envs[0].action_space, Discrete)
    shapes = environments.observation_space.shape, len(environments.action_space.low)
    offered = describe(*shapes, discrete)
    shapes = policy.image_shape or policy.state_mean.shape, len(policy.action_center)
    needed = describe(*shapes, policy.discrete)
    if offered != needed:
        raise ValueError(f"{spec.id} has {offered}, but the run was trained on {needed}")
    return environments


def main(arguments):
    """Evaluate a run as the command line says."""
    import lamo

    parser = argparse.ArgumentParser(
        "eval.py", usage=argparse.SUPPRESS, description=__doc__.split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", help="folder of a run of lamo.py")
    add(
        "--targets",
        type=lamo.TARGET,
        nargs="+",
        help="target returns (-1000, not -1e3); default: the run's",
    )
    add("--episodes", type=lamo.EPISODES, help="episodes per target; default: the run's")
    add(
        "--seed",
        type=lamo.number(int, 0, 1e15),
        help="environment's seed of the first episode; default: 10,000 times the run's seed",
    )
    add("--env", help="environment to evaluate in, ID or module:ID; default: the run's")
    add("--lm", help="the language model, if it has moved")
    add("--device", default=lamo.Config.device, help="cpu, cuda, cuda:1, ...")
    add("--video", metavar="FILE", help="render an episode of the best target to a .gif or .mp4")
    options = parser.parse_args(arguments)
    if options.video and Path(options.video).suffix not in (".gif", ".mp4"):
        parser.error(f"--video {options.video} must end in .gif or .mp4")
    if options.video and not Path(options.video).parent.is_dir():
        parser.error(f"--video {options.video} is in a folder that does not exist; make it first")

    policy, config, header = lamo.load(options.folder, options.device, options.lm)
    print(header["title"])
    targets = options.targets or config.targets
    episodes = options.episodes or config.episodes
    seed = lamo.first_seed(config) if options.seed is None else options.seed
    with lamo.on_error("cannot make the environment; name one with --env ID or --env module:ID"):
        environments = make_environments(options.env, policy, config, header)
    spec = environments.spec
    print(f"env     {spec.id}, episodes of at most {spec.max_episode_steps} steps")
    reference = header["reference"]
    scores = evaluate(policy, environments, targets, episodes, seed, reference, config.delayed)
    print(format_scores(scores, reference))

    target, _ = best_target(scores)
    if target is None:
        raise lamo.InputError("every episode failed, see above")
    if options.video:
        with lamo.on_error(
            f"cannot render {options.video}; if MuJoCo fails, try MUJOCO_GL=egl or MUJOCO_GL=osmesa"
        ):
            total, length = record(policy, spec, float(target), seed, options.video, config.delayed)
        print(f"{options.video}: target {target}, return {total:.1f}, {length} steps")


if __name__ == "__main__":
    import lamo

    lamo.run_command(main, "eval.py")
