"""How a job ends for the shell: signals, exit codes, one line for what a user can fix."""

import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from rpo.errors import UserError
from rpo.text import redacted

# Ctrl-C; a scheduler's; what SLURM's --signal sends; a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def _naming_determinism() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operator = str(error).split()[0]
        raise UserError(f"deterministic=true: {operator} has no deterministic form here; set it to false") from None


def outcome(job: Callable[[], str]) -> tuple[int, str]:
    """(exit code, reason in one line) of one job, whose error it prints.

    `job` returns "finished", or the name of the signal that interrupted it. 0: finished; 2: an error the user can fix, in
    one line without a traceback; 128 + signal: interrupted; 1: anything else.
    """
    try:
        with Interrupt(), _naming_determinism():
            ended = job()
        return (0, "") if ended == "finished" else (128 + signal.Signals[ended], ended)
    except (UserError, FloatingPointError) as error:
        reason = redacted(str(error))
        print(f"error: {reason}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1, reason
    except KeyboardInterrupt as stop:
        print("interrupted; what was saved is kept", file=sys.stderr, flush=True)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT), "interrupted"
    except Exception as error:
        print(redacted(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        return 1, redacted(" ".join(f"{type(error).__name__}: {error}".split()))


class Interrupt:
    """From `defer` on the first of SIGNALS sets `received`, for the loop to end after the step in hand.

    Before, it raises KeyboardInterrupt(signum) at once: while models load and the reference is scored nothing is there to
    be saved. Ctrl-C after any of them raises at once too; schedulers repeat theirs, which changes nothing. One within
    another passes on what it received: a signal that comes while a sweep's cell is saving has its sweep to end.
    """

    innermost: ClassVar["Interrupt | None"] = None
    received = 0  # the signal's number

    def __enter__(self) -> "Interrupt":
        self.outer, Interrupt.innermost = Interrupt.innermost, self
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
        Interrupt.innermost = self.outer
        if self.outer is not None:
            self.outer.received = self.outer.received or self.received
