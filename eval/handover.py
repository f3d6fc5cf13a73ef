"""A policy drives, then the expert takes over: demonstrations that begin where the policy gets to.

What a policy does after its own mistakes no scripted start shows: beside a missed apple the data
have no action. As in DAgger with human gates (Ross et al. 2011; Kelly et al. 2019) the labels are
the expert's from the handover on; what the policy did is not recorded.
"""

import numpy as np

from selfflow.datasets.spec import Observation, Task, UserError
from selfflow.envs.base import Info, RobotEnv
from selfflow.eval.rollout import actions_of
from selfflow.policies.base import Policy


def check_handover(task: Task, handover: list[int]) -> None:
    """Raises UserError unless it is [least, most] control steps within the task's limit."""
    if len(handover) != 2 or not 0 <= handover[0] <= handover[1] < task.max_steps:
        raise UserError(
            f"handover={handover}: must be [least, most], the control steps that the policy "
            f"drives, 0 to {task.max_steps - 1} for {task.name}"
        )


def drive(
    env: RobotEnv, policy: Policy, observation: Observation, info: Info, seed: int, steps: int
) -> tuple[Observation, Info, int]:
    """The policy acts from a reset for so many control steps, less where it ends the task, has
    success or says what is no number; what the expert finds then, and how many steps it was."""
    policy.reset(seed)
    done = 0
    while done < steps:
        for action, terminate in actions_of(policy.act(observation)):
            if done == steps or info["success"] or not np.all(np.isfinite(action)):
                return observation, info, done
            if terminate and env.final_subtask:
                return observation, info, done
            if terminate:
                observation = env.advance_subtask()
                break
            instruction = observation["instruction"]
            observation, _, _, _, info = env.step(action)
            done += 1
            if observation["instruction"] != instruction:
                break
    return observation, info, done
