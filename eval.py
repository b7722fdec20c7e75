"""Rolls a return-conditioned policy out in Gymnasium environments and scores it.

    python eval.py runs/hopper-lamo-0.1-0                                  # evaluate a checkpoint again
    python eval.py runs/hopper-lamo-0.1-0 --targets 3600 --episodes 50
    python eval.py runs/hopper-lamo-0.1-0 --video hopper.gif               # and render one episode, without a screen

This file knows a policy and the spec of an environment, nothing else: neither datasets nor how the policy was trained.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv
from gymnasium.envs.registration import EnvSpec
from tqdm import tqdm

ALIVE = 20  # environments at a time: those of the kitchen take 90 MB each
ROWS = 20  # histories for which the policy computes actions at a time


class Reacher2d(MujocoEnv):
    """The paper's sparse task, as in the authors' code: bring the fingertip of a two-link arm to a goal, and stay there.

    Observation (12,): sin and cos of both angles, 0.15 * angular velocities, x and y of the fingertip, of the goal, and
    of the fingertip minus the goal. Action (2,): torques in [-1, 1]. Reward 1 in each step that ends with
    |dx| + |dy| < 0.1 m between fingertip and goal, else 0. An episode has 100 steps of 0.15 s.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"], "render_fps": 7}

    def __init__(self, **kwargs):
        model = Path(__file__).resolve().parent / "demo" / "reacher2d.xml"
        space = gym.spaces.Box(-np.inf, np.inf, (12,), np.float64)
        super().__init__(str(model), frame_skip=15, observation_space=space, camera_name="top", **kwargs)

    def step(self, action):
        self.do_simulation(np.clip(action, -1, 1), self.frame_skip)
        observation = self._observation()
        if self.render_mode == "human":
            self.render()
        return observation, float(np.abs(observation[-2:]).sum() < 0.1), False, False, {}

    def reset_model(self):
        angles = self.np_random.uniform(-2, 2, size=2)
        goal = np.zeros(2)
        while not 0.5 <= np.linalg.norm(goal) <= 1:
            goal = self.np_random.uniform(-1.5, 1.5, size=2)
        self.model.body("goal").pos[:2] = goal
        self.set_state(angles, np.zeros(2))
        return self._observation()

    def _observation(self):
        angles, tip, goal = self.data.qpos, self.data.site("fingertip").xpos[:2], self.data.body("goal").xpos[:2]
        return np.concatenate([np.sin(angles), np.cos(angles), self.dt * self.data.qvel, tip, goal, tip - goal])


if "lamo/Reacher2d-v0" not in gym.registry:  # `python eval.py` runs this file twice: as a script, and for lamo.py
    gym.register("lamo/Reacher2d-v0", entry_point="eval:Reacher2d", max_episode_steps=100)


def vector(observation):
    """What the policy sees of an observation, or of a space: its entry `observation` if it is a dict, else all of it."""
    return observation["observation"] if isinstance(observation, (dict, gym.spaces.Dict)) else observation


class Environments:
    """Copies of an environment, made when first needed, stepped by as many threads as there are CPU cores.

    Threads run at the same time because MuJoCo releases Python's interpreter lock while it simulates.

    Raises:
        ValueError: observations or actions are no vectors of real numbers, or actions have no bounds.
    """

    def __init__(self, spec, alive=ALIVE, render_mode=None):
        self.spec, self.alive, self.render_mode = spec, alive, render_mode
        self.envs = []
        self.threads = ThreadPoolExecutor(os.cpu_count())
        self.make(1)
        self.observation_space, self.action_space = vector(self.envs[0].observation_space), self.envs[0].action_space
        for space in (self.observation_space, self.action_space):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                raise ValueError(f"{spec.id} has {space}; LaMo needs vectors of real numbers (Box)")
        if not np.isfinite([self.action_space.low, self.action_space.high]).all():
            raise ValueError(f"{spec.id} has actions without bounds; wrap it in gymnasium.wrappers.RescaleAction")

    def make(self, count):
        """Up to `count` environments, at most `alive`."""
        while len(self.envs) < min(count, self.alive):
            self.envs.append(gym.make(self.spec, render_mode=self.render_mode, disable_env_checker=True))
        return self.envs[:count]

    def each(self, function, rows, arguments):
        """[function(environment of the row, argument), ...], computed by all threads."""
        return list(self.threads.map(lambda row, argument: function(self.envs[row], argument), rows, arguments))


