import signal

import pytest

from vpo_engine.runs.signals import StopRequest

send = signal.raise_signal
"""Unlike os.kill, it returns only after this very thread has the signal."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_only_asks(number):
    with StopRequest() as stop:
        assert not stop.requested
        send(number)
        assert stop.requested
        assert stop.signal is number


def test_the_second_signal_insists():
    with StopRequest() as stop:
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="SIGINT after SIGTERM"):
            send(signal.SIGINT)
        assert stop.signal is signal.SIGTERM


def test_handlers_come_back_even_after_an_error():
    before = [signal.getsignal(number) for number in StopRequest.signals]
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert [signal.getsignal(number) for number in StopRequest.signals] == before


def test_a_signal_that_torchrun_repeats_is_one_signal(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    now = [100.0]
    monkeypatch.setattr("vpo_engine.runs.signals.time.monotonic", lambda: now[0])
    with StopRequest() as stop:
        for later in (0.0, 0.1, 4.9):
            now[0] = 100.0 + later
            send(signal.SIGINT)
        assert stop.signal is signal.SIGINT
        now[0] = 105.1
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)


def test_the_first_signal_is_acknowledged_at_once(capfd):
    with StopRequest(lambda name: f"{name}: stopping"):
        send(signal.SIGTERM)
        assert capfd.readouterr().err == "\nSIGTERM: stopping\n"
