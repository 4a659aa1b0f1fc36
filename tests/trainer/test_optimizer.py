"""The guard of the optimizer: a spike is skipped, a new level of the gradient norm is accepted."""

import pytest
import torch

from tarflow.trainer.config.schema import TrainConfig
from tarflow.trainer.optimizer import WARMUP, WINDOW, GuardedAdamW

PATIENCE = TrainConfig.model_fields["max_skipped_in_a_row"].default


def guarded(grad_clip: float = 0.0, skip_spikes: bool = True) -> GuardedAdamW:
    return GuardedAdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0,
                        grad_clip=grad_clip, skip_spikes=skip_spikes)  # fmt: skip


def feed(optimizer: GuardedAdamW, norms: list[float]) -> list[bool]:
    """Take a step for each norm; which were skipped."""
    passed_over = []
    for norm in norms:
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([norm])
        optimizer.step()
        passed_over.append(bool(optimizer.skipped_in_a_row))
    return passed_over


def around(level: float, count: int, spread: float = 0.02) -> list[float]:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(count)).clamp(-2, 2)
    return (level * (1 + spread * noise)).tolist()


@pytest.mark.parametrize("level", [1.15, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.case("V02b")
def test_a_new_level_is_accepted_before_the_run_would_be_ended(level: float, grad_clip: float) -> None:
    optimizer = guarded(grad_clip)
    assert not any(feed(optimizer, around(1.0, 150)))
    found = feed(optimizer, around(level, 200))
    assert sum(found) < PATIENCE
    assert found == sorted(found, reverse=True)  # skipped for a while, then never again
    assert feed(optimizer, [40 * level]) == [True]


@pytest.mark.case("V02b")
def test_15_percent_is_no_spike_where_norms_hardly_vary() -> None:
    for spread in (0.0, 0.001, 0.02):
        optimizer = guarded()
        assert not any(feed(optimizer, around(1.0, 100, spread) + around(1.15, 100, spread)))


@pytest.mark.case("V02b")
def test_one_spike_moves_the_threshold_little_and_each_of_several_is_passed_over() -> None:
    optimizer = guarded()
    feed(optimizer, around(1.0, 100))
    before = float(optimizer._highest_ordinary_norm())
    assert feed(optimizer, [1e6]) == [True]
    assert float(optimizer._highest_ordinary_norm()) < 1.1 * before
    for _ in range(4):
        assert not any(feed(optimizer, around(1.0, 40)))
        assert feed(optimizer, [1e6]) == [True]


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
@pytest.mark.case("V02b")
def test_what_is_not_finite_is_not_remembered(norm: float) -> None:
    optimizer = guarded()
    feed(optimizer, around(1.0, 100))
    before = {name: value.clone() for name, value in optimizer.guard_state().items()}
    assert feed(optimizer, [norm] * 300) == [True] * 300
    after = optimizer.guard_state()
    assert torch.equal(after["norms"], before["norms"])
    assert torch.equal(after["remembered"], before["remembered"])
    assert after["skipped_in_a_row"] == after["skipped_steps"] == 300
    assert feed(optimizer, [1.0]) == [False]


@pytest.mark.case("V02b")
def test_norms_that_are_always_above_the_clip_are_no_spikes_and_those_far_out_are() -> None:
    optimizer = guarded(grad_clip=1.0)
    assert not any(feed(optimizer, around(5.0, 100) + around(5.75, 100) + around(15.0, 100)))
    assert feed(optimizer, [1e5]) == [True]


@pytest.mark.case("V02b")
def test_spikes_are_not_looked_for_unless_asked_and_not_before_there_is_a_measure() -> None:
    assert not any(feed(guarded(skip_spikes=False), [1.0] * 100 + [1e6]))
    assert not any(feed(guarded(), [1.0] * (WARMUP - 1) + [1e6]))


@pytest.mark.case("V02b")
def test_a_restored_guard_decides_as_the_one_that_was_saved() -> None:
    optimizer, again = guarded(), guarded()
    feed(optimizer, around(1.0, WINDOW) + [3.0] * 5)
    for name, value in optimizer.guard_state().items():
        again.guard_state()[name].copy_(value)
    rest = around(3.0, 60)
    assert feed(again, rest) == feed(optimizer, rest)
    assert all(torch.equal(value, again.guard_state()[name]) for name, value in optimizer.guard_state().items())
