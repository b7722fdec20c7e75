"""Tests of Atari's games: against Gymnasium's own preprocessing, and a plain average of areas."""

import sys

import gymnasium as gym
import minari
import numpy as np
import pytest

pytest.importorskip("ale_py")
pytest.importorskip("cv2")

import atari
import eval as evaluation
import lamo
from test_lamo import isolated, save_dataset

atari.import_games()


def area_average(picture, size=84):
    """Return a picture (H, W) as (84, 84): each pixel the mean of the area that it covers."""

    def weights(pixels):
        edges = np.arange(size + 1) * pixels / size
        left = np.maximum(edges[:-1, None], np.arange(pixels))
        right = np.minimum(edges[1:, None], np.arange(pixels) + 1)
        return np.clip(right - left, 0, None) * size / pixels

    height, width = picture.shape
    return weights(height) @ picture @ weights(width).T


def test_a_frame_is_the_mean_of_areas_of_grey():
    rng = np.random.default_rng(0)
    for height in (210, 250):
        picture = rng.integers(256, size=(height, 160, 3), dtype=np.uint8)
        expected = area_average(picture @ [0.299, 0.587, 0.114])
        assert np.abs(atari.grey([picture])[0] - expected).max() < 1.5  # rounded twice


@pytest.fixture
def starts_at_once(monkeypatch):
    monkeypatch.setattr(atari, "NO_OPS", 0)


@pytest.mark.parametrize("game", ["Breakout", "Pong"])
def test_states_are_gymnasiums_but_for_its_maximum_of_two_frames(game, starts_at_once):
    """Gymnasium takes the maximum of the last two pictures, and ALE's own grey. Ours has neither.

    Minari's data has the last picture only, so nothing else can be computed from it.
    """
    ours = gym.make(f"atari:lamo/{game}-v0")
    theirs = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0)
    theirs = gym.wrappers.AtariPreprocessing(theirs, noop_max=0, frame_skip=4)
    theirs = gym.wrappers.FrameStackObservation(theirs, 4)
    states = [env.reset(seed=0)[0] for env in (ours, theirs)]
    rng, moving, rewards = np.random.default_rng(0), 0, np.zeros(2)
    for _ in range(250):
        difference = np.abs(states[0].astype(int) - states[1])
        moving += (difference > 8).any()
        assert states[0].dtype == np.uint8 and (difference > 8).mean() < 0.01  # the ball is small
        action = int(rng.integers(ours.action_space.n))
        steps = [env.step(action) for env in (ours, theirs)]
        states = [step[0] for step in steps]
        rewards += [step[1] for step in steps]
        assert steps[0][2:4] == steps[1][2:4]
    assert moving > 10 and rewards[0] == rewards[1] != 0  # the same game, and the ball was in it


def test_the_seed_says_how_long_a_game_waits():
    env = gym.make("atari:lamo/Pong-v0")
    states = [env.reset(seed=seed)[0] for seed in (0, 1, 2, 0)]
    assert np.array_equal(states[0], states[3])
    assert all(not np.array_equal(states[0], state) for state in states[1:3])
    waits = np.random.default_rng(0).integers(31)
    raw = gym.make("ALE/Pong-v5", repeat_action_probability=0)
    picture, _ = raw.reset(seed=0)
    for _ in range(waits):
        picture, *_ = raw.step(0)
    assert waits > 0  # no state shows them: the first frame is repeated, as in the data
    assert all(np.array_equal(frame, atari.grey([picture])[0]) for frame in states[0])


def test_waiting_takes_nothing_from_the_time_limit():
    spec = evaluation.spec_of("ale_py:ALE/Pong-v5")
    spec.max_episode_steps = 5
    env = evaluation.Environments(spec).make()
    for seed in range(4):  # one of them waits longer than that
        env.reset(seed=seed)
        ends = [env.step(0)[3] for _ in range(5)]
        assert ends == [False] * 4 + [True]


@pytest.fixture
def breakout(tmp_path, starts_at_once):
    """Two random episodes of pictures, and the states that the converted environment shows."""
    raw = gym.make("ALE/Breakout-v5", repeat_action_probability=0, max_episode_steps=40)
    seen = gym.make("atari:lamo/Breakout-v0")
    episodes, states = [], []
    for seed, steps in enumerate((40, 12)):
        raw.action_space.seed(seed)
        pictures, actions, rewards = [raw.reset(seed=seed)[0]], [], []
        states.append(seen.reset(seed=seed)[0])
        for t in range(steps):
            actions.append(raw.action_space.sample())
            picture, reward, *_ = raw.step(actions[-1])
            pictures.append(picture)
            rewards.append(reward)
            states.append(seen.step(actions[-1])[0])
            assert len(pictures) == t + 2
        states.pop()  # no action follows the last one
        episodes.append((np.array(pictures), actions, rewards))
    folder = save_dataset("test/breakout-v0", raw, episodes)
    return folder, np.array(states)


def test_states_of_the_data_are_those_of_the_environment(breakout):
    folder, expected = breakout
    dataset = atari.preprocess_data(minari.MinariDataset(folder / "data"))
    trajectories = lamo.read_trajectories(dataset, 1.0, 0)
    assert trajectories.states.shape == (52, 84, 84)  # each frame once
    states = trajectories.states_at(lamo.torch.arange(52).unsqueeze(0))[0]
    difference = np.abs(states.numpy().astype(int) - expected)
    assert difference.max() < 40 and difference.mean() < 1  # Minari keeps pictures as JPEG


@pytest.mark.slow
def test_a_game_from_start_to_end(breakout, tmp_path, capsys):
    options = "--demo --device cpu --env breakout --steps 2 --batch 2 --text-block 32 --context 3"
    data = f"--data {breakout[0]} --episodes 2 --max-steps 30 --out {tmp_path / 'run'}"
    lamo.main(f"{options} {data}".split())
    assert "ALE/Breakout-v5, episodes of at most 30 steps" in capsys.readouterr().out
    policy, config, header = lamo.load(tmp_path / "run")
    assert policy.image_shape == (4, 84, 84) and policy.discrete and policy.max_timesteps == 40
    assert (config.targets, config.lora_rank, header["reference"]) == ([120, 90], 32, (1.7, 31.8))
    evaluation.main([str(tmp_path / "run")])
    assert "best" in capsys.readouterr().out


@pytest.mark.parametrize("package, is_game", [("ale_py", True), ("shimmy", True), ("pix", False)])
def test_a_game_is_known_by_its_package(package, is_game):
    space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8)
    assert atari.shows_pictures(space, f"{package}.atari_env:AtariEnv") == is_game


def test_settings_are_the_papers():
    config, _ = lamo.configure({"env": "qbert", "device": "cpu"})
    assert (config.context, config.lora_rank, config.batch) == (30, 32, 128)
    assert config.data == "atari/qbert/expert-v0" and config.text_block == 1024
    config, _ = lamo.configure({"env": "qbert", "device": "cpu", "method": "dt"})
    assert (config.lora_rank, config.batch) == (0, 128)  # the method goes before the task
    limits = [lamo.configure({"env": env, "device": "cpu"})[0].max_steps for env in atari.TASKS]
    assert limits == [4096, None, None]  # the authors have it for Breakout alone


@pytest.mark.parametrize("package", ["ale_py", "cv2"])
def test_what_is_missing_is_named(breakout, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    dataset = minari.MinariDataset(breakout[0] / "data")
    with pytest.raises(ValueError, match="pip install -r atari/requirements.txt"):
        atari.preprocess_data(dataset)
