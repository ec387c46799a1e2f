"""The errors of a run that cannot continue; a user's mistake is a ValueError."""


class RunError(RuntimeError):
    """A failure of a run for a reason outside of its config; the text names it and the fix.

    The command prints it as one line and exits with 1. Checkpoints saved before remain.
    """


class StorageError(RunError):
    """A failure of the storage of the images; the files themselves may be good."""
