"""The forward process."""

import pytest
import torch

from mdu_trainer.masking import MaskSchedule, corrupt, counter_uniform, permutation

MASK = 99


@pytest.fixture
def batch():
    input_ids = torch.arange(24).view(3, 8) % 90
    attention_mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2, [1] * 4 + [0] * 4])
    response_mask = torch.tensor([[0] * 3 + [1] * 5, [0] * 4 + [1] * 2 + [0] * 2, [0] * 3 + [1] + [0] * 4])
    return input_ids, response_mask, attention_mask


def test_masks_where_noise_is_below_t(batch):
    input_ids, response_mask, attention_mask = batch
    noise = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5, 0.9, 0.999])
    noisy, masked, times, anchor = corrupt(*batch, MASK, t=t, noise=noise)
    response = response_mask.bool()
    rows_that_drew = (response & (noise < t[:, None])).any(1)
    assert torch.equal(masked[rows_that_drew], (response & (noise < t[:, None]))[rows_that_drew])
    assert torch.equal(times, t)
    assert (noisy[masked] == MASK).all() and torch.equal(noisy[~masked], input_ids[~masked])
    prompt = attention_mask.bool() & ~response
    assert (anchor[prompt] == MASK).all()
    assert torch.equal(anchor[~prompt], noisy[~prompt]), "padding and response are as in noisy_ids"


def test_every_row_masks_at_least_one_response_token(batch):
    noise = torch.full((3, 8), 0.5)
    noise[0, 4] = noise[1, 5] = 0.4
    noise[:, 0] = 0.0  # prompts are never chosen
    corruption = corrupt(*batch, MASK, t=torch.zeros(3), noise=noise)
    assert corruption.masked.nonzero().tolist() == [[0, 4], [1, 5], [2, 3]]


def test_t_of_one_masks_the_whole_response(batch):
    corruption = corrupt(*batch, MASK, t=torch.ones(3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(corruption.masked, batch[1].bool())


def test_draws_come_from_the_generator_and_respect_epsilon(batch):
    many = [x.repeat(2000, 1) for x in batch]
    first = corrupt(*many, MASK, generator=torch.Generator().manual_seed(3), time_epsilon=0.2)
    again = corrupt(*many, MASK, generator=torch.Generator().manual_seed(3), time_epsilon=0.2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert 0.2 <= first.t.min() < 0.21 and 0.99 < first.t.max() <= 1
    shares = first.masked[::3].sum(1) / 5
    assert shares.mean().item() == pytest.approx(0.6, abs=0.02)


def test_padding_marked_as_response_is_not_masked():
    input_ids, attention = torch.ones(1, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 0]])
    corruption = corrupt(input_ids, torch.tensor([[0, 1, 1, 1]]), attention, MASK, t=torch.ones(1))
    assert corruption.masked.tolist() == [[False, True, False, False]]


def test_counter_uniform_is_uniform_and_pinned():
    u = counter_uniform(0, torch.arange(1000)[:, None], torch.arange(200)[None, :])
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=2e-3) and u.var().item() == pytest.approx(1 / 12, abs=1e-3)
    columns = u - u.mean()
    assert (columns[:, :-1] * columns[:, 1:]).mean().abs() < 1e-3, "neighbouring positions are independent"
    assert (columns[:-1] * columns[1:]).mean().abs() < 1e-3, "neighbouring rows are independent"
    # a change of these figures changes every run
    assert counter_uniform(7, torch.tensor([1, 2]), torch.tensor([3])).tolist() == pytest.approx(PINNED, abs=1e-7)


PINNED = [0.10298925638198853, 0.4008045792579651]


def test_schedule_is_a_function_of_seed_stream_visit_and_row():
    schedule = MaskSchedule(0, "forget", 10)
    visit, row = torch.tensor([0, 0, 1]), torch.tensor([4, 7, 4])
    noise, times = schedule.noise(visit, row, 6), schedule.times(visit, row)
    alone = schedule.noise(visit[2:], row[2:], 9)
    assert torch.equal(alone[:, :6], noise[2:]), "neither batch nor length matters"
    assert torch.equal(schedule.times(visit[2:], row[2:]), times[2:])
    assert not torch.equal(noise[0], noise[2]) and times[0] != times[2]
    for other in (MaskSchedule(1, "forget", 10), MaskSchedule(0, "retain", 10)):
        assert not torch.equal(other.noise(visit, row, 6), noise)
        assert not torch.equal(other.times(visit, row), times)


@pytest.mark.parametrize("num_rows", [1, 7, 400])
def test_times_are_spread_evenly_over_each_visit(num_rows):
    schedule = MaskSchedule(5, "forget", num_rows, time_epsilon=1e-6)
    row = torch.arange(num_rows)
    for visit in range(3):
        times = schedule.times(torch.full((num_rows,), visit), row)
        assert (times * num_rows).long().clamp(max=num_rows - 1).sort().values.tolist() == list(range(num_rows))
    if num_rows > 1:
        assert not torch.equal(schedule.times(row * 0, row), schedule.times(row * 0 + 1, row))


def test_range_of_times():
    visit, row = torch.zeros(50, dtype=torch.long), torch.arange(50)
    assert (MaskSchedule(0, "a", 50, t_min=1.0, t_max=1.0).times(visit, row) == 1).all()
    times = MaskSchedule(0, "a", 50, t_min=0.2, t_max=0.4).times(visit, row)
    assert times.min() >= 0.2 and times.max() <= 0.4
    assert MaskSchedule(0, "a", 50, time_epsilon=0.05).times(visit, row).min() >= 0.05


def test_permutation_is_a_shuffle_that_changes_with_visit_and_seed():
    first = permutation(0, 0, 100)
    assert sorted(first.tolist()) == list(range(100))
    assert not torch.equal(first, permutation(0, 1, 100)) and not torch.equal(first, permutation(1, 0, 100))
    assert torch.equal(first, permutation(0, 0, 100))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_are_alike_on_the_gpu():
    schedule, visit, row = MaskSchedule(3, "forget", 64), torch.zeros(64, dtype=torch.long), torch.arange(64)
    assert torch.equal(schedule.noise(visit.cuda(), row.cuda(), 100).cpu(), schedule.noise(visit, row, 100))
