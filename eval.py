"""Rolls a return-conditioned policy out in Gymnasium, all targets and episodes at once, and scores it.

python eval.py runs/hopper-lamo-0.1-0                         # evaluate a checkpoint again
python eval.py runs/hopper-lamo-0.1-0 --targets 3600 --episodes 50
python eval.py runs/hopper-lamo-0.1-0 --video hopper.gif      # render one episode, without a screen
"""

import argparse
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from gymnasium.envs.registration import EnvSpec
from tqdm import tqdm

VIDEO_FPS = 25
KITCHEN = {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}  # as in D4RL: a subtask pays once


class InputError(ValueError):
    """Something the user can mend; the message is one line that says what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports what it does not understand as an InputError."""

    def error(self, message):
        raise InputError(f"{message}; --help lists the options")


@contextmanager
def explained(advice):
    """Turn whatever goes wrong inside into an InputError: the advice, and the first line of the cause."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the libraries around us raise many kinds
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{advice} ({cause})") from error


def pick_device(name):
    """torch.device of a --device; "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with explained(f"--device {name} cannot be used here; leave it out, or give cpu"):
        return torch.empty(0, device=name).device


class Reacher2d(ReacherEnv):
    """The paper's sparse task: Reacher-v5's two-link arm, reward 1 in each step that ends on the target.

    On the target: the fingertip is within a tenth of the arm's length (0.1 m and 0.11 m) of it. 100 steps.
    """

    ARM_LENGTH = 0.1 + 0.11  # metres, from Gymnasium's reacher.xml

    def _get_rew(self, action):
        distance = np.linalg.norm(self.get_body_com("fingertip") - self.get_body_com("target"))
        return float(distance < 0.1 * self.ARM_LENGTH), {"distance": distance}


if "lamo/Reacher2d-v0" not in gym.registry:  # `python eval.py` passes here twice
    gym.register("lamo/Reacher2d-v0", entry_point="eval:Reacher2d", max_episode_steps=100)


def environment(dataset, env_id=None):
    """Where a policy trained on a MinariDataset is evaluated: its EnvSpec and its action space.

    That is the dataset's own evaluation environment, unless `env_id` names another one.

    Raises:
        InputError: it cannot be made, its spaces are no vectors of real numbers, or the dataset's do not fit.
    """
    if dataset.env_spec is None and env_id is None:
        raise InputError(f"the dataset {dataset.id} does not say what environment it is of; name one with --env")
    with explained("cannot make the environment of the dataset; install what it needs, or name one with --env"):
        own = dataset.env_spec and (env_id is None or env_id.split(":")[-1] == dataset.env_spec.id)
        env_id = dataset.env_spec.id if own else env_id
        kwargs = KITCHEN if "FrankaKitchen" in env_id else {}
        env = dataset.recover_environment(eval_env=True, **kwargs) if own else gym.make(env_id, **kwargs)
    for kind in ("observation_space", "action_space"):
        recorded, space = observed(getattr(dataset, kind)), observed(getattr(env, kind))
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise InputError(f"{env.spec.id} has the {kind} {space}; LaMo needs flat vectors of real numbers (Box)")
        if kind == "action_space" and not np.isfinite([space.low, space.high]).all():
            raise InputError(f"{env.spec.id} has actions without bounds; wrap it in gymnasium.wrappers.RescaleAction")
        if recorded.shape != space.shape:
            raise InputError(
                f"the dataset {dataset.id} has an {kind} of shape {recorded.shape}, {env.spec.id} one of {space.shape}; "
                "choose the --env that it was recorded in"
            )
    env.close()
    return env.spec, env.action_space


def recorded_rewards(dataset, episode):
    """The rewards (T,) of a recorded episode: as they are, but for Kitchen's, which pay for each subtask in every step.

    There 1 for each subtask in the step that first completes it is what D4RL scores, and what KITCHEN makes the
    environment pay.
    """
    if not dataset.env_spec or dataset.env_spec.kwargs.get("remove_task_when_completed", True):
        return episode.rewards
    achieved, desired = (episode.observations[name] for name in ("achieved_goal", "desired_goal"))
    distances = [np.linalg.norm(achieved[task][1:] - desired[task][1:], axis=-1) for task in desired]
    completed = np.maximum.accumulate(np.array(distances) < 0.3, axis=1)  # (subtasks, T); gymnasium_robotics' threshold
    return np.diff(completed.sum(axis=0), prepend=0)


