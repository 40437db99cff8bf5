import signal

import numpy as np
import pytest
import torch
from torch import nn

from edgemix.errors import EdgemixError, InputError
from edgemix.export import training
from edgemix.export.training import Budget, Checkpoint, rate, train
from edgemix.progress import SILENT

WINDOWS = np.arange(40, dtype=np.int64).reshape(20, 2)


class Recorder:
    """A loss that is least at parameters of zero, and that keeps what it was given."""

    def __init__(self):
        torch.manual_seed(0)
        self.parameters = {"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(2, 2))}
        self.seen = []
        self.at_step = {}

    def __call__(self, ids):
        self.at_step.get(len(self.seen), lambda: None)()
        self.seen.append(ids.tolist())
        noise = torch.rand(())
        return sum((each**2).sum() for each in self.parameters.values()) * (1 + ids.float().mean() / 40 + noise)

    def train(self, steps=12, **options):
        return train(self, self.parameters, WINDOWS, budget=Budget(steps), batch=3, learning_rate=0.1, **options)


def test_the_loss_falls_and_every_window_comes_once_an_epoch():
    recorder = Recorder()
    start = recorder(torch.zeros(1)).item()
    recorder.seen.clear()
    state = recorder.train(steps=40)
    assert state.steps == 40
    assert state.loss < start / 3
    seen = [tuple(window) for step in recorder.seen for window in step]
    assert sorted(seen[:20]) == sorted(seen[20:40]) == [tuple(window) for window in WINDOWS.tolist()]
    assert seen[:20] != seen[20:40]


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    whole, parts = Recorder(), Recorder()
    expected = whole.train()
    parts.at_step = {5: interrupt}
    said = []
    progress = type(SILENT)()
    progress.say = said.append
    with pytest.raises(KeyboardInterrupt):
        parts.train(checkpoint=Checkpoint(tmp_path / "state", "key"), progress=progress)
    assert "stopped after 5 steps" in said[0]
    again = Recorder()
    state = again.train(checkpoint=Checkpoint(tmp_path / "state", "key"))
    assert again.seen == whole.seen[5:]
    assert (state.steps, state.loss) == (expected.steps, expected.loss)
    for name, parameter in whole.parameters.items():
        assert torch.equal(again.parameters[name], parameter)


def test_an_interrupt_waits_for_the_optimiser(tmp_path, monkeypatch):
    """Parameters updated without their moments would make a checkpoint that trains on wrongly."""
    step = torch.optim.AdamW.step

    def interrupted_step(self):
        interrupt()
        step(self)

    recorder = Recorder()
    before = {name: each.detach().clone() for name, each in recorder.parameters.items()}
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        recorder.train(checkpoint=Checkpoint(tmp_path / "state", "key"))
    monkeypatch.undo()
    assert not torch.equal(recorder.parameters["a"], before["a"])
    again = Recorder()
    again.train(checkpoint=Checkpoint(tmp_path / "state", "key"))
    assert len(again.seen) == 11
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("spoil", [lambda data: data[:-5], lambda data: b"", lambda data: b"\xff" * 64])
def test_a_damaged_checkpoint_is_started_over(tmp_path, spoil):
    recorder = Recorder()
    recorder.at_step = {3: interrupt}
    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        recorder.train(checkpoint=Checkpoint(path, "key"))
    path.write_bytes(spoil(path.read_bytes()))
    again = Recorder()
    again.train(checkpoint=Checkpoint(path, "key"))
    assert len(again.seen) == 12


def test_a_checkpoint_of_another_run_is_not_taken_up(tmp_path):
    recorder = Recorder()
    recorder.at_step = {3: interrupt}
    with pytest.raises(KeyboardInterrupt):
        recorder.train(checkpoint=Checkpoint(tmp_path / "state", "one text"))
    again = Recorder()
    again.train(checkpoint=Checkpoint(tmp_path / "state", "another text"))
    assert len(again.seen) == 12


def test_a_finished_run_is_not_trained_again(tmp_path):
    """What follows training can be interrupted too."""
    recorder, again = Recorder(), Recorder()
    state = recorder.train(checkpoint=Checkpoint(tmp_path / "state", "key"))
    assert again.train(checkpoint=Checkpoint(tmp_path / "state", "key")) == state
    assert not again.seen
    assert torch.equal(again.parameters["a"], recorder.parameters["a"])


def test_a_loss_that_is_no_number_ends_the_run():
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(EdgemixError, match="nan at step 0"):
        train(lambda ids: (parameter * torch.nan).sum(), {"p": parameter}, WINDOWS,
              budget=Budget(3), batch=2, learning_rate=1.0)  # fmt: skip


def test_the_random_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    recorder = Recorder()
    torch.manual_seed(7)
    recorder.train()
    assert torch.equal(torch.rand(3), expected)


def test_a_time_budget_ends_on_time_and_decays_all_the_way(monkeypatch):
    """Each step takes four seconds of a clock that runs as it is read; half a minute is eight of them."""
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    rates = []
    step = torch.optim.AdamW.step

    def recorded_step(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    recorder = Recorder()
    state = train(
        recorder, recorder.parameters, WINDOWS, budget=Budget(seconds=30), batch=3, learning_rate=1.0,
    )  # fmt: skip
    assert state.seconds == pytest.approx(30, abs=4)
    assert len(rates) == state.steps
    assert max(rates) > 0.9
    assert rates[-1] < 0.1


def test_the_budget_that_ends_first_counts():
    budget = Budget(steps=100, seconds=60)
    assert budget.used(50, 6) == 0.5
    assert budget.used(10, 30) == 0.5
    assert Budget(seconds=60).used(1_000, 90) == 1.5


@pytest.mark.parametrize("limits", [{}, {"steps": 0}, {"seconds": -1.0}, {"seconds": float("nan")}])
def test_a_budget_must_allow_something(limits):
    with pytest.raises(InputError):
        Budget(**limits)


def test_the_rate_rises_then_falls():
    rates = [rate(k / 200, k) for k in range(200)]
    top = rates.index(max(rates))
    assert 8 <= top <= 14
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] < 1e-3
    assert rate(1.2, 300) == 0
