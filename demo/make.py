"""Makes everything in demo/ from nothing: Minari datasets of simulated rollouts, a small GPT-2, and a text.

    python demo/make.py                               # all of it; about two hours on two CPU cores
    python demo/make.py --only hopper --steps 20000   # one dataset, small, in minutes
    python demo/make.py --only gpt2-tiny              # the language model

Locomotion policies are trained by PPO (Schulman et al. 2017, arXiv 1707.06347). The best of its snapshots collects
half of the steps and all of them share the other half, with some of their exploration noise, so that returns vary as
they do in D4RL's medium-expert sets. The arm of reacher2d is driven by a controller whose skill differs from episode
to episode, the one in the kitchen by a script that does the subtasks of D4RL's sets one after the other.
The language model is pre-trained on the documentation and docstrings of the Python installation that runs this.

Work in progress is kept in demo/build, and a later call goes on from there.
"""

import argparse
import ast
import math
import os
import platform
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import gymnasium as gym
import mujoco
import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from eval import vector  # noqa: E402


@dataclass(frozen=True)
class Task:
    """A dataset to make."""

    env_id: str
    dataset_steps: int  # environment steps in the dataset
    reference: tuple[
        float, float
    ]  # returns that score 0 and 100: D4RL's (Fu et al. 2020); reacher2d: none and all steps
    ppo_steps: int = 0  # environment steps that PPO may use; 0: the scripted controller
    noise: float = 1.0  # exploration noise of an episode, at most, in units of PPO's
    subtasks: tuple[str, ...] = ()  # of the kitchen, as in D4RL's set of this name
    attempts: tuple[int, int] = (4, 4)  # how many of them an episode attempts, at least and at most


kitchen = partial(Task, "gymnasium_robotics:FrankaKitchen-v1", reference=(0.0, 4.0))
TASKS = {
    "hopper": Task("Hopper-v5", 100_000, (-20.272305, 3234.3), ppo_steps=1_000_000),
    "halfcheetah": Task("HalfCheetah-v5", 50_000, (-280.178953, 12135.0), ppo_steps=1_000_000, noise=1.5),
    "walker2d": Task("Walker2d-v5", 50_000, (1.629008, 4592.3), ppo_steps=1_000_000, noise=1.5),
    "reacher2d": Task("eval:lamo/Reacher2d-v0", 10_000, (0.0, 100.0)),
    "kitchen-complete": kitchen(3_000, subtasks=("microwave", "kettle", "light switch", "slide cabinet")),
    "kitchen-partial": kitchen(
        10_000, subtasks=("microwave", "kettle", "light switch", "slide cabinet"), attempts=(2, 4)
    ),
    "kitchen-mixed": kitchen(
        10_000, subtasks=("microwave", "kettle", "bottom burner", "light switch"), attempts=(2, 3)
    ),
}

# -------------------------------------------------------------------------------- PPO

ENVS, HORIZON, EPOCHS, MINIBATCHES = 8, 256, 10, 8
GAMMA, GAE_LAMBDA, CLIP, PPO_LR = 0.99, 0.95, 0.2, 3e-4
SNAPSHOTS = 50  # over the whole training


