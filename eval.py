"""Rolls a return-conditioned policy out in Gymnasium environments and scores it.

    python eval.py runs/hopper-lamo-0.1-0                                  # evaluate a checkpoint again
    python eval.py runs/hopper-lamo-0.1-0 --targets 3600 --episodes 50
    python eval.py runs/hopper-lamo-0.1-0 --video hopper.gif               # and render one episode, without a screen
    python eval.py runs/* --plot runs.png                                  # learning curves and final scores, by method

Rollouts and scores need a policy and an environment, not the dataset or how the policy was trained.
"""

import argparse
import atexit
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from farama_notifications import notifications
from gymnasium.envs.registration import EnvSpec
from tqdm import tqdm

notifications.pop("gymnasium_robotics", None)  # a notice about other environments, printed with the kitchen
ALIVE = 20  # environments at a time, and rows in the policy's batch; an environment of the kitchen takes 90 MB


def join_processes():
    """Under torchrun, which starts a process for each GPU: become one of them. The first one speaks for all."""
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
        if dist.get_rank() > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def rank_and_world():
    """This process's number among torchrun's, from 0, and how many there are; else 0 and 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(tensor):
    """Replace a tensor by its sum over the processes of torchrun -> the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def vector(observation):
    """What the policy sees of an observation, or of a space: its entry `observation` if it is a dict, else all of it."""
    return observation["observation"] if isinstance(observation, (dict, gym.spaces.Dict)) else observation


class Environments:
    """Up to `alive` copies of an environment, made when first needed, stepped by as many threads as there are CPU cores.

    Threads run at the same time because MuJoCo releases Python's interpreter lock while it simulates.

    Raises:
        ValueError: observations or actions are not vectors of real numbers, or actions have no bounds.
    """

    def __init__(self, spec, alive=ALIVE, render_mode=None):
        self.spec, self.alive, self.render_mode = spec, min(alive, ALIVE), render_mode
        self.threads = ThreadPoolExecutor(os.cpu_count())
        self.envs = [self.make()]
        self.observation_space, self.action_space = vector(self.envs[0].observation_space), self.envs[0].action_space
        for space in (self.observation_space, self.action_space):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                raise ValueError(f"{spec.id} has {space}; LaMo needs vectors of real numbers (Box)")
        if not np.isfinite([self.action_space.low, self.action_space.high]).all():
            raise ValueError(f"{spec.id} has actions without bounds; wrap it in gymnasium.wrappers.RescaleAction")

    def make(self):
        follow = self.render_mode and str(self.spec.entry_point).startswith("gymnasium.envs.mujoco")
        camera = {"camera_name": "track"} if follow else {}  # Gymnasium 1.4 would let a robot run out of the picture
        return gym.make(self.spec, render_mode=self.render_mode, disable_env_checker=True, **camera)

    def grow(self, count):
        """Have `count` copies ready, at most `alive` -> how many."""
        count = min(count, self.alive)
        self.envs += [self.make() for _ in range(count - len(self.envs))]
        return count

    def reset(self, row, seed):
        """Start an episode -> (observation (S,), 0, False), as `step` returns."""
        return self._attempt(row, lambda env: (env.reset(seed=seed)[0], 0.0, False, False, {}))

    def step(self, row, action):
        """Take a step -> (observation (S,), reward, whether the episode has ended), or (None, NaN, True) if it fails."""
        return self._attempt(row, lambda env: env.step(action))

    def _attempt(self, row, function):
        try:
            observation, reward, terminated, truncated, _ = function(self.envs[row])
            if np.isnan(vector(observation)).any() or not np.isfinite(reward):
                raise ArithmeticError("an observation or a reward is not a number")
            return vector(observation), reward, terminated or truncated
        except Exception as error:  # third-party environments raise anything
            tqdm.write(f"an episode of {self.spec.id} failed: {error!r}")
            self.envs[row] = self.make()
            return None, np.nan, True