def references(dataset, d4rl=None):
    """Returns that score 0 and 100, and in words where they are from: the dataset, else D4RL, else none are known."""
    known = [dataset.storage.metadata.get(name) for name in ("ref_min_score", "ref_max_score")]
    if None not in known:
        return known, "0 to 100 between the dataset's own reference returns"
    if d4rl:
        return d4rl, "0 to 100 between D4RL's reference returns"
    return [0, 100], "the plain return, no reference returns are known"


def observed(observation):
    """What the policy sees of an observation, or of its space: the `observation` entry of a dict, or all of it."""
    if not isinstance(observation, (dict, gym.spaces.Dict)):
        return observation
    if "observation" not in observation.keys():
        raise InputError(
            f"the observations are {', '.join(observation.keys())}; LaMo reads a vector or the entry `observation`"
        )
    return observation["observation"]


def video_stride(metadata):
    """Steps of an environment from one frame of its video to the next."""
    return max(1, round(metadata.get("render_fps", VIDEO_FPS) / VIDEO_FPS))


@torch.no_grad()
def rollout(policy, spec, targets, episodes, seed, delayed=False, frames=None):
    """Run every episode of every target in lockstep, one environment each.

    Args:
        policy: has `context` (K, steps of history), `max_timesteps`, and
            `act(returns_to_go (N, k), states (N, k, S), actions (N, k, A), timesteps (N, k)) -> (N, A)`
            for k <= K, in the environment's units; a torch module on the device to use.
        spec: Gymnasium's EnvSpec, or the id of an environment.
        targets: returns to ask for.
        episodes: episodes per target; episode i starts from seed + i whatever the target.
        delayed: rewards are taken to come at the end, so that the return-to-go stays what was asked for.
        frames: a list that receives pictures (H, W, 3) of the first environment, about VIDEO_FPS per simulated second.
    Returns:
        returns, lengths: arrays (targets, episodes).
    """
    device = next(policy.parameters()).device
    render_mode = None if frames is None else "rgb_array"
    count = len(targets) * episodes
    envs = gym.vector.SyncVectorEnv(
        [lambda: gym.make(spec, render_mode=render_mode, disable_env_checker=True)] * count
    )  # fmt: skip
    observation, _ = envs.reset(seed=[seed + episode for _ in targets for episode in range(episodes)])
    observation = observed(observation)
    S, A, K, T = observation.shape[1], envs.single_action_space.shape[0], policy.context, policy.max_timesteps
    low, high = envs.single_action_space.low, envs.single_action_space.high
    stride = video_stride(envs.metadata)
    returns_to_go = torch.zeros(count, T + 1, device=device)
    returns_to_go[:, 0] = torch.tensor(targets, device=device).repeat_interleave(episodes)
    states = torch.zeros(count, T, S, device=device)
    actions = torch.zeros(count, T, A, device=device)
    timesteps = torch.arange(T, device=device).expand(count, T)
    returns, lengths, running = np.zeros(count), np.zeros(count, dtype=int), np.ones(count, dtype=bool)
    for t in tqdm(range(T), desc="simulating", leave=False, disable=None):
        states[:, t] = torch.as_tensor(observation, dtype=torch.float32, device=device)
        rows = torch.as_tensor(np.flatnonzero(running), device=device)
        window = slice(max(0, t + 1 - K), t + 1)
        action = np.zeros((count, A), dtype=envs.single_action_space.dtype)
        action[running] = policy.act(
            returns_to_go[rows, window], states[rows, window], actions[rows, window], timesteps[rows, window]
        ).cpu().numpy()  # fmt: skip
        action = np.clip(action, low, high)
        observation, reward, terminated, truncated, _ = envs.step(action)  # an ended one starts anew, unheeded
        observation = observed(observation)
        if frames is not None and t % stride == 0:
            frames.append(envs.render()[0])
        actions[:, t] = torch.as_tensor(action, device=device)
        paid = np.zeros(count) if delayed else reward
        returns_to_go[:, t + 1] = returns_to_go[:, t] - torch.as_tensor(paid, dtype=torch.float32, device=device)
        returns += reward * running
        lengths += running
        running &= ~(terminated | truncated)
        if not running.any():
            break
    envs.close()
    return returns.reshape(len(targets), episodes), lengths.reshape(len(targets), episodes)