@torch.no_grad()
def rollout(policy, environments, targets, episodes, seed, delayed=False, frames=None, frame_every=1):
    """Run `episodes` episodes for each target, several at a time: where one ends, the next one starts.

    Args:
        policy: a torch module on the device to use, in evaluation mode. It has `context` (K, the steps it sees),
            `max_timesteps`, and `act(returns_to_go (B, K), states (B, K, S), actions (B, K, A), timesteps (B, K),
            lengths (B,)) -> (B, A)`, in the environment's units; see LaMo.act.
        environments: an Environments.
        targets: returns to ask for.
        seed: episode i starts from the environment's seed `seed + i`, whatever the target.
        delayed: rewards count at the end of an episode only, so that the return-to-go stays what was asked for.
        frames: a list that receives a picture (H, W, 3) of the first environment every `frame_every` steps.
    Returns:
        returns, lengths: arrays (targets, episodes).
    """
    device = next(policy.parameters()).device
    asked = np.repeat(np.asarray(targets, np.float32), episodes)  # of each of the N episodes
    seeds = [seed + episode for _ in targets for episode in range(episodes)]
    returns, lengths = np.zeros(len(asked)), np.zeros(len(asked), int)
    waiting = list(range(len(asked)))[::-1]

    envs = environments.make(len(asked))
    S, actions_of = environments.observation_space.shape[0], environments.action_space
    A, low, high = actions_of.shape[0], actions_of.low, actions_of.high
    # A row for each environment: its episode, that episode's time step, and the last K steps, moved to the left. The
    # policy always computes ROWS rows, because rounding depends on how many there are: the returns must not.
    K, B = policy.context, -(-len(envs) // ROWS) * ROWS
    episode, t = np.full(B, -1), np.zeros(B, int)
    returns_to_go, timesteps = np.zeros((B, K), np.float32), np.zeros((B, K), np.int64)
    states, actions = np.zeros((B, K, S), np.float32), np.zeros((B, K, A), np.float32)

    idle = np.arange(len(envs))
    with tqdm(total=len(asked), desc="simulating", unit="episode", leave=False, disable=None) as progress:
        while True:
            starting = idle[: len(waiting)]
            for row in starting:
                episode[row], t[row] = waiting.pop(), 0
                for window in (returns_to_go, states, actions, timesteps):
                    window[row] = 0
            resets = environments.each(
                lambda env, seed: env.reset(seed=seed), starting, [seeds[i] for i in episode[starting]]
            )
            for row, (observation, _) in zip(starting, resets):
                states[row, 0], returns_to_go[row, 0] = vector(observation), asked[episode[row]]
            running = np.flatnonzero(episode >= 0)
            if len(running) == 0:
                return returns.reshape(len(targets), episodes), lengths.reshape(len(targets), episodes)

            newest = np.minimum(t, K - 1)  # column of the step that needs an action
            for start in range(0, B, ROWS):
                rows = slice(start, start + ROWS)
                if (episode[rows] >= 0).any():
                    history = returns_to_go[rows], states[rows], actions[rows], timesteps[rows], newest[rows] + 1
                    action = policy.act(*(torch.as_tensor(part, device=device) for part in history))
                    actions[np.arange(B)[rows], newest[rows]] = np.clip(action.cpu().numpy(), low, high)
            acts = actions[running, newest[running]].astype(low.dtype)
            steps = environments.each(lambda env, action: env.step(action), running, acts)
            if frames is not None and t[0] % frame_every == 0:
                frames.append(envs[0].render())

            idle = []
            for row, (observation, reward, terminated, truncated, _) in zip(running, steps):
                i, column = episode[row], newest[row]
                returns[i] += reward
                lengths[i] += 1
                t[row] += 1
                if terminated or truncated or t[row] == policy.max_timesteps:
                    episode[row] = -1
                    idle.append(row)
                    progress.update()
                    continue
                following = returns_to_go[row, column] - (0 if delayed else reward)
                if column == K - 1:  # the oldest step makes room
                    for window in (returns_to_go, states, actions, timesteps):
                        window[row, :-1] = window[row, 1:]
                else:
                    column += 1
                states[row, column], returns_to_go[row, column] = vector(observation), following
                timesteps[row, column] = t[row]
            idle = np.array(idle, int)


def evaluate(policy, environments, targets, episodes, seed, reference, delayed=False):
    """Roll out and summarise.

    Args:
        reference: (low, high) returns that score 0 and 100.
    Returns:
        {"3600": {"return_mean", "return_std", "score", "length_mean"}, ...} by target; std is over episodes
        (population), lengths are in steps.
    """
    was_training = policy.training
    policy.eval()
    returns, lengths = rollout(policy, environments, targets, episodes, seed, delayed)
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
    """The target with the highest mean return, and its row of `evaluate`."""
    return max(scores.items(), key=lambda item: item[1]["return_mean"])


def format_scores(scores):
    """The table that is printed: a line for each target, the best one marked."""
    best, _ = best_target(scores)
    lines = [f"{'target':>8} {'return':>18} {'score':>8} {'length':>8}"]
    for target, row in scores.items():
        spread = f"{row['return_mean']:.1f} ± {row['return_std']:.1f}"
        mark = "  best" if target == best else ""
        lines.append(f"{target:>8} {spread:>18} {row['score']:8.1f} {row['length_mean']:8.1f}{mark}")
    return "\n".join(lines)


def record(policy, spec, target, seed, path, delayed=False):
    """Write a video of one episode, rendered without a screen, to a .gif or .mp4 -> (return, length in steps)."""
    import imageio.v2 as imageio

    environments = Environments(spec, alive=1, render_mode="rgb_array")
    fps = environments.make(1)[0].metadata.get("render_fps", 25)
    every = max(1, round(fps / 25))
    frames = []
    returns, lengths = rollout(policy, environments, [target], 1, seed, delayed, frames, every)
    imageio.mimsave(path, frames, fps=fps / every)
    return float(returns[0, 0]), int(lengths[0, 0])


def main(arguments):
    """Evaluate a checkpoint as the command line says."""
    import lamo

    parser = argparse.ArgumentParser("eval.py", argparse.SUPPRESS, __doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", help="folder of a run of lamo.py")
    parser.add_argument("--targets", type=float, nargs="+", help="returns to ask for (default: the run's)")
    parser.add_argument("--episodes", type=int, help="episodes per target (default: the run's)")
    parser.add_argument("--seed", type=int, help="seed of the first episode (default: the run's)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--video", metavar="FILE", help="render one episode of the best target into a .gif or .mp4")
    options = parser.parse_args(arguments)
    if options.video and Path(options.video).suffix not in (".gif", ".mp4"):
        parser.error(f"--video {options.video} is neither .gif nor .mp4; name the file out.gif or out.mp4")
    if options.episodes is not None and options.episodes < 1:
        parser.error(f"--episodes {options.episodes} must be at least 1")
    if options.seed is not None and options.seed < 0:
        parser.error(f"--seed {options.seed} must be at least 0")
    if options.video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen; read when the renderer is made

    policy, config, header = lamo.load(options.folder, options.device)
    if header["notice"]:
        print(header["notice"])
    spec = EnvSpec.from_json(header["env_spec"])
    targets, episodes = options.targets or config.targets, options.episodes or config.episodes
    seed = config.seed if options.seed is None else options.seed
    scores = evaluate(policy, Environments(spec), targets, episodes, seed, header["reference"], config.delayed)
    print(f"{format_scores(scores)}\nscore: 0 to 100 between {header['reference_source']}")
    if options.video:
        target = float(best_target(scores)[0])
        with lamo.on_error(f"cannot render {options.video}; try MUJOCO_GL=egl or MUJOCO_GL=osmesa, or another file"):
            total, length = record(policy, spec, target, seed, options.video, config.delayed)
        print(f"{options.video}: target {target:g}, return {total:.1f}, {length} steps")


if __name__ == "__main__":
    import eval  # the module that lamo.py imports, not this script a second time
    from lamo import run_command

    run_command(eval.main)
