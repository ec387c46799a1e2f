"""The processes that work together, and what is said when one of them is lost."""

from kl_vae.distributed.failures import COMMAND, TRAINING, Mends
from kl_vae.distributed.ranks import Ranks, connect

__all__ = ["COMMAND", "TRAINING", "Mends", "Ranks", "connect"]
