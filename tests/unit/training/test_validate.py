"""Validation (tests/distributed checks that it is exact for any number of ranks)."""

from torch import nn

from kl_vae.training.validate import evaluating


def test_evaluating_restores_the_mode() -> None:
    module = nn.Dropout()
    for mode in (True, False):
        module.train(mode)
        with evaluating(module):
            assert not module.training
        assert module.training == mode
