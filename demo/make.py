"""Makes everything in demo/ from nothing: Minari datasets of simulated rollouts, a small GPT-2, and a text.

    python demo/make.py                               # all of it; about two hours on two CPU cores
    python demo/make.py --only hopper --steps 20000   # one dataset, small, in minutes
    python demo/make.py --only gpt2-tiny              # the language model

Locomotion policies are trained by PPO (Schulman et al. 2017, arXiv 1707.06347). The best of its snapshots collects
half of the steps and all of them share the other half, with some of their exploration noise, so that returns vary as
they do in D4RL's medium-expert sets. reacher2d, pointmaze, cartpole and catch have a controller
each, whose skill differs from episode to episode; the arm in the kitchen is driven by a script that
does the subtasks of D4RL's sets one after the other.
The language model is pre-trained on the documentation and docstrings of the Python installation that runs this.

The language model's work in progress is kept in build/ beside it, and a later call goes on from there. The locomotion data and
the language model in this folder were made by an earlier version of this script, with a PPO and a training loop of its
own: git show fa84229:demo/make.py.
"""

import argparse
import ast
import io
import math
import os
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import gymnasium as gym
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from demo.catch import PADDLE, SIZE  # noqa: E402
from demo.kitchen import Cook  # noqa: E402


@dataclass(frozen=True)
class Task:
    """A dataset to make."""

    env_id: str
    dataset_steps: int  # environment steps in the dataset
    reference: tuple[float, float]  # returns that score 0 and 100: D4RL's, else the least and most
    ppo_steps: int = 0  # environment steps that PPO may use; 0: the scripted controller
    noise: float = 1.0  # exploration noise of an episode, at most, in units of PPO's
    subtasks: tuple[str, ...] = ()  # of the kitchen, as in D4RL's set of this name
    attempts: tuple[int, int] = (4, 4)  # how many of them an episode attempts, at least and at most
    requires: str = "gymnasium[mujoco]"  # the package that has the environment


kitchen = partial(
    Task,
    "gymnasium_robotics:FrankaKitchen-v1",
    reference=(0.0, 4.0),
    requires="gymnasium-robotics",
)
TASKS = {
    "hopper": Task("Hopper-v5", 100_000, (-20.272305, 3234.3), ppo_steps=1_000_000),
    "halfcheetah": Task(
        "HalfCheetah-v5", 50_000, (-280.178953, 12135.0), ppo_steps=1_000_000, noise=1.5
    ),
    "walker2d": Task("Walker2d-v5", 50_000, (1.629008, 4592.3), ppo_steps=1_000_000, noise=1.5),
    "reacher2d": Task("demo.reacher2d:lamo/Reacher2d-v0", 10_000, (0.0, 100.0)),
    "kitchen-complete": kitchen(
        3_000, subtasks=("microwave", "kettle", "light switch", "slide cabinet")
    ),
    "kitchen-partial": kitchen(
        10_000, subtasks=("microwave", "kettle", "light switch", "slide cabinet"), attempts=(2, 4)
    ),
    "kitchen-mixed": kitchen(
        10_000, subtasks=("microwave", "kettle", "bottom burner", "light switch"), attempts=(2, 3)
    ),
    "pointmaze": Task(
        "gymnasium_robotics:PointMaze_UMaze-v3", 40_000, (0.0, 300.0), requires="gymnasium-robotics"
    ),
    "cartpole": Task("CartPole-v1", 25_000, (0.0, 500.0), requires="gymnasium"),
    "catch": Task("demo.catch:lamo/Catch-v0", 20_000, (0.0, 10.0), requires="gymnasium"),
}

# -------------------------------------------------------------------------------- policies

SNAPSHOTS = 50  # over the whole training


class Snapshot:
    """A snapshot of PPO with a share of its exploration noise, drawn anew for each episode from [0, most]."""

    def __init__(self, policy, moments, most, rng):
        self.policy, self.mean, self.std = policy, moments.mean.copy(), np.sqrt(moments.var + 1e-8)
        self.most, self.rng = most, rng

    def reset(self):
        self.noise = self.rng.uniform(0, self.most)

    @torch.no_grad()
    def act(self, observation):
        normalised = torch.as_tensor(
            (observation - self.mean) / self.std, dtype=torch.float32
        ).clamp(-10, 10)
        distribution = self.policy.get_distribution(normalised[None]).distribution
        mean, std = distribution.mean[0].numpy(), distribution.stddev[0].numpy()
        return mean + self.noise * std * self.rng.standard_normal(len(mean))


