"""Ctrl-C while the model works."""

import signal

import pytest

from trimkv.cli.ctrl_c import stoppable


@pytest.fixture(autouse=True)
def ctrl_c_counts():
    """Also where the tests run in the background of a shell that ignores it for them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    signal.raise_signal(signal.SIGINT)


def test_impatience_does_not_cost_the_conversation(capfd):
    """One step of a large model can take half a minute, and a second Ctrl-C comes easily meanwhile."""
    with stoppable(patient=True) as stopped:
        assert not stopped()
        press()
        assert stopped() and capfd.readouterr().err == ""
        press()
        assert "Ctrl-C once more ends the program" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            press()
    with pytest.raises(KeyboardInterrupt):
        press()  # as before


def test_where_nobody_types_the_second_one_ends_the_program():
    with stoppable(patient=False) as stopped:
        press()
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            press()