@torch.no_grad()
def rollout(policy, environments, targets, episodes, seed, delayed=False, frames=None, frame_every=1):
    """Run `episodes` episodes for each target, several at a time: where one ends, the next one starts.

    Args:
        policy: a torch module on the device to use, in evaluation mode. It has `context` (K, the steps it sees),
            `max_timesteps`, and `act(returns_to_go (B, K), states (B, K, S), actions (B, K, A), timesteps (B, K),
            lengths (B,)) -> (B, A)`, in the environment's units; see LaMo.act.
        environments: an Environments.
        targets: returns that the policy is conditioned on.
        seed: episode i starts from the environment's seed `seed + i`, whatever the target.
        delayed: rewards count at the end of an episode only, so that the return-to-go stays what was asked for.
        frames: a list that receives a picture (H, W, 3) of the first environment every `frame_every` steps.
    Returns:
        returns, lengths: arrays (targets, episodes). The return of an episode in which the simulator failed is NaN.
    """
    device = next(policy.parameters()).device
    asked = np.repeat(np.asarray(targets, np.float32), episodes)  # of each of the N episodes
    returns, lengths = np.zeros(len(asked)), np.zeros(len(asked), int)
    rank, world = rank_and_world()
    waiting = list(range(rank, len(asked), world))[::-1]  # torchrun's processes share the episodes
    B = environments.grow(len(waiting))
    K, S, A = policy.context, environments.observation_space.shape[0], environments.action_space.shape[0]
    low, high = environments.action_space.low, environments.action_space.high
    # A row for each environment: its episode, that episode's time step, and its last K steps, left-aligned.
    episode, t = np.full(B, -1), np.zeros(B, int)
    returns_to_go, timesteps = np.zeros((B, K), np.float32), np.zeros((B, K), np.int64)
    states, actions = np.zeros((B, K, S), np.float32), np.zeros((B, K, A), np.float32)

    with tqdm(total=len(waiting), desc="simulating", unit="episode", leave=False, disable=None) as progress:

        def end(row, total):
            returns[episode[row]], episode[row] = total, -1
            progress.update()

        while waiting or (episode >= 0).any():
            idle = np.flatnonzero(episode < 0)[: len(waiting)]
            for row in idle:
                episode[row], t[row] = waiting.pop(), 0
                for window in (returns_to_go, states, actions, timesteps):
                    window[row] = 0
            starts = environments.threads.map(environments.reset, idle, (seed + episode[idle] % episodes).tolist())
            for row, (observation, reward, ended) in zip(idle, starts):
                if ended:  # the simulator failed
                    end(row, reward)
                else:
                    states[row, 0], returns_to_go[row, 0] = observation, asked[episode[row]]
            running = np.flatnonzero(episode >= 0)
            newest = np.minimum(t, K - 1)  # column of the step that needs an action
            # Always ALIVE rows, repeated to fill them: rounding depends on how many there are, and the returns must not.
            rows = np.resize(running, ALIVE)
            history = returns_to_go[rows], states[rows], actions[rows], timesteps[rows], newest[rows] + 1
            action = policy.act(*(torch.as_tensor(part, device=device) for part in history))
            actions[rows, newest[rows]] = np.clip(action.cpu().numpy(), low, high)
            acts = actions[running, newest[running]].astype(low.dtype)
            steps = list(environments.threads.map(environments.step, running, acts))
            if frames is not None and t[0] % frame_every == 0:
                frames.append(environments.envs[0].render())

            for row, (observation, reward, ended) in zip(running, steps):
                i, column = episode[row], newest[row]
                returns[i] += reward
                lengths[i] += 1
                t[row] += 1
                if ended or t[row] == policy.max_timesteps:
                    end(row, returns[i])
                    continue
                following = returns_to_go[row, column] - (0 if delayed else reward)
                if column == K - 1:  # the oldest step makes room
                    for window in (returns_to_go, states, actions, timesteps):
                        window[row, :-1] = window[row, 1:]
                else:
                    column += 1
                states[row, column], returns_to_go[row, column] = observation, following
                timesteps[row, column] = t[row]
    for results in (returns, lengths):
        add_up(torch.from_numpy(results))
    return returns.reshape(len(targets), episodes), lengths.reshape(len(targets), episodes)


def evaluate(policy, environments, targets, episodes, seed, reference, delayed=False):
    """Roll out and summarise.

    Args:
        reference: (low, high) returns that score 0 and 100.
    Returns:
        {"3600": {"return_mean", "return_std", "return_interval", "score", "length_mean", "failed"}, ...} by target.
        Returns and scores are of the episodes that did not fail: std is the population's, the interval holds the mean
        with 95 % confidence (10,000 bootstrap samples). Lengths are in steps, and of all episodes.
    """
    was_training = policy.training
    policy.eval()
    returns, lengths = rollout(policy, environments, targets, episodes, seed, delayed)
    policy.train(was_training)
    low, high = reference
    scores = {}
    for i, target in enumerate(targets):
        good = np.isfinite(returns[i])
        sample = returns[i][good] if good.any() else returns[i]  # NaN, where all have failed
        resampled = np.random.default_rng(0).choice(sample, (10_000, len(sample))).mean(axis=1)
        scores[f"{target:.9g}"] = {
            "return_mean": float(sample.mean()),
            "return_std": float(sample.std()),
            "return_interval": np.percentile(resampled, (2.5, 97.5)).tolist(),
            "score": float(100 * (sample.mean() - low) / (high - low)),
            "length_mean": float(lengths[i].mean()),
            "failed": int((~good).sum()),
        }
    return scores


