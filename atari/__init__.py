"""Atari: the games as a policy sees them, and the settings of the paper's three.

A picture of a game becomes grey and 84 x 84 pixels small, and a state is the last four of them
(Mnih et al. 2015). Data and environments go through the same function.
"""

import json
from dataclasses import replace

import gymnasium as gym
import numpy as np

SIZE, STACK, NO_OPS = 84, 4, 30
FRAME = gym.spaces.Box(0, 255, (SIZE, SIZE), np.uint8)
STATE = gym.spaces.Box(0, 255, (STACK, SIZE, SIZE), np.uint8)

# The authors' context, rank, batch, learning rate and return scale. Targets are theirs for Breakout
# and those of Chen et al. (2021) for the others. A random player scores 0, a human 100.
# Breakout waits for the player to serve, for ever. The authors end its episodes after 4,096 steps.
SETTINGS = {"lora_rank": 32, "batch": 128, "lr": 1e-3}
TASKS = {
    game.lower(): {
        "env_id": f"atari:lamo/{game}-v0",
        "data": f"atari/{game.lower()}/expert-v0",
        "targets": targets,
        "return_scale": 1,
        "context": 30,
        "reference": reference,
        "settings": settings,
    }
    for game, targets, reference, settings in (
        ("Breakout", [120, 90], (1.7, 31.8), SETTINGS | {"max_steps": 4096}),
        ("Qbert", [14000, 2500], (163.9, 13455), SETTINGS),
        ("Pong", [20], (-20.7, 9.3), SETTINGS),
    )
}


def import_games():
    """Register ALE's games with Gymnasium. Raises ValueError if their packages are missing."""
    try:
        import ale_py  # noqa: F401
        import cv2  # noqa: F401
    except ImportError as error:
        advice = "Atari needs more packages: pip install -r atari/requirements.txt"
        raise ValueError(f"{advice} ({error})") from error


def make_game(game, **kwargs):
    """Return the environment of a game: four frames a step, and no action is repeated by chance."""
    import_games()
    env = gym.make(f"ALE/{game}-v5", frameskip=4, repeat_action_probability=0, **kwargs)
    return preprocess_env(env)


for name in "Breakout", "Qbert", "Pong":
    gym.register(
        f"lamo/{name}-v0",
        entry_point="atari:make_game",
        max_episode_steps=27_000,  # half an hour of play, as in Minari's data
        kwargs={"game": name},
    )


def shows_pictures(space, entry_point):
    """Return whether a space, of an environment of ALE, is that of a game's pictures in colour."""
    is_game = str(entry_point).startswith(("ale_py", "shimmy"))  # older data names shimmy
    return is_game and space.shape in ((210, 160, 3), (250, 160, 3)) and space.dtype == np.uint8


def grey(pictures):
    """Return pictures (T, H, W, 3) as frames (T, 84, 84), all of uint8."""
    import cv2

    frames = np.empty((len(pictures), SIZE, SIZE), np.uint8)
    for frame, picture in zip(frames, pictures):
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        frame[:] = cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return frames


class NoOpStarts(gym.Wrapper):
    """Does nothing for up to 30 steps before an episode, as many as the seed says (Mnih et al. 2015).

    Nothing else in these games is random: without it, all episodes of a policy would be the same.
    These steps are the game's alone: they count towards no time limit, and no state shows them.
    """

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        for _ in range(np.random.default_rng(seed).integers(NO_OPS + 1)):
            observation, *_, info = self.unwrapped.step(0)
        return observation, info


def preprocess_env(env):
    """Return an environment with states of four frames; one without a game's pictures stays."""
    if not shows_pictures(env.observation_space, env.unwrapped.spec.entry_point):
        return env
    env = NoOpStarts(env)
    env = gym.wrappers.TransformObservation(env, lambda picture: grey([picture])[0], FRAME)
    return gym.wrappers.FrameStackObservation(env, STACK)


def preprocess_data(dataset):
    """Return a MinariDataset with frames for pictures; one without a game's pictures stays."""
    recorded = json.loads(dataset.storage.metadata.get("env_spec") or "{}")
    if not shows_pictures(dataset.observation_space, recorded.get("entry_point")):
        return dataset
    import_games()
    return Frames(dataset)


class Frames:
    """A MinariDataset whose episodes are converted one by one, while they are read.

    Its space is that of states (4, 84, 84), but its episodes have frames (T, 84, 84): each frame is
    kept once, and the states are made from them when a batch is drawn.
    """

    observation_space = STATE

    def __init__(self, dataset):
        self.dataset = dataset

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def iterate_episodes(self, indices):
        for episode in self.dataset.iterate_episodes(indices):
            yield replace(episode, observations=grey(episode.observations))
