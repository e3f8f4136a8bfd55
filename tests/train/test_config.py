"""Training settings: the schedule, and the combinations that cannot work."""

import pytest
from pydantic import ValidationError

from raydr.train.config import TrainConfig


def test_schedules():
    linear = TrainConfig(max_steps=100, learning_rate=1.0, warmup_share=0.1)
    assert [linear.learning_rate_at(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert linear.learning_rate_at(10) == 1.0
    assert linear.learning_rate_at(55) == pytest.approx(0.5)
    assert linear.learning_rate_at(99) == pytest.approx(1 / 90)
    cosine = TrainConfig(max_steps=100, learning_rate=1.0, warmup_share=0.0, schedule="cosine")
    assert cosine.learning_rate_at(0) == 1.0
    assert cosine.learning_rate_at(50) == pytest.approx(0.5)
    constant = TrainConfig(max_steps=10, learning_rate=1.0, warmup_share=0.0, schedule="constant")
    assert {constant.learning_rate_at(step) for step in range(10)} == {1.0}


def test_a_part_of_a_longer_schedule_has_its_rates():
    whole = TrainConfig(max_steps=300, learning_rate=1.0)
    part = TrainConfig(max_steps=100, schedule_steps=300, learning_rate=1.0)
    assert [part.learning_rate_at(step) for step in range(100)] == [whole.learning_rate_at(step) for step in range(100)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10, "num_workers": 4}, "take 8"),
        ({"batch_size": 1, "num_workers": 2}, "take 2"),
        ({"zero_stage": 0, "offload": "optimizer", "worker_gpus": 1}, "zero_stage to 1 or more"),
        ({"zero_stage": 0, "precision": "bfloat16"}, "zero_stage: 1"),
        ({"zero_stage": 2, "offload": "all", "worker_gpus": 1}, "zero_stage: 3"),
        ({"zero_stage": 2, "offload": "optimizer"}, "it is there already"),
        ({"num_workers": 2, "worker_gpus": 0.5}, "set worker_gpus: 1, or num_workers: 1"),
        ({"patience": 3}, "set evaluate_every"),
        ({"max_steps": 100, "schedule_steps": 50}, "must not be less"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**settings)


def test_one_worker_may_train_on_a_part_of_a_gpu():
    assert TrainConfig(worker_gpus=0.5).worker_gpus == 0.5
