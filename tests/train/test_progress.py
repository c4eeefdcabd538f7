"""What a training says where nobody watches a bar: in a log file."""

from types import SimpleNamespace

import pytest

from trimkv.cli.training_progress import duration, lines


class Run:
    """A training of 100 steps of two seconds, as its callback sees it."""

    def __init__(self, capsys, start=0):
        self.now, self.capsys = 1000.0, capsys
        self.callback = lines(100, 8192, clock=lambda: self.now)
        self.args = SimpleNamespace(output_dir="out")
        self.callback.on_train_begin(self.args, SimpleNamespace(global_step=start), None)

    def step(self, number, save=False):
        self.now += 2.0
        state = SimpleNamespace(global_step=number)
        self.callback.on_log(self.args, state, None, {"loss": 1.0, "kl": 0.5, "capacity": 0.25, "occupancy": 1.17})
        if save:
            self.callback.on_save(self.args, state, None)

    def said(self):
        return self.capsys.readouterr().err.splitlines()


def test_a_line_at_the_start_every_ten_seconds_and_at_the_end(capsys):
    run = Run(capsys)
    assert run.said() == ["trimkv: training 100 steps of 8,192 tokens"]
    for number in range(1, 101):
        run.step(number)
    said = run.said()
    steps = [int(line.split()[2].split("/")[0]) for line in said]
    assert steps == [1, *range(6, 100, 5), 100]
    line = "trimkv: step 26/100  kl 0.5000  capacity 0.2500  retained 1.17 x budget  0.5 steps/s  "
    assert said[5].startswith(line) and said[5].endswith("2 min left")
    assert said[-1].endswith("0 s left")


def test_checkpoints_are_said_with_the_step_they_are_of(capsys):
    run = Run(capsys, start=40)
    assert run.said() == ["trimkv: training 100 steps of 8,192 tokens, going on after step 40"]
    run.step(41)
    run.step(42, save=True)
    first, step, written = run.said()
    assert "step 41/100" in first and "0.5 steps/s" in first, "the steps before the resumption took no time now"
    assert "step 42/100" in step and written == "trimkv: checkpoint written: out/checkpoint-42"


@pytest.mark.parametrize(
    "seconds, said", [(4.4, "4 s"), (99, "99 s"), (120, "2 min"), (5999, "100 min"), (7200, "2.0 h")]
)
def test_time_left_is_short(seconds, said):
    assert duration(seconds) == said