def best_target(scores):
    """The target with the highest mean return, and its row of `evaluate`."""
    return max(scores.items(), key=lambda item: np.nan_to_num(item[1]["return_mean"], nan=-np.inf))


def format_scores(scores, reference):
    """The table that is printed: a line for each target, the best one marked."""
    best, _ = best_target(scores)
    lines = [f"{'target':>8} {'return':>18} {'95 % interval':>19} {'score':>7} {'length':>7}"]
    for target, row in scores.items():
        spread = f"{row['return_mean']:.1f} ± {row['return_std']:.1f}"
        interval = "{:.1f} to {:.1f}".format(*row["return_interval"])
        marks = f"  {row['failed']} failed" * (row["failed"] > 0) + "  best" * (target == best)
        lines.append(f"{target:>8} {spread:>18} {interval:>19} {row['score']:7.1f} {row['length_mean']:7.1f}{marks}")
    return "\n".join([*lines, "score: 0 for a return of {:g}, 100 for {:g}".format(*reference)])


def record(policy, spec, target, seed, path, delayed=False):
    """Write a video of one episode, rendered without a screen, to a .gif or .mp4 -> (return, length in steps)."""
    import imageio.v2 as imageio

    environments = Environments(spec, alive=1, render_mode="rgb_array")
    fps = environments.envs[0].metadata.get("render_fps", 25)
    every = max(1, round(fps / 25))
    frames = []
    returns, lengths = rollout(policy, environments, [target], 1, seed, delayed, frames, every)
    imageio.mimsave(path, frames, fps=fps / every)
    return float(returns[0, 0]), int(lengths[0, 0])


def main(arguments):
    """Evaluate a checkpoint as the command line says."""
    import lamo

    parser = argparse.ArgumentParser("eval.py", argparse.SUPPRESS, __doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="folder", help="folder of a run of lamo.py; several with --plot")
    parser.add_argument("--targets", type=float, nargs="+", help="target returns (default: the run's)")
    parser.add_argument("--episodes", type=int, help="episodes per target (default: the run's)")
    parser.add_argument("--seed", type=int, help="seed of the first episode (default: that of the run's evaluation)")
    parser.add_argument("--device", default=lamo.Config.device, help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--video", metavar="FILE", help="render one episode of the best target into a .gif or .mp4")
    parser.add_argument("--plot", metavar="FILE", help="draw what the runs' logs say into a .png or .pdf, and stop")
    options = parser.parse_args(arguments)
    if options.plot:
        from results.plot import plot_runs

        with lamo.on_error(f"cannot draw {options.plot}; give folders of runs that have ended, and out.png or out.pdf"):
            return plot_runs(options.folders, options.plot)
    if len(options.folders) > 1:
        parser.error("evaluates one run at a time; to compare several, add --plot FILE")
    if options.video and Path(options.video).suffix not in (".gif", ".mp4"):
        parser.error(f"--video {options.video} is neither .gif nor .mp4; name the file out.gif or out.mp4")
    if options.episodes is not None and options.episodes < 1:
        parser.error(f"--episodes {options.episodes} must be at least 1")
    if options.seed is not None and options.seed < 0:
        parser.error(f"--seed {options.seed} must be at least 0")
    if options.video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen; read when the renderer is made

    policy, config, header = lamo.load(options.folders[0], options.device)
    print(config.demo or config.data)
    targets, episodes = options.targets or config.targets, options.episodes or config.episodes
    seed = config.seed * lamo.SEEDS if options.seed is None else options.seed
    with lamo.on_error("cannot make the environment"):
        environments = Environments(EnvSpec.from_json(header["env_spec"]))
    scores = evaluate(policy, environments, targets, episodes, seed, header["reference"], config.delayed)
    print(format_scores(scores, header["reference"]))
    if options.video:
        target = float(best_target(scores)[0])
        with lamo.on_error(f"cannot render {options.video}; try MUJOCO_GL=egl or MUJOCO_GL=osmesa, or another file"):
            total, length = record(policy, environments.spec, target, seed, options.video, config.delayed)
        print(f"{options.video}: target {target:g}, return {total:.1f}, {length} steps")


if __name__ == "__main__":
    import eval  # so that lamo.py and this script share one copy of this module
    from lamo import run_command

    run_command(eval.main)
