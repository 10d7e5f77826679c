import os
import signal
import time

import pytest

from vpo_engine.runs.signals import StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


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
