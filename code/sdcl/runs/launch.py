"""Does what is missing of an experiment's runs: so many processes at a time, each a script of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sdcl.runs.folder import LOGGER, STOP_SIGNALS
from sdcl.runs.matrix import Run, State, is_claimed, is_finished
from sdcl.runs.slurm import in_processes, nodes_of_job
from sdcl.runs.written_files import is_recorded, record

POLL_SECONDS = 0.2
ELSEWHERE_SECONDS = 10.0  # between looks at a run that another process has
TOLD_LINES = 6  # of a run that failed
CLAIMED = "another process writes into"  # what a script says that came second


@dataclass
class Job:
    """A run's script that is running."""

    run: Run
    is_test: bool
    process: subprocess.Popen
    slot: int
    log: IO[str]
    begin: float


@dataclass(frozen=True)
class Machine:
    """What runs have.

    Attributes:
        slots: runs at a time; the cores are shared out.
        gpus: that the slots take in turns.
        waits: for runs that another process has; else they are left to it.
        processes: that train one run together.
    """

    slots: int
    gpus: int
    waits: bool
    processes: int = 1

    @property
    def threads(self) -> int:
        """A process's share of this machine's cores."""
        here = -(-self.processes // nodes_of_job())
        return max(1, (os.cpu_count() or 1) // (self.slots * here))

    def gpus_of(self, slot: int) -> str:
        """Return the numbers of a slot's GPUs, as CUDA_VISIBLE_DEVICES has them."""
        first = slot * self.processes
        return ",".join(str((first + k) % self.gpus) for k in range(min(self.processes, self.gpus)))


class Launcher:
    """Runs what is missing.

    Args:
        runs: of the matrix, a stage 1 before what starts from it.
        state: derives a run's state.
        test_flags: of the test script, for a run.
        scripts: the training and the test script.
        machine: what they run on.
        logs: folder of what the scripts print.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        state: Callable[[Run], State],
        test_flags: Callable[[Run], list[str]],
        scripts: Sequence[Path],
        machine: Machine,
        logs: Path,
    ):
        self.runs, self.state, self.test_flags = list(runs), state, test_flags
        self.scripts, self.machine, self.logs = list(scripts), machine, logs
        self.jobs: list[Job] = []
        self.failed: dict[str, str] = {}
        self.looked: dict[str, float] = {}  # when a run that is another process's was looked at
        self.waiting = [run for run in self.runs if not is_finished(run, state(run))]

    def run(self) -> int:
        """Run until nothing is missing that can be had; return the number of runs that failed."""
        LOGGER.info("%d of %d runs are to be done, %d at a time", len(self.waiting), len(self.runs), self.machine.slots)
        known = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
        earlier = {number: signal.signal(number, _stop) for number in known}
        try:
            while self.waiting or self.jobs:
                self._start()
                if (
                    not self.machine.waits
                    and all(str(run.folder) in self.looked for run in self.waiting)
                    and not self.jobs
                ):
                    break  # all that is left is other processes'
                self._collect()
                time.sleep(POLL_SECONDS)
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            self._end()
        for title, lines in self.failed.items():
            LOGGER.warning("FAILED: %s\n%s", title, lines)
        return len(self.failed)

    def _start(self) -> None:
        """Start what is ready, as far as there are slots."""
        busy = {str(job.run.folder) for job in self.jobs}
        for run in list(self.waiting):
            free = sorted(set(range(self.machine.slots)) - {job.slot for job in self.jobs})
            if not free:
                return
            key = str(run.folder)
            if key in busy or time.monotonic() < self.looked.get(key, 0.0):
                continue
            if run.needs is not None and not self._is_ready(run):
                continue
            self.looked.pop(key, None)
            state = self.state(run)
            if is_finished(run, state):  # by another process meanwhile
                self.waiting.remove(run)
            elif state.kind == "broken":
                self._fail(run, state.text)
            elif state.kind == "running" or is_claimed(run.folder):
                self.looked[key] = time.monotonic() + ELSEWHERE_SECONDS
            else:
                self._launch(run, is_test=state.kind == "trained", slot=free[0])
                busy.add(key)

    def _is_ready(self, run: Run) -> bool:
        """Tell whether the stage 1 of a run is there; where it failed, the run has failed too."""
        if run.needs.title in self.failed:
            self._fail(run, f"its {run.needs.title} failed")
            return False
        waits = any(one.folder == run.needs.folder for one in self.waiting)
        return not waits and not any(job.run.folder == run.needs.folder for job in self.jobs)

    def _fail(self, run: Run, why: str) -> None:
        self.failed[run.title] = why
        if run in self.waiting:
            self.waiting.remove(run)

    def _launch(self, run: Run, is_test: bool, slot: int) -> None:
        flags = self.test_flags(run) if is_test else list(run.flags)
        command, more = [sys.executable, str(self.scripts[is_test]), *flags], {}
        if not is_test:
            command, more = in_processes(command, self.machine.processes)
        environment = {"OMP_NUM_THREADS": str(self.machine.threads)} | os.environ | more
        if self.machine.gpus and nodes_of_job() == 1:
            environment["CUDA_VISIBLE_DEVICES"] = self.machine.gpus_of(slot)
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / f"{run.folder.name}.log"
        if path.exists() and not is_recorded(path) and not path.read_bytes().startswith(b"$ "):
            self._fail(run, f"{path} is no log of an experiment: move it away")
            return
        record(path)
        log = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in _collect()
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,  # a terminal's Ctrl-C comes to us alone; a script takes a second one for "at once"
        )  # fmt: skip
        self.jobs.append(Job(run, is_test, process, slot, log, time.monotonic()))
        LOGGER.info("%s: %s, in %s", run.title, "testing" if is_test else "training", path)

    def _collect(self) -> None:
        """Look after the scripts that have ended."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            job.log.close()
            run, status = job.run, job.process.returncode
            told = _last_lines(Path(job.log.name))
            what = "testing" if job.is_test else "training"
            if status == 0:
                LOGGER.info("%s: %s done in %.0f s", run.title, what, time.monotonic() - job.begin)
                if is_finished(run, self.state(run)):
                    self.waiting.remove(run)
                elif job.is_test or self.state(run).kind in ("absent", "begun"):
                    self._fail(run, f"its {what} ended without what it should leave in {run.folder}\n{told}")
            elif CLAIMED in told:
                self.looked[str(run.folder)] = time.monotonic() + ELSEWHERE_SECONDS
            else:
                LOGGER.warning("%s: %s ended with status %d", run.title, what, status)
                self._fail(run, f"{what} ended with status {status}:\n{told}")

    def _end(self) -> None:
        """Ask what still runs to save and stop, and wait for it."""
        if self.jobs:
            LOGGER.info("stopping: what runs saves first; the same command goes on")
        for job in self.jobs:
            # Of SIGTERM srun kills its tasks at once; this it passes on to each of them, which then saves.
            is_srun = job.process.args[0] == "srun"
            job.process.send_signal(signal.SIGUSR1 if is_srun else signal.SIGTERM)
        for job in self.jobs:
            job.process.wait()
            job.log.close()


def _stop(number: int, _: object) -> None:
    sys.exit(128 + number)


def _last_lines(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-TOLD_LINES:])