def train_ppo(name, task, steps, seed, rng):
    """PPO of stable-baselines3 on normalised observations and rewards -> its Snapshots."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    snapshots = []

    class Keep(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            if self.num_timesteps * SNAPSHOTS >= (len(snapshots) + 1) * steps:
                memory = io.BytesIO()
                self.model.policy.save(memory)
                memory.seek(0)
                copy = type(self.model.policy).load(memory, device="cpu")
                snapshots.append(Snapshot(copy, self.training_env.obs_rms, task.noise, rng))
                returns = [episode["r"] for episode in self.model.ep_info_buffer]
                print(
                    f"{name}: PPO step {self.num_timesteps:9,d}, return {np.mean(returns):7.1f}",
                    flush=True,
                )

        _on_training_end = _on_rollout_start

    torch.set_num_threads(1)  # the networks are too small for more
    envs = VecNormalize(make_vec_env(task.env_id, 8, seed))
    schedule = lambda left: 3e-4 * left  # falls to 0
    size = {
        "n_steps": 256,
        "batch_size": 256,
        "n_epochs": 10,
        "policy_kwargs": {"log_std_init": -0.5},
    }
    PPO("MlpPolicy", envs, schedule, **size, seed=seed, device="cpu").learn(steps, Keep())
    return snapshots


class Reacher:
    """Drives the arm of reacher2d by Jacobian-transpose control, with a strength that varies between episodes."""

    def __init__(self, env, rng):
        self.rng = rng

    def reset(self):
        self.strength = 10 ** self.rng.uniform(0, 1.5)  # newtons per metre
        self.damping = self.rng.uniform(0, 1.5)  # newton metres per radian per second
        self.noise = self.rng.uniform(0, 0.5)

    def act(self, observation):
        sin, cos, velocity = observation[0], observation[2], observation[4:6] / 0.15
        tip, error = observation[6:8], observation[10:12]
        angle = math.atan2(sin, cos) + 0.785  # of the upper arm, 0.6 m long
        forearm = tip - 0.6 * np.array([math.cos(angle), math.sin(angle)])
        jacobian = np.array([[-tip[1], -forearm[1]], [tip[0], forearm[0]]])
        torque = -self.strength * jacobian.T @ error - self.damping * velocity
        return torque + self.noise * self.rng.standard_normal(2)


class Runner:
    """Runs to the goal of a maze, along the cells of a shortest path, by PD control.

    The less its skill, drawn for each episode, the smaller its gain, the larger its noise, and the
    more often it heads for a wrong cell. Even the best is noisy: how it comes back to its path is
    what a policy learns from it.
    """

    DAMPING = 0.8  # of the greatest force, per metre per second

    def __init__(self, env, rng):
        self.maze, self.rng = env.unwrapped.maze, rng
        self.cells = [tuple(cell) for cell in np.argwhere(np.array(self.maze.maze_map) != 1)]

    def reset(self):
        self.skill = self.rng.uniform() ** 0.5  # more often high than low
        self.wrong = None  # the cell that it heads for by mistake

    def act(self, observation):
        position, velocity = np.split(observation["observation"], 2)
        here, goal = self.cell_of(position), observation["desired_goal"]
        if self.wrong == here:
            self.wrong = None
        elif self.wrong is None and self.rng.random() < 0.012 * (1 - self.skill):
            self.wrong = self.cells[self.rng.integers(len(self.cells))]
        end = self.wrong or self.cell_of(goal)
        aim = goal if here == end else self.maze.cell_rowcol_to_xy(self.next_cell(here, end))
        gain = 0.3 * 30**self.skill  # of the greatest force, per metre
        force = np.clip(gain * (aim - position) - self.DAMPING * velocity, -1, 1)
        return force + (1 - 0.7 * self.skill) * self.rng.standard_normal(2)

    def cell_of(self, position):
        return tuple(self.maze.cell_xy_to_rowcol(position))

    def next_cell(self, start, end):
        """Return the cell after `start` on a shortest path to `end`, by a search from the end."""
        towards_end = {end: end}
        for row, column in (queue := [end]):
            for down, right in (0, 1), (0, -1), (1, 0), (-1, 0):
                cell = row + down, column + right
                if cell in self.cells and cell not in towards_end:
                    towards_end[cell] = (row, column)
                    queue.append(cell)
        return towards_end[start]


class Balancer:
    """Balances the pole of CartPole by linear control.

    The less its skill, drawn for each episode, the further it leans the pole to one side, the less
    it minds the cart, and the more often it does the opposite of what it should.
    """

    def __init__(self, env, rng):
        self.rng = rng

    def reset(self):
        self.skill = self.rng.uniform()
        self.lean = self.rng.choice([-1, 1]) * 0.2 * (1 - self.skill)  # radians

    def act(self, observation):
        position, velocity, angle, turning = observation
        cart = self.skill * (0.1 * position + 0.3 * velocity)
        to_the_right = cart + 3 * (angle - self.lean) + turning > 0
        is_wrong = self.rng.random() < 0.3 * (1 - self.skill)
        return int(to_the_right != is_wrong)


class Catcher:
    """Plays Catch, with a skill that is drawn for each episode: the share of bounces it foresees.

    Where it does not, it goes to the wall. The less its skill, the more of its moves are random.
    It reads where the ball is from the game, not from the picture.
    """

    def __init__(self, env, rng):
        self.game, self.rng = env.unwrapped, rng

    def reset(self):
        self.skill = self.rng.uniform()

    def act(self, observation):
        game, last = self.game, SIZE - 1
        if game.row == 1:  # a new ball
            self.landing = game.column + game.speed * (last - 1)
            if self.rng.random() < self.skill:
                self.landing = last - abs(last - self.landing % (2 * last))
        if self.rng.random() < 0.2 * (1 - self.skill):
            return int(self.rng.integers(3))
        left, right = self.landing < game.paddle, self.landing >= game.paddle + PADDLE
        return 1 - left + right


SCRIPTED = {  # policies of varying skill, and what they are in words
    "reacher2d": (Reacher, "Jacobian-transpose control of varying strength"),
    "pointmaze": (Runner, "PD control along shortest paths, of varying skill"),
    "cartpole": (Balancer, "linear control of varying skill"),
    "catch": (Catcher, "anticipation of varying skill"),
}

# -------------------------------------------------------------------------------- datasets


def kept(task, value):
    """Return what a dataset has of an observation or a space: all, but of the kitchen no goals."""
    return value["observation"] if task.subtasks else value


def stored(space):
    """Return a space of observations as datasets have it: float32 instead of float64."""
    if isinstance(space, gym.spaces.Dict):
        return gym.spaces.Dict({name: stored(part) for name, part in space.items()})
    if space.dtype == np.float64:
        return gym.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32))
    return space


def stack(observations, space):
    """Return a list of observations as an array of the space's type, or a dict of arrays."""
    if isinstance(space, gym.spaces.Dict):
        return {
            name: stack([observation[name] for observation in observations], part)
            for name, part in space.items()
        }
    return np.array(observations, space.dtype)