def network(inputs, outputs, last_gain):
    """Two hidden layers of 64 tanh units with orthogonal weights, as in the original PPO."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), last_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Moments(nn.Module):
    """Running mean and variance; normalises what it is called on."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.tensor(1e-4))

    def update(self, x):
        """Take in a batch (N, size), by the parallel-variance formula of Chan et al."""
        n, delta = len(x), x.mean(0) - self.mean
        total = self.count + n
        self.var.copy_((self.var * self.count + x.var(0, correction=0) * n + delta**2 * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)

    def forward(self, x):
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


class Policy(nn.Module):
    """Gaussian policy on normalised observations. (..., S) -> distribution over (..., A)"""

    def __init__(self, state_size, action_size):
        super().__init__()
        self.normalise = Moments(state_size)
        self.mean = network(state_size, action_size, 0.01)
        self.log_std = nn.Parameter(torch.full((action_size,), -0.5))

    def forward(self, normalised):
        return torch.distributions.Normal(self.mean(normalised), self.log_std.exp())


def train_ppo(name, task, steps, build, seed):
    """PPO -> snapshots: a list of {"policy": state dict, "return": mean of the last 20 episodes, "steps"}.

    Progress is written to `build` with every snapshot; a later call goes on from it.
    """
    path = build / f"{name}-ppo-{steps}-{seed}.pt"
    torch.set_num_threads(1)  # the networks are too small for more
    torch.manual_seed(seed)
    envs = gym.make_vec(
        task.env_id, ENVS, "sync", vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    )  # fmt: skip
    S, A = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    policy, critic, return_scale = Policy(S, A), network(S, 1, 1.0), Moments(1)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=PPO_LR, eps=1e-5)
    kept = nn.ModuleList([policy, critic, return_scale])
    update, seconds, snapshots, updates = 0, 0.0, [], max(1, steps // (ENVS * HORIZON))
    if path.exists():
        state = torch.load(path, weights_only=True)
        kept.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        update, seconds, snapshots = state["update"], state["seconds"], state["snapshots"]
    start = time.time() - seconds
    observation, _ = envs.reset(seed=seed + update)
    as_tensor = lambda x: torch.as_tensor(x, dtype=torch.float32)
    episode_return, discounted, recent = np.zeros(ENVS), torch.zeros(ENVS), []
    while update < updates:
        for group in optimizer.param_groups:
            group["lr"] = PPO_LR * (1 - update / updates)
        observations, inputs, actions, log_probs, values, rewards, dones = [], [], [], [], [], [], []
        with torch.no_grad():
            for _ in range(HORIZON):
                observations.append(as_tensor(observation))
                inputs.append(policy.normalise(observations[-1]))
                distribution = policy(inputs[-1])
                actions.append(distribution.sample())
                log_probs.append(distribution.log_prob(actions[-1]).sum(-1))
                values.append(critic(inputs[-1])[:, 0])
                observation, reward, terminated, truncated, info = envs.step(actions[-1].clamp(-1, 1).numpy())
                done = terminated | truncated
                discounted = discounted * GAMMA + as_tensor(reward)
                return_scale.update(discounted[:, None])
                scaled = (as_tensor(reward) / (return_scale.var + 1e-8).sqrt()).clamp(-10, 10)
                for i in np.flatnonzero(truncated & ~terminated):  # a time limit is no end: bootstrap
                    final = policy.normalise(as_tensor(info["final_obs"][i]))
                    scaled[i] += GAMMA * critic(final).item()
                rewards.append(scaled)
                dones.append(as_tensor(done))
                episode_return += reward
                recent = (recent + list(episode_return[done]))[-20:]
                episode_return[done] = 0
                discounted[torch.from_numpy(done)] = 0
            policy.normalise.update(torch.cat(observations))
            advantages, advantage = [], torch.zeros(ENVS)
            following = critic(policy.normalise(as_tensor(observation)))[:, 0]
            for t in reversed(range(HORIZON)):
                delta = rewards[t] + GAMMA * following * (1 - dones[t]) - values[t]
                advantage = delta + GAMMA * GAE_LAMBDA * (1 - dones[t]) * advantage
                advantages.insert(0, advantage)
                following = values[t]
        inputs, actions, log_probs, values = map(torch.cat, (inputs, actions, log_probs, values))
        advantages = torch.cat(advantages)
        targets = advantages + values
        for _ in range(EPOCHS):
            for index in torch.randperm(len(inputs)).chunk(MINIBATCHES):
                ratio = (policy(inputs[index]).log_prob(actions[index]).sum(-1) - log_probs[index]).exp()
                weight = (advantages[index] - advantages[index].mean()) / (advantages[index].std() + 1e-8)
                policy_loss = -torch.min(weight * ratio, weight * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
                value_loss = (critic(inputs[index])[:, 0] - targets[index]).square().mean()
                optimizer.zero_grad()
                (policy_loss + 0.25 * value_loss).backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        update += 1
        if update % max(1, updates // SNAPSHOTS) == 0 and recent:
            done_steps, seconds = update * ENVS * HORIZON, time.time() - start
            state_dict = {key: value.clone() for key, value in policy.state_dict().items()}
            snapshots.append({"policy": state_dict, "return": float(np.mean(recent)), "steps": done_steps})
            state = {
                "modules": kept.state_dict(), "optimizer": optimizer.state_dict(), "update": update,
                "seconds": seconds, "snapshots": snapshots,
            }  # fmt: skip
            torch.save(state, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
            print(f"{name}: PPO step {done_steps:9,d}, return {np.mean(recent):7.1f}, {seconds:5.0f} s", flush=True)
    envs.close()
    return snapshots


# -------------------------------------------------------------------------------- datasets


class Snapshot:
    """A snapshot of PPO with a share of its exploration noise, drawn anew for each episode from [0, most]."""

    def __init__(self, state_dict, most, rng):
        action_size, state_size = len(state_dict["log_std"]), len(state_dict["normalise.mean"])
        self.policy, self.most, self.rng = Policy(state_size, action_size), most, rng
        self.policy.load_state_dict(state_dict)

    def reset(self):
        self.noise = self.rng.uniform(0, self.most)

    @torch.no_grad()
    def act(self, observation):
        normalised = self.policy.normalise(torch.as_tensor(observation, dtype=torch.float32))
        distribution = self.policy(normalised)
        return distribution.mean.numpy() + self.noise * distribution.stddev.numpy() * self.rng.standard_normal(
            len(distribution.mean)
        )


class Reacher:
    """Drives the arm of reacher2d by Jacobian-transpose control, with a strength that varies between episodes."""

    def __init__(self, rng):
        self.rng = rng

    def reset(self):
        self.strength = 10 ** self.rng.uniform(0, 1.5)  # newtons per metre
        self.damping = self.rng.uniform(0, 1.5)  # newton metres per radian per second
        self.noise = self.rng.uniform(0, 0.5)

    def act(self, observation):
        sin, cos, velocity, tip, error = (
            observation[0],
            observation[2],
            observation[4:6] / 0.15,
            *observation[[6, 7, 10, 11]].reshape(2, 2),
        )
        angle = math.atan2(sin, cos) + 0.785  # of the upper arm, 0.6 m long
        forearm = tip - 0.6 * np.array([math.cos(angle), math.sin(angle)])
        jacobian = np.array([[-tip[1], -forearm[1]], [tip[0], forearm[0]]])
        torque = -self.strength * jacobian.T @ error - self.damping * velocity
        return torque + self.noise * self.rng.standard_normal(2)


OPEN, CLOSED = 1, -1

# How the hand does a subtask of the kitchen: the site of FrankaKitchen's model that it is about, then way points:
# x, y, z in metres from where the site is at first, fingers, roll in radians.
WAY_POINTS = {
    "microwave": (
        "microhandle_site",
        [(0.03, -0.17, 0.03, OPEN, 0), (0.01, 0.02, 0.03, OPEN, 0), (0.01, 0.02, 0.03, CLOSED, 0), (0, -0.4, 0.03, CLOSED, 0)],
    ),
    "kettle": (
        "kettle_site",
        [(0, -0.15, -0.12, OPEN, 0), (0, 0.3, -0.1, OPEN, 0)],
    ),
    "light switch": (
        "light_site",
        [(0.1, -0.1, 0, CLOSED, 0), (0.1, 0.03, 0, CLOSED, 0), (-0.15, 0.03, 0, CLOSED, 0)],
    ),
    "slide cabinet": (
        "slide_site",
        [(-0.12, -0.12, 0, CLOSED, 0), (-0.12, 0, 0, CLOSED, 0), (0.25, 0, 0, CLOSED, 0)],
    ),
    "bottom burner": (
        "knob2_site",
        [(0, -0.12, 0, OPEN, 0), (0, 0, 0, OPEN, 0), (0, 0, 0, CLOSED, 0), (0, 0, 0.04, CLOSED, 1.2)],
    ),
}  # fmt: skip


class Cook:
    """Does a random choice of subtasks of the kitchen, in their order, by resolved-rate control.

    It reads where things are from the simulator, not from the observation. Its noise varies between episodes.
    """

    SPEED = 0.8  # of the hand, metres per second
    NEAR = 0.035  # metres to a way point at which the next one is taken
    PATIENCE = 25  # steps after which it is taken anyway
    POSTURE = np.array([0.15, -1.5, 1.84, -2.48, 0.26, 0.71, 1.6])  # joint angles, nearly those of the start

    def __init__(self, env, subtasks, attempts, rng):
        self.env, self.subtasks, self.attempts, self.rng = env.unwrapped, subtasks, attempts, rng

    def reset(self):
        self.noise = self.rng.uniform(0, 0.15)
        self.aims = self.plan()

    def plan(self):
        """Yields for each step where the hand should be (3,), its axes (3, 3), and the fingers."""
        least, most = self.attempts
        order = self.subtasks
        if least < len(order):
            some = self.rng.choice(len(order), self.rng.integers(least, most + 1), replace=False)
            order = [order[i] for i in sorted(some)]
        hand, completed = self.env.data.site("end_effector"), self.env.episode_task_completions
        axes = hand.xmat.reshape(3, 3).copy()
        for subtask in order:
            name, points = WAY_POINTS[subtask]
            site = self.env.data.site(name).xpos.copy()
            for *offset, fingers, roll in points:
                position, (sin, cos) = site + offset, (math.sin(roll), math.cos(roll))
                rolled = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]) @ axes
                for _ in range(self.PATIENCE):
                    yield position, rolled, fingers
                    if subtask in completed or np.linalg.norm(position - hand.xpos) < self.NEAR:
                        break
                if subtask in completed:
                    break

    def act(self, observation):
        aim = next(self.aims, None)
        if aim is None:
            return None
        position, axes, fingers = aim
        model, data, dt = self.env.model, self.env.data, self.env.robot_env.dt
        hand = data.site("end_effector")
        velocity = 6 * (position - hand.xpos)
        velocity *= min(1, self.SPEED / np.linalg.norm(velocity))
        rotation = 2 * np.cross(hand.xmat.reshape(3, 3), axes, axis=0).sum(axis=1)
        jacobian = np.zeros((6, model.nv))
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], hand.id)
        jacobian = jacobian[:, :7]  # of the arm's joints

        def joint_velocities(free):  # (7,) whether a joint may move
            moving = jacobian * free
            inverse = moving.T @ np.linalg.inv(moving @ moving.T + 1e-3 * np.eye(6))  # damped least squares
            null_space = np.eye(7) - inverse @ moving  # what does not move the hand keeps the arm in its posture
            return inverse @ np.append(velocity, rotation) + null_space @ (3 * (self.POSTURE - data.qpos[:7]))

        low, high = model.jnt_range[:7].T
        reached = data.qpos[:7] + 2 * dt * joint_velocities(np.ones(7))
        velocities = joint_velocities((low < reached) & (reached < high))
        against_gravity = data.qfrc_bias[:7] / model.actuator_gainprm[:7, 0] / dt
        action = np.append((velocities + against_gravity) / 2, [fingers, fingers])  # 2 rad/s are an action of 1
        return action + self.noise * self.rng.standard_normal(9)