def evaluate(policy, spec, targets, episodes, seed, reference, delayed=False):
    """Roll out and summarise.

    Args:
        reference: (low, high) returns that score 0 and 100, as `references` gives them.
    Returns:
        {"3600": {"return_mean", "return_std", "score", "length_mean"}, ...} by target; std is over
        episodes (population), lengths are in steps.
    """
    was_training = policy.training
    policy.eval()
    returns, lengths = rollout(policy, spec, targets, episodes, seed, delayed)
    policy.train(was_training)
    low, high = reference
    return {
        f"{target:g}": {
            "return_mean": float(returns[i].mean()),
            "return_std": float(returns[i].std()),
            "score": float(100 * (returns[i].mean() - low) / (high - low)),
            "length_mean": float(lengths[i].mean()),
        }
        for i, target in enumerate(targets)
    }


def best_target(scores):
    """The target with the highest mean return: (name, its row)."""
    return max(scores.items(), key=lambda item: item[1]["return_mean"])


def format_scores(scores):
    """The table that is printed: a line per target, the best one marked."""
    best, _ = best_target(scores)
    lines = [f"{'target':>8} {'return':>18} {'score':>8} {'length':>8}"]
    for target, row in scores.items():
        spread = f"{row['return_mean']:.1f} ± {row['return_std']:.1f}"
        mark = "  best" if target == best else ""
        lines.append(f"{target:>8} {spread:>18} {row['score']:8.1f} {row['length_mean']:8.1f}{mark}")
    return "\n".join(lines)


def record(policy, spec, target, seed, path, delayed=False):
    """Write a video of one episode, rendered without a screen -> (return, length in steps).

    Args:
        path: .gif or .mp4.
    Raises:
        InputError: the environment cannot be rendered here, or the file cannot be written.
    """
    import imageio.v2 as imageio

    frames = []
    with explained("cannot render here; install EGL or OSMesa and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"):
        returns, lengths = rollout(policy, spec, [target], 1, seed, delayed, frames)
    metadata = gym.make(spec).metadata
    with explained(f"cannot write --video {path}; name another file"):
        imageio.mimsave(path, frames, fps=metadata.get("render_fps", VIDEO_FPS) / video_stride(metadata))
    return float(returns[0, 0]), int(lengths[0, 0])


def run(arguments):
    """Evaluate a checkpoint as the command line says."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="folder of a run, as lamo.py wrote it")
    parser.add_argument("--targets", type=float, nargs="+", help="returns to ask for (default: the run's)")
    parser.add_argument("--episodes", type=int, help="episodes per target (default: the run's)")
    parser.add_argument("--seed", type=int, help="seed of the first episode (default: the run's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: cuda where there is one")
    parser.add_argument("--video", metavar="FILE", help="render one episode of the best target into a .gif or .mp4")
    options = parser.parse_args(arguments)
    if options.video and Path(options.video).suffix not in (".gif", ".mp4"):
        raise InputError(f"--video {options.video} is neither .gif nor .mp4; name the file out.gif or out.mp4")
    if options.episodes is not None and options.episodes < 1:
        raise InputError("--episodes must be greater than 0")
    if options.seed is not None and options.seed < 0:
        raise InputError("--seed must not be negative")
    if options.video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # no screen; read when the renderer is made
    import lamo

    policy, config, facts = lamo.load(options.folder, pick_device(options.device))
    spec = EnvSpec.from_json(facts["env_spec"])
    if facts["notice"]:
        print(facts["notice"])
    targets, episodes = options.targets or config.targets, options.episodes or config.episodes
    seed = config.seed if options.seed is None else options.seed
    scores = evaluate(policy, spec, targets, episodes, seed, facts["reference"], config.delayed)
    print(f"{format_scores(scores)}\nscore: {facts['reference_source']}")
    if options.video:
        target = float(best_target(scores)[0])
        total, length = record(policy, spec, target, seed, options.video, config.delayed)
        print(f"{options.video}: target {target:g}, return {total:.1f}, {length} steps")


def command_line(run, script):
    """Call run(arguments) -> exit code: 0, or 2 after one line that says what is wrong and what to do."""
    try:
        run(sys.argv[1:])
    except InputError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # As module `eval`, not `__main__`: lamo.py imports the same classes from there.
    import eval

    sys.exit(eval.command_line(eval.run, "eval.py"))
