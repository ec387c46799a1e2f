"""The error of a run that cannot go on; what a user got wrong is a ValueError."""


class RunError(RuntimeError):
    """A run ended for a reason outside of its config; the text says which, and what to do.

    The command prints it as one line and exits with 1. What was saved before is there.
    """
