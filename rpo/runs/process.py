"""What befalls a run from outside: a signal, a step that never ends, memory that runs out."""

import signal

# Ctrl-C; a scheduler's; what SLURM's --signal is told to send; a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Interrupt:
    """From `defer` on the first of SIGNALS sets `received`, for the loop to end after the step in hand.

    Before, it raises KeyboardInterrupt(signum) at once: while models load and the reference is scored nothing is there to
    be saved. Ctrl-C after any of them raises at once too; schedulers repeat theirs, which changes nothing.
    """

    received = 0  # the signal's number

    def __enter__(self) -> "Interrupt":
        under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [signum for signum in SIGNALS if not (under_nohup and signum == signal.SIGHUP)]
        self.before = {signum: signal.signal(signum, self._raise) for signum in heard}
        return self

    def defer(self) -> None:
        for signum in self.before:
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, _frame: object) -> None:
        self.received = self.received or signum
        signal.signal(signal.SIGINT, self._raise)

    def _raise(self, signum: int, _frame: object) -> None:
        raise KeyboardInterrupt(signum)

    def __exit__(self, *_exc: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