def collect(env, task, policies, shares, steps, seed):
    """Episodes until there are `steps` steps -> Minari EpisodeBuffers, float32 where real numbers.

    The next one is always by the policy that is furthest behind its share of the steps.
    """
    from minari.data_collector import EpisodeBuffer

    space = stored(kept(task, env.observation_space))
    episodes, taken = [], np.zeros(len(policies))
    while taken.sum() < steps:
        turn = np.argmin(taken / shares)
        policy = policies[turn]
        observation, _ = env.reset(seed=seed + len(episodes))
        policy.reset()
        episode = {"observations": [kept(task, observation)], "actions": [], "rewards": []}
        terminated = truncated = False
        while not (terminated or truncated):
            action = policy.act(observation)
            if action is None:  # nothing is left to do
                truncated = True
                break
            if isinstance(env.action_space, gym.spaces.Box):
                action = np.clip(action, env.action_space.low, env.action_space.high)
                action = action.astype(np.float32)
            observation, reward, terminated, truncated, _ = env.step(action)
            for part, value in zip(episode.values(), (kept(task, observation), action, reward)):
                part.append(value)
        ends = np.arange(1, len(episode["rewards"]) + 1) == len(episode["rewards"])
        episode = {
            "observations": stack(episode["observations"], space),
            "actions": np.array(episode["actions"]),
            "rewards": np.array(episode["rewards"], np.float32),
            "terminations": ends & terminated,
            "truncations": ends & truncated,
        }
        episodes.append(EpisodeBuffer(id=len(episodes), seed=seed + len(episodes), **episode))
        taken[turn] += len(ends)
    return episodes


