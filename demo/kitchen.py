"""A script that does subtasks of FrankaKitchen, one after the other."""

import math

import mujoco
import numpy as np

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
    POSTURE = np.array(
        [0.15, -1.5, 1.84, -2.48, 0.26, 0.71, 1.6]
    )  # joint angles, nearly those of the start

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
            inverse = moving.T @ np.linalg.inv(
                moving @ moving.T + 1e-3 * np.eye(6)
            )  # damped least squares
            null_space = (
                np.eye(7) - inverse @ moving
            )  # what does not move the hand keeps the arm in its posture
            return inverse @ np.append(velocity, rotation) + null_space @ (
                3 * (self.POSTURE - data.qpos[:7])
            )

        low, high = model.jnt_range[:7].T
        reached = data.qpos[:7] + 2 * dt * joint_velocities(np.ones(7))
        velocities = joint_velocities((low < reached) & (reached < high))
        against_gravity = data.qfrc_bias[:7] / model.actuator_gainprm[:7, 0] / dt
        action = np.append(
            (velocities + against_gravity) / 2, [fingers, fingers]
        )  # 2 rad/s are an action of 1
        return action + self.noise * self.rng.standard_normal(9)
