"""Tests of the demo: its datasets, its environments, its language model, and the script that makes them."""

import itertools
import math
import os
import sys

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

import lamo
from lamo import GPT2
from test_lamo import HERE, SHORT, command, isolated, read_scores

DEMO_DATA = {  # steps, range of the mean return, least best return, least spread
    "hopper": (100_000, 1000, 1800, 3000, 0.2), "halfcheetah": (50_000, 2000, 5000, 4000, 0.2),
    "walker2d": (50_000, 1000, 4000, 2500, 0.2), "reacher2d": (10_000, 20, 60, 70, 0.2),
    "kitchen-complete": (3_000, 3, 4, 3.5, 0.1), "kitchen-partial": (10_000, 2, 4, 3.5, 0.2),
    "kitchen-mixed": (10_000, 1, 3, 2.5, 0.2), "pointmaze": (40_000, 100, 200, 250, 0.5),
    "cartpole": (25_000, 150, 300, 499, 0.5), "catch": (20_000, 4, 6, 9, 0.4),
}  # fmt: skip


def parts(value):
    """Return the parts of a dict of observations or spaces by name, and of another the only one."""
    is_dict = isinstance(value, (dict, gym.spaces.Dict))
    return dict(value) if is_dict else {"observation": value}


@pytest.mark.parametrize("name", DEMO_DATA)
def test_demo_datasets_are_whole(name):
    steps, low, high, best, spread = DEMO_DATA[name]
    dataset = minari.MinariDataset(HERE / "demo" / "lamo" / name / "demo-v0" / "data")
    assert dataset.id == f"lamo/{name}/demo-v0"
    returns = np.array([episode.rewards.sum() for episode in dataset])
    assert steps <= dataset.total_steps < steps + 1000
    assert (
        low < returns.mean() < high
        and returns.max() > best
        and returns.std() > spread * returns.mean()
    )
    metadata = dataset.storage.metadata
    assert metadata["ref_min_score"] < returns.mean() < metadata["ref_max_score"]
    env, episode = dataset.recover_environment(), dataset[0]
    spaces, on_file = parts(dataset.observation_space), parts(episode.observations)
    for space, observations in zip(spaces.values(), on_file.values(), strict=True):
        assert space.dtype == observations.dtype == (np.uint8 if name == "catch" else np.float32)
    if "kitchen" not in name:
        assert spaces.keys() == parts(env.observation_space).keys()
    assert dataset.action_space == env.action_space
    observation, _ = env.reset(seed=0)  # the first steps, simulated again, are those on file
    for t in range(3):
        for part, observations in on_file.items():
            scale = np.abs(observations).max()
            seen = parts(observation)[part]
            np.testing.assert_allclose(seen, observations[t], atol=1e-3 * scale)
        assert env.action_space.contains(episode.actions[t])
        observation, reward, *_ = env.step(episode.actions[t])
        assert reward == pytest.approx(episode.rewards[t], abs=1e-3)


def test_reacher2d_moves_as_the_authors_arm():
    env = gym.make("demo.reacher2d:lamo/Reacher2d-v0").unwrapped
    env.reset(seed=0)
    env.set_state(np.array([0.5, -1.2]), np.zeros(2))
    # angles, velocities and fingertip after that many steps, recorded from the authors' model of the arm
    expected = {
        1: ([0.499169, -1.164526], [-0.011509, 0.432706], [0.523645, 0.297719]),
        10: ([0.602152, -0.476248], [0.30049, -0.099221], [0.556007, 0.646418]),
        25: ([1.828588, -1.778218], [0.451975, -0.116215], [-0.068859, 0.324943]),
        40: ([1.604499, -0.373948], [-0.395511, 0.336601], [-0.287983, 0.834104]),
    }
    goal = env.model.body("goal").pos[:2]
    for t in range(1, 41):
        observation, *_ = env.step(np.array([np.sin((t - 1) / 7), np.cos((t - 1) / 5)]))
        if t in expected:
            angles, velocities, tip = map(np.array, expected[t])
            parts = np.sin(angles), np.cos(angles), 0.15 * velocities, tip, goal, tip - goal
            np.testing.assert_allclose(observation, np.concatenate(parts), atol=2e-6)


@pytest.mark.slow
def test_reacher2d_starts_pays_and_ends_as_the_authors():
    env = gym.make("demo.reacher2d:lamo/Reacher2d-v0")
    starts = []
    for seed in range(300):
        observation, _ = env.reset(seed=seed)
        arm = env.unwrapped
        starts.append([*arm.data.qpos, *observation[8:10]])
        assert not arm.data.qvel.any()
        np.testing.assert_array_equal(observation[:2], np.sin(arm.data.qpos))
    angles, goals = np.array(starts)[:, :2], np.array(starts)[:, 2:]
    assert -2 < angles.min() < -1.9 and 1.9 < angles.max() < 2
    assert (
        0.5 <= np.linalg.norm(goals, axis=1).min() < 0.52
        and 0.98 < np.linalg.norm(goals, axis=1).max() <= 1
    )
    for dx, dy, pays in (
        (0.09, 0.0, 1),
        (0.04, -0.05, 1),
        (0.06, 0.05, 0),
        (-0.05, -0.06, 0),
        (0.11, 0.0, 0),
    ):
        tip = arm.data.site("fingertip").xpos
        arm.model.body("goal").pos[:2] = tip[:2] + [dx, dy]
        arm.set_state(arm.data.qpos, np.zeros(2))
        observation, reward, *_ = env.step(np.zeros(2, np.float32))
        np.testing.assert_allclose(observation[10:], [-dx, -dy], atol=1e-9)
        assert reward == pays
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]
    assert env.action_space == gym.spaces.Box(-1, 1, (2,), np.float32)


