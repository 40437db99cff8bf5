import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.quadratic import WINDOWS, Quadratic
from torch import nn

from edgemix.errors import EdgemixError, InputError
from edgemix.export.training import loop
from edgemix.export.training.checkpoints import Checkpoint
from edgemix.export.training.loop import TrainingBudget, Validation, learning_rate_factor, train
from edgemix.progress import NO_PROGRESS


class Recorder:
    """A loss that is minimal at zero parameters, and that records its inputs."""

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
        return train(
            self, self.parameters, WINDOWS, budget=TrainingBudget(steps), batch=3, learning_rate=0.1, **options
        )


def test_the_loss_falls_and_each_epoch_has_every_window_once():
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


def test_an_interrupted_run_gives_the_same_result(tmp_path):
    whole, parts = Recorder(), Recorder()
    expected = whole.train()
    parts.at_step = {5: interrupt}
    said = []
    progress = type(NO_PROGRESS)()
    progress.log = said.append
    with pytest.raises(KeyboardInterrupt):
        parts.train(checkpoint=Checkpoint(tmp_path / "state", "key"), progress=progress)
    assert "stopped after 5 steps" in said[0]
    again = Recorder()
    state = again.train(checkpoint=Checkpoint(tmp_path / "state", "key"))
    assert again.seen == whole.seen[5:]
    assert (state.steps, state.loss) == (expected.steps, expected.loss)
    for name, parameter in whole.parameters.items():
        assert torch.equal(again.parameters[name], parameter)


def test_an_interrupt_is_deferred_until_the_optimizer_step_ends(tmp_path, monkeypatch):
    """Parameters updated without their moments would make a wrong checkpoint."""
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


def test_changes_after_a_step_are_checkpointed(tmp_path):
    """An interrupted step changes nothing, and counts once when it is repeated."""
    counts = []
    for steps in (None, 5):
        recorder = Recorder()
        count = recorder.parameters["count"] = torch.zeros(1)
        checkpoint = Checkpoint(tmp_path / str(steps), "key")
        if steps:
            recorder.at_step = {steps: interrupt}
            with pytest.raises(KeyboardInterrupt):
                recorder.train(checkpoint=checkpoint, after_step=count.add_)
            recorder.at_step.clear()
            count.fill_(99)
        recorder.train(checkpoint=checkpoint, after_step=count.add_)
        counts.append(count.item())
    assert counts == [sum(range(1, 13))] * 2


@pytest.mark.parametrize("spoil", [lambda data: data[:-5], lambda data: b"", lambda data: b"\xff" * 64])
def test_a_damaged_checkpoint_is_ignored(tmp_path, spoil):
    recorder = Recorder()
    recorder.at_step = {3: interrupt}
    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        recorder.train(checkpoint=Checkpoint(path, "key"))
    path.write_bytes(spoil(path.read_bytes()))
    again = Recorder()
    again.train(checkpoint=Checkpoint(path, "key"))
    assert len(again.seen) == 12


def test_a_checkpoint_with_another_key_is_ignored(tmp_path):
    recorder = Recorder()
    recorder.at_step = {3: interrupt}
    with pytest.raises(KeyboardInterrupt):
        recorder.train(checkpoint=Checkpoint(tmp_path / "state", "one text"))
    again = Recorder()
    again.train(checkpoint=Checkpoint(tmp_path / "state", "another text"))
    assert len(again.seen) == 12


def test_a_finished_run_is_not_trained_again(tmp_path):
    """Work after training can be interrupted, too."""
    recorder, again = Recorder(), Recorder()
    state = recorder.train(checkpoint=Checkpoint(tmp_path / "state", "key"))
    assert again.train(checkpoint=Checkpoint(tmp_path / "state", "key")) == state
    assert not again.seen
    assert torch.equal(again.parameters["a"], recorder.parameters["a"])


def test_a_nan_loss_ends_the_run():
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(EdgemixError, match="nan at step 0"):
        train(lambda ids: (parameter * torch.nan).sum(), {"p": parameter}, WINDOWS,
              budget=TrainingBudget(3), batch=2, learning_rate=1.0)  # fmt: skip


def test_the_global_random_generator_is_unchanged():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    recorder = Recorder()
    torch.manual_seed(7)
    recorder.train()
    assert torch.equal(torch.rand(3), expected)


