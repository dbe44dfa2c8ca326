"""What the tests of training runs share."""

import os
import signal

FILES = {
    "config.yaml",
    "metrics.csv",
    "weights.safetensors",
    "summary.json",
    "checkpoints/last.safetensors",
    "checkpoints/previous.safetensors",
    "figures/training.png",
}
"""Of a finished run."""


class Stop:
    """Interrupts a run after so many updates."""

    def __init__(self, update: int, signum: int = signal.SIGINT) -> None:
        self.update, self.signum = update, signum

    def after_update(self, loop) -> None:
        if loop.update == self.update:
            os.kill(os.getpid(), self.signum)

    def after_run(self, loop) -> None:
        pass
