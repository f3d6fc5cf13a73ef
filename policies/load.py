"""`from selfflow.policies.load import load`: a trained policy from a robot bundle, in any process.

policy = load("outputs/bundle")
policy.reset(seed=0)
chunk = policy.act(observation)   # selfflow.datasets.spec says what goes in and comes out
"""

from pathlib import Path
from typing import Any

from selfflow.datasets.spec import UserError
from selfflow.policies.flow_policy import FlowPolicy, load_policy
from selfflow.policies.joint_policy import JointPolicy
from selfflow.worldmodel.checkpoint import CheckpointError, read_json, resolve


def load(
    path: str | Path, embodiment: str | None = None, seed: int = 0, **decoding: Any
) -> FlowPolicy | JointPolicy:
    """The policy of a bundle, a checkpoint or a run folder; `decoding` as of load_policy.

    Without `embodiment` it is the only one that the policy has statistics of. Raises UserError.
    """
    if embodiment is None:
        try:
            known = list(read_json(resolve(path) / "stats.json"))
        except CheckpointError as e:
            raise UserError(str(e)) from e
        if len(known) != 1:
            raise UserError(f"{path} acts on several robots; embodiment: one of {', '.join(known)}")
        embodiment = known[0]
    return load_policy(path, embodiment, seed, **decoding)