def make_dataset(name, folder, steps, seed):
    """Train, collect, and write the Minari dataset lamo/<name>/demo-v0 below `folder`, compressed."""
    start = time.time()
    task = TASKS[name]
    steps = steps or task.dataset_steps
    rng = np.random.default_rng(seed)
    kwargs = {"tasks_to_complete": list(task.subtasks)} if task.subtasks else {}
    with gym.make(task.env_id, **kwargs) as env:
        if task.ppo_steps:
            ppo_steps = min(
                task.ppo_steps, 20 * steps
            )  # a small dataset comes from a short training
            policies = train_ppo(name, task, ppo_steps, seed, rng)
            tries = [
                collect(env, task, [policy], np.ones(1), steps // 10, seed) for policy in policies
            ]
            best = np.argmax(
                [np.mean([episode.rewards.sum() for episode in tried]) for tried in tries]
            )
            shares = np.full(len(policies), 0.5 / len(policies))
            shares[best] += 0.5
            algorithm = f"PPO, {len(policies)} snapshots of one training of {ppo_steps} steps"
        elif task.subtasks:
            policies, shares = [Cook(env, task.subtasks, task.attempts, rng)], np.ones(1)
            algorithm = "resolved-rate control along way points"
        else:
            policy, algorithm = SCRIPTED[name]
            policies, shares = [policy(env, rng)], np.ones(1)
        episodes = collect(env, task, policies, shares, steps, seed)
        write_dataset(name, folder, env, episodes, algorithm)
    returns = np.array([episode.rewards.sum() for episode in episodes])
    print(
        f"{name}: {len(episodes)} episodes, {sum(map(len, episodes))} steps, returns {returns.min():.1f} to "
        f"{returns.max():.1f}, mean {returns.mean():.1f}, {time.time() - start:.0f} s",
        flush=True,
    )


def write_dataset(name, folder, env, episodes, algorithm):
    """Write a Minari dataset, then its HDF5 file once more with compression, which Minari has no option for."""
    import h5py
    import minari

    task, dataset_id = TASKS[name], f"lamo/{name}/demo-v0"
    shutil.rmtree(folder / dataset_id, ignore_errors=True)
    os.environ["MINARI_DATASETS_PATH"] = str(folder.resolve())  # Minari needs a full path
    minari.create_dataset_from_buffers(
        dataset_id,
        episodes,
        env=env,
        observation_space=stored(kept(task, env.observation_space)),
        algorithm_name=algorithm,
        author="LaMo contributors",
        author_email="none",
        code_permalink=f"demo/make.py --only {name}",
        ref_min_score=task.reference[0],
        ref_max_score=task.reference[1],
        description=f"Rollouts of mixed quality in {env.spec.id}, for the demo of LaMo. Not a D4RL dataset.",
        requirements=[task.requires],
    )
    path = folder / dataset_id / "data" / "main_data.hdf5"
    packed = path.with_suffix(".packed")
    with (
        h5py.File(path) as source,
        h5py.File(packed, "w", libver=("v110", "v110"), track_order=True) as target,
    ):

        def copy(key, item):
            if isinstance(item, h5py.Group):
                made = target.require_group(key)
            else:
                made = target.create_dataset(
                    key, data=item[()], compression="gzip", compression_opts=9, shuffle=True
                )
            made.attrs.update(item.attrs)

        source.visititems(copy)
    os.replace(packed, path)


# -------------------------------------------------------------------------------- language model

LANGUAGE_MODELS = {  # shapes; only the first one belongs to the demo
    "gpt2-tiny": {"n_embd": 128, "n_layer": 3, "n_head": 4},
    "gpt2-mini": {"n_embd": 256, "n_layer": 3, "n_head": 4},
}
VOCABULARY, POSITIONS = 4096, 256


def documents(places=("stdlib", "purelib", "platlib")):
    """English text of this Python installation: docstrings, and documentation files, without duplicates.

    The places are names of sysconfig's paths.

    pydoc_data.topics is left out: it becomes text.txt, which lamo.py's demo trains and measures its language loss on.
    """
    roots = sorted({sysconfig.get_path(name) for name in places})
    seen = set()
    for root in roots:
        for path in sorted(Path(root).rglob("*")):
            if "pydoc_data" in path.parts or "test" in path.parts or "tests" in path.parts:
                continue
            try:
                if path.suffix == ".py":
                    tree = ast.parse(path.read_text("utf-8"))
                    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                    found = [
                        ast.get_docstring(node)
                        for node in ast.walk(tree)
                        if isinstance(node, nodes)
                    ]
                elif path.suffix in (".rst", ".md", ".txt") or path.name == "METADATA":
                    found = [path.read_text("utf-8")]
                else:
                    continue
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue  # unreadable, or Python of another version
            for text in found:
                # Lists of files and tables of numbers are not English: most characters must be letters or spaces.
                words = (
                    text
                    and len(text) > 60
                    and sum(c.isalpha() or c.isspace() for c in text) > 0.75 * len(text)
                )
                if words and text not in seen:
                    seen.add(text)
                    yield text.strip() + "\n"


def make_corpus(folder):
    """Train a byte-level BPE tokenizer and tokenise the documents -> tokenizer, and tokens: every 50th document, the others."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    if not (folder / "train.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = list(documents())
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            texts, VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False
        )
        bpe.save_model(str(folder))
        ids = [
            np.array(encoding.ids + [0], np.uint16) for encoding in bpe.encode_batch(texts)
        ]  # 0: end of text
        np.save(folder / "held_out.npy", np.concatenate(ids[::50]))
        np.save(
            folder / "train.npy", np.concatenate([tokens for k, tokens in enumerate(ids) if k % 50])
        )
    tokenizer = GPT2TokenizerFast.from_pretrained(folder, model_max_length=POSITIONS)
    return tokenizer, np.load(folder / "held_out.npy"), np.load(folder / "train.npy")


def make_language_model(name, target, build, steps, seed):
    """Pre-train a small GPT-2 with transformers, or go on with that, and save it as an ordinary Hugging Face folder."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    tokenizer, *corpus = make_corpus(build / "corpus")
    held_out, train = (
        tokens[: len(tokens) // POSITIONS * POSITIONS].astype(np.int64) for tokens in corpus
    )
    counts = np.bincount(train, minlength=VOCABULARY) + 1
    unigram = -np.log(counts / counts.sum())[
        held_out
    ].mean()  # cross-entropy of a unigram model, add-one smoothed
    print(
        f"{name}: {len(train):,} tokens to train on, {len(held_out):,} held out, unigram {unigram:.3f} nats",
        flush=True,
    )
    set_seed(seed)
    no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = LANGUAGE_MODELS[name] | {"vocab_size": VOCABULARY, "n_positions": POSITIONS}
    work = build / f"{name}-{steps}-{seed}"
    arguments = TrainingArguments(
        work, max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-3, warmup_steps=200, weight_decay=0.1,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.05}, adam_beta2=0.95,
        bf16=torch.cuda.is_available(), eval_strategy="steps", eval_steps=500, logging_steps=100, save_steps=100,
        save_total_limit=1, seed=seed, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    blocks = [
        [
            {"input_ids": block, "labels": block}
            for block in torch.from_numpy(tokens).view(-1, POSITIONS)
        ]
        for tokens in (train, held_out)
    ]
    model = GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, **ends))
    trainer = Trainer(model, arguments, train_dataset=blocks[0], eval_dataset=blocks[1])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if work.exists() else None)
    print(
        f"{name}: {steps} steps, held out {trainer.evaluate()['eval_loss']:.3f} nats per token",
        flush=True,
    )
    model.half().cpu().save_pretrained(target)
    tokenizer.save_pretrained(target)


