"""A game with pictures and discrete actions; importing this file registers it with Gymnasium."""

import gymnasium as gym
import numpy as np

SIZE, PADDLE, BALLS = 10, 2, 10  # cells in a row and in a column, cells of the paddle, balls
COLOURS = {0: (64, 99, 216), 2: (214, 214, 214), 1: (203, 60, 51)}  # of the channels, in order


class Catch(gym.Env):
    """Catch ten balls, which come one after the other, with a paddle in the bottom row.

    Observation (10, 10, 3), uint8, 0 or 255: the two cells of the paddle, the ball, and where the
    ball was a step before. Actions: 0 moves the paddle a cell to the left, 1 leaves it, 2 moves it
    to the right. A ball comes from any column of the top row. In a step it falls by one row and
    moves by one or two columns, and bounces off the side walls. Reward 1 in a step that ends with
    the ball on the paddle, else 0. The next step brings the next ball. An episode has 89 steps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(3)
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.paddle = int(self.np_random.integers(SIZE - PADDLE + 1))  # its left cell
        self.landed = 0
        self._throw()
        return self._observation(), {}

    def step(self, action):
        self.paddle = min(max(self.paddle + int(action) - 1, 0), SIZE - PADDLE)
        if self.row == SIZE - 1:
            self._throw()
        else:
            self._fall()
        lands = self.row == SIZE - 1
        self.landed += lands
        caught = lands and self.paddle <= self.column < self.paddle + PADDLE
        return self._observation(), float(caught), self.landed == BALLS, False, {}

    def render(self):
        """Return a picture (200, 200, 3), uint8."""
        picture = np.full((SIZE, SIZE, 3), 255, np.uint8)
        observation = self._observation()
        for channel, colour in COLOURS.items():
            picture[observation[..., channel] > 0] = colour
        return picture.repeat(20, axis=0).repeat(20, axis=1)

    def _throw(self):
        """Start a ball. It falls to the second row at once, so that its picture tells where to."""
        self.row, self.column = 0, int(self.np_random.integers(SIZE))
        self.speed = int(self.np_random.choice([-2, -1, 1, 2]))  # columns a step
        self._fall()

    def _fall(self):
        self.before = self.row, self.column
        self.row, self.column = self.row + 1, self.column + self.speed
        if not 0 <= self.column < SIZE:
            self.speed = -self.speed
            self.column = SIZE - 1 - abs(SIZE - 1 - abs(self.column))  # as in a mirror

    def _observation(self):
        observation = np.zeros((SIZE, SIZE, 3), np.uint8)
        observation[-1, self.paddle : self.paddle + PADDLE, 0] = 255
        observation[self.row, self.column, 1] = 255
        observation[(*self.before, 2)] = 255
        return observation


gym.register("lamo/Catch-v0", entry_point="demo.catch:Catch")