def folded(column):
    """Return where a ball is, which would be at a column if no walls threw it back."""
    return [*range(10), *range(8, 0, -1)][column % 18]


def thrown(picture):
    """Return the column from which a new ball comes, and its speed."""
    start, second = picture[0, :, 2].argmax(), picture[1, :, 1].argmax()
    return start, next(v for v in (-2, -1, 1, 2) if folded(start + v) == second)


def test_catch_obeys_its_rules():
    env, rng, starts = gym.make("demo.catch:lamo/Catch-v0"), np.random.default_rng(0), set()
    for seed in range(30):
        picture, _ = env.reset(seed=seed)
        paddle, reward, ended, truncated = picture[9, :, 0].argmax(), 0, False, False
        for ball, row in itertools.product(range(10), range(1, 10)):
            if (ball, row) != (0, 1):
                action = rng.integers(3)
                paddle = min(max(paddle + action - 1, 0), 8)
                picture, reward, ended, truncated, _ = env.step(action)
            if row == 1:
                start, speed = thrown(picture)
                starts.add((start, speed))
            columns = [folded(start + speed * fallen) for fallen in range(10)]
            expected = np.zeros((10, 10, 3), np.uint8)
            expected[9, paddle : paddle + 2, 0] = 255
            expected[row, columns[row], 1] = 255
            expected[row - 1, columns[row - 1], 2] = 255
            np.testing.assert_array_equal(picture, expected, strict=True)
            assert reward == (row == 9 and columns[9] in (paddle, paddle + 1))
            assert ended == ((ball, row) == (9, 9)) and not truncated
    assert len(starts) == 36  # ten columns with four speeds; at a wall, both signs look the same


def test_every_ball_of_catch_can_be_caught():
    env = gym.make("demo.catch:lamo/Catch-v0")
    for seed in range(50):
        (picture, _), total, steps, ended = env.reset(seed=seed), 0, 0, False
        while not ended:
            if picture[1, :, 1].any():
                start, speed = thrown(picture)
            paddle, landing = picture[9, :, 0].argmax(), folded(start + 9 * speed)
            action = 1 + int(landing > paddle + 1) - int(landing < paddle)
            picture, reward, ended, *_ = env.step(action)
            total, steps = total + reward, steps + 1
        assert (total, steps) == (10, 89)


@pytest.mark.filterwarnings("error")
def test_catch_is_an_environment_of_gymnasium():
    env = gym.make("demo.catch:lamo/Catch-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    picture, _ = env.reset(seed=0)
    seen = env.render()
    assert seen.shape == (200, 200, 3) and seen.dtype == np.uint8
    is_empty = (seen.reshape(10, 20, 10, 20, 3) == 255).all(axis=(1, 3, 4))
    np.testing.assert_array_equal(is_empty, ~picture.any(axis=2))


def test_demo_model_equals_transformers_and_knows_english():
    folder = HERE / "demo" / "gpt2-tiny"
    theirs = GPT2LMHeadModel.from_pretrained(folder).float().eval()
    ours = GPT2.from_pretrained(lamo.load_causal_lm("demo/gpt2-tiny")).eval()
    sentence = "Return True if the object is a subclass of the given class, and False otherwise."
    tokens = torch.tensor(
        [Tokenizer.from_file(str(folder / "tokenizer.json")).encode(sentence).ids]
    )
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
        assert (
            theirs(tokens, labels=tokens).loss < math.log(4096) - 3
        )  # trained: far below a uniform guess


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, steps",
    [
        ("hopper", 300),
        ("reacher2d", 300),
        ("kitchen-mixed", 100),
        ("pointmaze", 300),
        ("cartpole", 300),
        pytest.param(
            "catch",
            300,
            marks=pytest.mark.skipif(
                sys.version_info < (3, 11),
                reason="Minari 0.5.3, the last for Python 3.10, cannot read its own small images",
            ),
        ),
    ],
)
def test_demo_data_can_be_made_anew(name, steps, tmp_path):
    if name == "hopper":
        pytest.importorskip("stable_baselines3", reason="pip install -r demo/requirements.txt")
    out = os.path.relpath(tmp_path, HERE)
    result = command("demo/make.py", "--only", name, "--steps", steps, "--out", out)
    assert result.returncode == 0, result.stderr
    data = tmp_path / "lamo" / name / "demo-v0"
    lamo.main(
        f"{SHORT} --ratio 1 --method dt --env {name} --data {data} --out {tmp_path / 'run'}".split()
    )
    assert read_scores(tmp_path / "run")["dataset"] == str(data)
