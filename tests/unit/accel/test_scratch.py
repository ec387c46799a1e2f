"""Memory that is used again."""

from threading import Thread

import torch

from kl_vae.accel.winograd import scratch


def test_one_use_has_one_piece_of_memory_and_grows() -> None:
    first = scratch("test", 2, 3)
    assert first.shape == (2, 3) and first.dtype == torch.float32
    assert scratch("test", 3, 2).data_ptr() == first.data_ptr()
    assert scratch("other", 2, 3).data_ptr() != first.data_ptr()
    large = scratch("test", 100)
    assert large.data_ptr() == scratch("test", 5).data_ptr()


def test_threads_have_their_own() -> None:
    found: list[torch.Tensor] = []
    own = scratch("test", 7)
    thread = Thread(target=lambda: found.append(scratch("test", 7)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != own.data_ptr()


def test_what_inference_mode_made_is_written_to_beyond_it() -> None:
    with torch.inference_mode():
        scratch("test of modes", 4).zero_()
    with torch.no_grad():
        assert scratch("test of modes", 4).add_(1.0).tolist() == [1.0] * 4
