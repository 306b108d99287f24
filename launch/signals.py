"""Being asked to stop: SIGTERM and SIGUSR1, as schedulers send them, end a run between two steps with a checkpoint."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Asked:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.to_stop = False

    def listen(self) -> None:
        """From now on the signals do not end the process, but are taken note of."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.to_stop = True
