"""What the samplers promise for any number of ranks, micro-batches and steps."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kl_vae.data import StepSampler, permutation, validation_batches

sizes = st.integers(1, 5)
few = settings(max_examples=60, deadline=None)


@few
@given(micro=sizes, ranks=sizes, accumulation=sizes, extra=st.integers(0, 60), data=st.data())
def test_the_ranks_together_take_the_step_of_the_permutation(
    micro: int, ranks: int, accumulation: int, extra: int, data: st.DataObject
) -> None:
    total = micro * ranks * accumulation  # G
    count = total + extra
    step = data.draw(st.integers(0, 3 * (count // total)), label="step")
    epoch, offset = divmod(step, count // total)
    taken: dict[int, int] = {}
    for rank in range(ranks):
        batches = list(StepSampler(count, total, micro, rank, ranks, 7, step, step + 1))
        assert [len(batch) for batch in batches] == [micro] * accumulation
        for m, batch in enumerate(batches):
            for j, (key_epoch, index, position) in enumerate(batch):
                assert key_epoch == epoch
                assert position == m * ranks * micro + rank * micro + j
                assert position not in taken
                taken[position] = index
    order = permutation(7, epoch, count)[offset * total : (offset + 1) * total]
    assert [taken[position] for position in range(total)] == order.tolist()


@few
@given(
    micro=sizes,
    ranks=sizes,
    accumulation=sizes,
    extra=st.integers(0, 40),
    steps=st.integers(0, 12),
    start=st.integers(0, 12),
)
def test_resuming_yields_the_tail(
    micro: int, ranks: int, accumulation: int, extra: int, steps: int, start: int
) -> None:
    total = micro * ranks * accumulation
    rank = ranks - 1
    whole = StepSampler(total + extra, total, micro, rank, ranks, 3, 0, steps)
    resumed = StepSampler(total + extra, total, micro, rank, ranks, 3, start, steps)
    assert list(resumed) == list(whole)[start * accumulation :]
    assert len(resumed) == len(list(resumed))


@few
@given(count=st.integers(0, 50), batch=st.integers(1, 9), ranks=st.integers(1, 9))
def test_validation_takes_each_sample_once(count: int, batch: int, ranks: int) -> None:
    seen = []
    for rank in range(ranks):
        for keys in validation_batches(count, batch, rank, ranks):
            assert 1 <= len(keys) <= batch
            seen += keys
    assert sorted(seen) == [(0, index, index) for index in range(count)]