def collect(env, policies, shares, steps, seed):
    """Episodes until there are `steps` steps -> Minari EpisodeBuffers, float32.

    The next one is always by the policy that is furthest behind its share of the steps.
    """
    from minari.data_collector import EpisodeBuffer

    episodes, taken = [], np.zeros(len(policies))
    while taken.sum() < steps:
        turn = np.argmin(taken / shares)
        policy = policies[turn]
        observation, _ = env.reset(seed=seed + len(episodes))
        policy.reset()
        observations, actions, rewards = [vector(observation).astype(np.float32)], [], []
        terminations, truncations = [], []
        while not actions or not (terminations[-1] or truncations[-1]):
            action = policy.act(observation)
            if action is None:  # nothing is left to do
                truncations[-1] = True
                break
            action = np.clip(action, env.action_space.low, env.action_space.high).astype(np.float32)
            observation, reward, terminated, truncated, _ = env.step(action)
            observations.append(vector(observation).astype(np.float32))
            actions.append(action)
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
        episodes.append(
            EpisodeBuffer(
                id=len(episodes),
                seed=seed + len(episodes),
                observations=np.array(observations),
                actions=np.array(actions),
                rewards=np.array(rewards, np.float32),
                terminations=np.array(terminations),
                truncations=np.array(truncations),
            )
        )
        taken[turn] += len(rewards)
    return episodes


