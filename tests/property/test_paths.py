"""A compact list of paths is as a list of them."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_vae.data import PathList, fingerprint
from kl_vae.data.paths import fingerprint_of, name_bytes

PATHS = st.lists(st.binary(max_size=12).map(lambda name: name.decode("utf-8", "surrogateescape")))


@given(PATHS, st.data())
def test_it_is_as_a_list(paths: list[str], data: st.DataObject) -> None:
    compact = PathList.of(paths)
    assert len(compact) == len(paths)
    assert list(compact) == paths == [compact[i] for i in range(len(paths))]
    assert list(reversed(compact)) == paths[::-1]
    assert list(compact.bytes_of_each()) == [name_bytes(path) for path in paths]
    piece = data.draw(st.slices(len(paths)))
    assert list(compact[piece]) == paths[piece]
    for outside in (len(paths), -len(paths) - 1):
        with pytest.raises(IndexError):
            compact[outside]
    if paths:
        assert compact[-1] == paths[-1]
        numbers = data.draw(st.lists(st.integers(0, len(paths) - 1)))
        assert list(compact.take(np.array(numbers, np.int64))) == [paths[i] for i in numbers]
    assert list(pickle.loads(pickle.dumps(compact))) == paths
    assert len(compact.block) == sum(map(len, map(name_bytes, paths)))


@given(PATHS)
def test_the_fingerprint_is_that_of_a_list(paths: list[str]) -> None:
    sizes = range(len(paths))
    assert fingerprint_of(PathList.of(paths), sizes) == fingerprint_of(paths, sizes)
    assert fingerprint_of([], []) == fingerprint(None, [])
