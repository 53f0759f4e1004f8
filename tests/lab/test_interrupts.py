"""A signal is taken once, and never in the middle of what must not be torn."""

import signal

import pytest

from surefoot.lab.interrupts import Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_interrupts_and_names_its_exit_code(number, code):
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts:
        signal.raise_signal(number)
    assert interrupts.exit_code == code


def test_a_held_block_comes_to_its_end_first():
    done = []

    def work(interrupts):
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            done.append("the block")
        done.append("what follows it")

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        work(interrupts)
    assert done == ["the block"]


def test_an_error_in_a_held_block_is_not_hidden_by_the_signal():
    def work(interrupts):
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("disk")

    with Interrupts() as interrupts, pytest.raises(ValueError, match="disk"):
        work(interrupts)


def test_a_second_signal_does_not_interrupt_the_clearing_up():
    cleared = []
    with Interrupts() as interrupts:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            cleared.append(True)
    assert cleared
    assert interrupts.exit_code == 130


def test_the_handlers_before_are_back_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.signal is None
    finally:
        signal.signal(signal.SIGTERM, before)
