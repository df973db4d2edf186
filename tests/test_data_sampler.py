from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vidtrl.data import BucketSampler


buckets_lists = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(buckets_lists, st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**9), st.booleans(), st.integers(0, 3))
def test_properties(buckets, batch_size, num_processes, seed, shuffle, epoch):
    sampler = BucketSampler(buckets, batch_size, num_processes, seed=seed, shuffle=shuffle)
    sampler.set_epoch(epoch)
    order = list(sampler)
    group = batch_size * num_processes
    assert len(order) == len(sampler) and len(order) % group == 0
    for i in range(0, len(order), group):
        assert len({buckets[j] for j in order[i : i + group]}) == 1  # one shape per step, on all processes
    seen = Counter(order)
    assert set(seen) == set(range(len(buckets)))  # no clip is left out
    for bucket, n in Counter(buckets).items():
        extra = sum(seen[i] for i in range(len(buckets)) if buckets[i] == bucket) - n
        assert 0 <= extra < group
        times = [seen[i] for i in range(len(buckets)) if buckets[i] == bucket]
        assert max(times) - min(times) <= 1  # the fill is spread evenly
    assert order == list(sampler)
    again = BucketSampler(buckets, batch_size, num_processes, seed=seed, shuffle=shuffle)
    again.set_epoch(epoch)
    assert order == list(again)


def test_epochs_and_seeds_differ():
    orders = set()
    for seed in (0, 1):
        sampler = BucketSampler([0] * 50, 2, seed=seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 4


def test_no_shuffle_keeps_the_order():
    assert list(BucketSampler([0, 1, 0, 0, 1], 2, shuffle=False))[:3] == [0, 2, 3]
    assert list(BucketSampler([0, 0, 0, 0], 2, shuffle=False)) == [0, 1, 2, 3]


def test_empty_and_wrong():
    assert list(BucketSampler([], 2)) == [] and len(BucketSampler([], 2)) == 0
    with pytest.raises(ValueError, match="must be positive"):
        BucketSampler([0], 0)


def test_accelerate_sets_the_epoch():
    loader = DataLoader(torch.arange(20), batch_size=2, sampler=BucketSampler([0] * 20, 2))
    loader = Accelerator(cpu=True).prepare(loader)
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(torch.cat(list(loader)).tolist())
    assert epochs[0] == epochs[2] != epochs[1]
