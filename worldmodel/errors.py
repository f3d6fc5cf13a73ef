"""What a user can do wrong with a run, as one line; entry points turn it into UserError."""


class RunError(Exception):
    """A user's mistake about runs: what is wrong, the choices, the cure."""


class CheckpointError(RunError):
    """A checkpoint is missing, incomplete, or of another kind."""