def make_dataset(name, folder, build, steps, seed):
    """Train, collect, and write the Minari dataset lamo/<name>/demo-v0 below `folder`, compressed."""
    start = time.time()
    task = TASKS[name]
    steps = steps or task.dataset_steps
    rng = np.random.default_rng(seed)
    kwargs = {"tasks_to_complete": list(task.subtasks)} if task.subtasks else {}
    with gym.make(task.env_id, **kwargs) as env:
        if task.ppo_steps:
            ppo_steps = min(task.ppo_steps, 20 * steps)  # a small dataset comes from a short training
            snapshots = train_ppo(name, task, ppo_steps, build, seed)
            policies = [Snapshot(snapshot["policy"], task.noise, rng) for snapshot in snapshots]
            tries = [collect(env, [policy], np.ones(1), steps // 10, seed) for policy in policies]
            best = np.argmax([np.mean([episode.rewards.sum() for episode in tried]) for tried in tries])
            shares = np.full(len(policies), 0.5 / len(policies))
            shares[best] += 0.5
            algorithm = f"PPO, {len(policies)} snapshots of one training of {ppo_steps} steps"
        elif task.subtasks:
            policies, shares = [Cook(env, task.subtasks, task.attempts, rng)], np.ones(1)
            algorithm = "resolved-rate control along way points"
        else:
            policies, shares, algorithm = [Reacher(rng)], np.ones(1), "Jacobian-transpose control of varying strength"
        episodes = collect(env, policies, shares, steps, seed)
        write_dataset(name, folder, env, episodes, task.reference, algorithm)
    returns = np.array([episode.rewards.sum() for episode in episodes])
    print(
        f"{name}: {len(episodes)} episodes, {sum(map(len, episodes))} steps, returns {returns.min():.1f} to "
        f"{returns.max():.1f}, mean {returns.mean():.1f}, {time.time() - start:.0f} s on {machine()}",
        flush=True,
    )


def write_dataset(name, folder, env, episodes, reference, algorithm):
    """Write a Minari dataset, then its HDF5 file once more with compression, which Minari has no option for."""
    import h5py
    import minari

    dataset_id = f"lamo/{name}/demo-v0"
    shutil.rmtree(folder / dataset_id, ignore_errors=True)
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    minari.create_dataset_from_buffers(
        dataset_id,
        episodes,
        env=env,
        observation_space=gym.spaces.Box(-np.inf, np.inf, episodes[0].observations[0].shape, np.float32),
        algorithm_name=algorithm,
        author="LaMo contributors",
        author_email="none",
        code_permalink=f"demo/make.py --only {name}",
        ref_min_score=reference[0],
        ref_max_score=reference[1],
        description=f"Rollouts of mixed quality in {env.spec.id}, for the demo of LaMo. Not a D4RL dataset.",
        requirements=["gymnasium-robotics" if name.startswith("kitchen") else "gymnasium[mujoco]"],
    )
    path = folder / dataset_id / "data" / "main_data.hdf5"
    packed = path.with_suffix(".packed")
    with h5py.File(path) as source, h5py.File(packed, "w", libver="latest", track_order=True) as target:

        def copy(key, item):
            if isinstance(item, h5py.Group):
                made = target.require_group(key)
            else:
                made = target.create_dataset(key, data=item[()], compression="gzip", compression_opts=9, shuffle=True)
            made.attrs.update(item.attrs)

        source.visititems(copy)
    os.replace(packed, path)


# -------------------------------------------------------------------------------- language model

GPT2_TINY = {
    "vocab_size": 4096, "n_positions": 256, "n_embd": 128, "n_layer": 3, "n_head": 4,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
LM_STEPS, LM_BATCH, LM_LR, LM_WARMUP, LM_EVERY = 6000, 16, 2e-3, 200, 100


def documents():
    """English text of this Python installation: docstrings, and documentation files, without duplicates.

    pydoc_data.topics is left out: it becomes text.txt, which lamo.py's demo trains and measures its language loss on.
    """
    roots = sorted({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    seen = set()
    for root in roots:
        for path in sorted(Path(root).rglob("*")):
            if "pydoc_data" in path.parts or "test" in path.parts or "tests" in path.parts:
                continue
            try:
                if path.suffix == ".py":
                    tree = ast.parse(path.read_text("utf-8"))
                    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
                elif path.suffix in (".rst", ".md", ".txt") or path.name == "METADATA":
                    found = [path.read_text("utf-8")]
                else:
                    continue
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue  # unreadable, or Python of another version
            for text in found:
                # Lists of files and tables of numbers are not English: most characters must be letters or spaces.
                words = text and len(text) > 60 and sum(c.isalpha() or c.isspace() for c in text) > 0.75 * len(text)
                if words and text not in seen:
                    seen.add(text)
                    yield text.strip() + "\n"


def make_corpus(build):
    """Train a byte-level BPE tokenizer and tokenise the documents -> tokenizer, train tokens, held-out tokens.

    Every 50th document is held out. Kept in `build`, so that another machine can train on the same tokens.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    folder = build / "corpus"
    if not (folder / "held_out.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = list(documents())
        print(f"gpt2-tiny: {len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} million characters", flush=True)
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            texts, vocab_size=GPT2_TINY["vocab_size"], special_tokens=["<|endoftext|>"], show_progress=False
        )
        bpe.save_model(str(folder))
        tokenizer = GPT2TokenizerFast.from_pretrained(folder)
        ids = tokenizer(texts, verbose=False)["input_ids"]
        end = [tokenizer.eos_token_id]
        for name, part in {"train": [i for k, i in enumerate(ids) if k % 50], "held_out": ids[::50]}.items():
            np.save(folder / f"{name}.npy", np.concatenate([np.array(i + end, np.uint16) for i in part]))
    tokenizer = GPT2TokenizerFast.from_pretrained(folder, model_max_length=GPT2_TINY["n_positions"])
    return tokenizer, np.load(folder / "train.npy"), np.load(folder / "held_out.npy")


def make_gpt2_tiny(target, build, steps, seed):
    """Pre-train a small GPT-2 with transformers and save it as an ordinary Hugging Face folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer, train, held_out = make_corpus(build)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = GPT2Config(**GPT2_TINY, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    block = config.n_positions
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LM_LR, weight_decay=0.1, betas=(0.9, 0.95))
    counts = np.bincount(train, minlength=config.vocab_size) + 1
    unigram = -np.log(counts / counts.sum())[held_out].mean()  # cross-entropy of a unigram model, add-one smoothed
    print(f"gpt2-tiny: {len(train):,} tokens to train on, {len(held_out):,} held out, unigram {unigram:.3f} nats")
    blocks = torch.from_numpy(held_out[: len(held_out) // block * block].astype(np.int64)).view(-1, block)
    tokens = torch.from_numpy(train.astype(np.int64)).to(device)

    @torch.no_grad()
    def held_out_loss(blocks):
        model.eval()
        losses = [model(input_ids=part, labels=part).loss.item() for part in blocks.to(device).split(16)]
        model.train()
        return float(np.mean(losses))

    path, step, seconds = build / f"gpt2-tiny-{steps}-{seed}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    start = time.time() - seconds
    while step < steps:
        rng = np.random.default_rng([seed, step])
        index = torch.from_numpy(rng.integers(len(train) - block, size=(LM_BATCH, 1)) + np.arange(block)).to(device)
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = LM_LR * min((step + 1) / LM_WARMUP, 0.05 + 0.95 * cosine)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=tokens[index], labels=tokens[index]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % LM_EVERY == 0 or step == steps:
            seconds = time.time() - start
            partial = path.with_suffix(".tmp")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds},
                partial,
            )
            os.replace(partial, path)
            print(
                f"gpt2-tiny: step {step:6d} of {steps}, train {loss.item():.3f}, held out {held_out_loss(blocks[:64]):.3f} nats, "
                f"{seconds:.0f} s",
                flush=True,
            )
    model.eval().half().cpu().save_pretrained(target)
    tokenizer.save_pretrained(target)
    model.float().to(device)
    torch.manual_seed(seed)
    prompt = tokenizer("The function returns", return_tensors="pt").input_ids.to(device)
    sample = tokenizer.decode(model.generate(prompt, max_new_tokens=80, do_sample=True, top_k=40, temperature=0.8)[0])
    print(
        f"gpt2-tiny: {steps} steps, {seconds:.0f} s on {machine()}; held out {held_out_loss(blocks):.3f} nats per token, "
        f"unigram {unigram:.3f}\n{sample}"
    )


def machine():
    """What this runs on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


# -------------------------------------------------------------------------------- picture


def draw_returns(folder):
    """Histograms of the datasets' returns -> returns.png. Needs matplotlib."""
    import matplotlib
    import minari

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(13, 2.4), layout="constrained")
    for name, ax in zip(TASKS, axes):
        dataset = minari.MinariDataset(folder / "lamo" / name / "demo-v0" / "data")
        returns = np.array([episode.rewards.sum() for episode in dataset])
        ax.hist(returns, bins=25, color="#4063d8")
        ax.axvline(returns.mean(), color="k", linewidth=0.8, linestyle="--")
        ax.set_title(f"{name}\n{len(returns)} episodes, mean {returns.mean():.4g}", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.locator_params(nbins=4)
        ax.set_xlabel("return", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("episodes", fontsize=8)
    figure.savefig(folder / "returns.png", dpi=120)


# -------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=[*TASKS, "gpt2-tiny", "text", "picture"], help="make this one")
    parser.add_argument(
        "--steps", type=int, help="environment steps of a dataset; training steps of the language model"
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
        elif name == "gpt2-tiny":
            make_gpt2_tiny(options.out / name, build, options.steps or LM_STEPS, options.seed)
        else:
            make_dataset(name, options.out, build, options.steps, options.seed)


if __name__ == "__main__":
    main()
