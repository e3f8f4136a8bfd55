"""Contrastive training whose batches are the examples in their order: for comparing trainers, not for training."""

from itertools import count

from raydr.methods.contrastive import Contrastive
from raydr.train.sampling import Group


class FileOrder:
    """Consecutive examples, each with its first positive and all its negatives."""

    def __init__(self, examples, batch_size):
        self._examples, self._batch_size = examples, batch_size

    def __iter__(self):
        for number in count():
            rows = [(number * self._batch_size + place) % len(self._examples) for place in range(self._batch_size)]
            yield [
                Group(row, (int(self._examples.positives(row)[0]), *map(int, self._examples.negatives(row))))
                for row in rows
            ]


class InOrder(Contrastive):
    def build_batches(self, examples, *, batch_size, seed):
        return FileOrder(examples, batch_size)
