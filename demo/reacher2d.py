"""The paper's sparse task, as in the authors' code; importing this file registers it with Gymnasium."""

from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv


class Reacher2d(MujocoEnv):
    """Bring the fingertip of a two-link arm to a goal, and keep it there.

    Observation (12,): sin and cos of both angles, 0.15 * angular velocities, x and y of the fingertip, of the goal, and
    of the fingertip minus the goal. Action (2,): torques in [-1, 1]. Reward 1 in each step that ends with
    |dx| + |dy| < 0.1 m between fingertip and goal, else 0. An episode has 100 steps of 0.15 s.
    """

    metadata = {
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"],
        "render_fps": 7,
    }

    def __init__(self, **kwargs):
        model = Path(__file__).resolve().with_suffix(".xml")
        space = gym.spaces.Box(-np.inf, np.inf, (12,), np.float64)
        super().__init__(
            str(model), frame_skip=15, observation_space=space, camera_name="top", **kwargs
        )

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
        angles, tip, goal = (
            self.data.qpos,
            self.data.site("fingertip").xpos[:2],
            self.data.body("goal").xpos[:2],
        )
        return np.concatenate(
            [np.sin(angles), np.cos(angles), self.dt * self.data.qvel, tip, goal, tip - goal]
        )


gym.register("lamo/Reacher2d-v0", entry_point="demo.reacher2d:Reacher2d", max_episode_steps=100)