def test_a_time_budget_ends_on_time_with_full_decay(monkeypatch):
    """Each step takes four seconds of a clock that advances when it is read; half a minute has eight steps."""
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    rates = []
    step = torch.optim.AdamW.step

    def recorded_step(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    recorder = Recorder()
    state = train(
        recorder, recorder.parameters, WINDOWS, budget=TrainingBudget(seconds=30), batch=3, learning_rate=1.0,
    )  # fmt: skip
    assert state.seconds == pytest.approx(30, abs=4)
    assert len(rates) == state.steps
    assert max(rates) > 0.9
    assert rates[-1] < 0.1


def test_the_limit_reached_first_ends_the_budget():
    budget = TrainingBudget(steps=100, seconds=60)
    assert budget.used(50, 6) == 0.5
    assert budget.used(10, 30) == 0.5
    assert TrainingBudget(seconds=60).used(1_000, 90) == 1.5


@pytest.mark.parametrize("limits", [{}, {"steps": 0}, {"seconds": -1.0}, {"seconds": float("nan")}])
def test_a_budget_needs_a_limit_above_zero(limits):
    with pytest.raises(InputError):
        TrainingBudget(**limits)


def test_the_learning_rate_rises_then_falls():
    rates = [learning_rate_factor(k / 200, k) for k in range(200)]
    top = rates.index(max(rates))
    assert 8 <= top <= 14
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] < 1e-3
    assert learning_rate_factor(1.2, 300) == 0


def test_accumulated_gradients_equal_a_larger_batch():
    whole, parts = Quadratic(), Quadratic()
    expected = whole.train()
    state = parts.train(batch=2, accumulate=3)
    assert state.loss == pytest.approx(expected.loss)
    torch.testing.assert_close(parts.parameters["p"], whole.parameters["p"])
    assert state.steps == 9


def test_training_stops_early_with_the_best_parameters():
    """The validation loss falls, then rises: training ends, with the parameters that were best."""
    run, seen = Quadratic(), []
    losses = [6.0, 5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 0.0]

    def measure():
        seen.append(run.parameters["p"].detach().clone())
        return losses[len(seen) - 1]

    state = run.train(40, validation=Validation(measure, times=10, patience=3))
    assert (state.steps, state.best, state.stale) == (24, 3.0, 3)
    assert torch.equal(run.parameters["p"], seen[3])
    assert not torch.equal(seen[3], seen[6])


def test_training_that_only_makes_it_worse_changes_nothing():
    """A student with an initial held-out loss of 0.6 was kept at 3.1."""
    run, losses = Quadratic(), [0.6]
    start = run.parameters["p"].detach().clone()
    state = run.train(4, validation=Validation(lambda: losses.append(losses[-1] + 1) or losses[-1], times=4))
    assert state.steps == 4
    assert torch.equal(run.parameters["p"], start)


def test_the_last_step_is_validated():
    run, seen = Quadratic(), []
    run.train(7, validation=Validation(lambda: -float(len(seen.append(0) or seen)), times=3))
    assert len(seen) == 4
    plain = Quadratic()
    plain.train(7)
    assert torch.equal(run.parameters["p"], plain.parameters["p"])


@pytest.mark.parametrize("at", [2, 5, 6])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_interruption_with_validation_and_8_bit_moments(tmp_path, at, eight_bit):
    """The checkpoint has the best parameters: a resumed run may never find better ones."""

    def go(run, checkpoint=None, stop=None):
        calls = []

        def before(used):
            calls.append(used)
            if used == stop:
                interrupt()

        # Least in the middle of the run, so that the best lies before some of the interruptions.
        validation = Validation(lambda: abs(run.parameters["p"].norm().item() - 60), times=8, patience=9)
        return run.train(8, eight_bit=eight_bit, validation=validation, checkpoint=checkpoint, before_step=before)

    whole, parts, again = (Quadratic(8192) for _ in range(3))
    expected = go(whole)
    with pytest.raises(KeyboardInterrupt):
        go(parts, Checkpoint(tmp_path / "state", "key"), stop=at / 8)
    state = go(again, Checkpoint(tmp_path / "state", "key"))
    assert (state.steps, state.loss, state.best) == (expected.steps, expected.loss, expected.best)
    assert torch.equal(again.parameters["p"], whole.parameters["p"])


def test_8_bit_moments_train_as_well():
    run = Quadratic(8192)
    before = run(torch.from_numpy(WINDOWS)).item()
    run.train(30, eight_bit=True)
    assert run(torch.from_numpy(WINDOWS)).item() < 0.2 * before


_WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from helpers.quadratic import Quadratic
from edgemix.export.training.loop import Validation
workers = Accelerator(cpu=True)
run = Quadratic()
state = run.train(batch=3, accelerator=workers, validation=Validation(lambda: 1.0, times=3, patience=2))
if workers.is_main_process:
    torch.testing.assert_close(run.parameters["p"].detach().tolist(), [float(x) for x in sys.argv[2].split()])
    print(workers.num_processes, state.steps, round(state.loss, 5))
workers.end_training()
left = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in left), left  # a thread that outlives the interpreter aborts the process
"""


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """Processes as accelerate launches them, with their ranks in the environment."""
    whole = Quadratic()
    expected = whole.train(validation=Validation(lambda: 1.0, times=3, patience=2))
    values = " ".join(map(str, whole.parameters["p"].tolist()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                           "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "-c", _WORKER, str(Path(__file__).parents[2]), values]
    processes = [
        subprocess.Popen(command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    first, _ = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first[0].split() == ["2", str(expected.steps), str(round(expected.loss, 5))]