# -------------------------------------------------------------------------------- picture


def draw_returns(folder):
    """Histograms of the datasets' returns -> returns.png. Needs matplotlib."""
    import matplotlib
    import minari

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 5, figsize=(11, 4.8), layout="constrained")
    for name, ax in zip(TASKS, axes.flat):
        dataset = minari.MinariDataset(folder / "lamo" / name / "demo-v0" / "data")
        returns = np.array([episode.rewards.sum() for episode in dataset])
        ax.hist(returns, bins=25, color="#4063d8")
        ax.axvline(returns.mean(), color="k", linewidth=0.8, linestyle="--")
        ax.set_title(f"{name}\n{len(returns)} episodes, mean {returns.mean():.4g}", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.locator_params(nbins=4)
        ax.set_xlabel("return", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("episodes", fontsize=8)
    figure.savefig(folder / "returns.png", dpi=120)


# -------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only", choices=[*TASKS, *LANGUAGE_MODELS, "text", "picture"], help="make this one"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="environment steps of a dataset; training steps of the language model",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    options = parser.parse_args()
    build = options.out / "build"
    build.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else [*TASKS, "gpt2-tiny", "text", "picture"]:
        if name == "picture":
            draw_returns(options.out)
        elif name == "text":
            (options.out / "text.txt").write_text("\n".join(topics.values()), "utf-8")
        elif name in LANGUAGE_MODELS:
            make_language_model(
                name, options.out / name, build, options.steps or 6000, options.seed
            )
        else:
            make_dataset(name, options.out, options.steps, options.seed)


if __name__ == "__main__":
    main()
