"""A SLURM of one host, or of two nodes on it, for a test: munge, slurmctld and slurmd of its own, by process id."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=5
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=30
SlurmdParameters=config_overrides
MaxArraySize=3
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_there() -> bool:
    """Tell whether SLURM can be run here."""
    return os.geteuid() == 0 and all(shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") for name in PROGRAMS)


@contextlib.contextmanager
def cluster(root: Path, nodes: int) -> Iterator[dict[str, str]]:
    """Run a cluster while the block runs; yield the environment for its commands."""
    host = socket.gethostname().split(".")[0]
    names = [f"n{k + 1}" for k in range(nodes)]
    ports = [_free_port() for _ in range(nodes + 1)]
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000 State=UNKNOWN"
        for name, port in zip(names, ports[1:], strict=True)
    ]
    for folder in ("munge", "state"):
        (root / folder).mkdir(parents=True, mode=0o700)
    conf = root / "slurm.conf"
    conf.write_text(CONF.format(host=host, port=ports[0], root=root, nodes="\n".join(lines)))
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin"}
    key = root / "munge" / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munge = ["munged", f"--socket={root}/munge/munge.socket", f"--pid-file={root}/munge/munged.pid"]
    files = [f"--key-file={key}", f"--log-file={root}/munge/munged.log", f"--seed-file={root}/munge/munged.seed"]
    subprocess.run([*munge, *files, "--force"], env=environment, check=True, timeout=30, stdout=subprocess.DEVNULL)
    commands = [["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-c", "-N", name] for name in names)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemons = [subprocess.Popen(command, env=environment, **silent) for command in commands]
    try:
        _wait_for(lambda: set(ask(environment, "sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, 60)
        yield environment
    finally:
        ask(environment, "scancel", "--full", "--user=root")
        with contextlib.suppress(AssertionError):
            _wait_for(lambda: not ask(environment, "squeue", "-h"), 60)
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
        subprocess.run([*munge, "--stop"], env=environment, timeout=30, **silent)


def ask(environment: dict[str, str], *command: str) -> str:
    """Return what a command of SLURM prints."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def _wait_for(is_so, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "the cluster does not come up, or its jobs do not end"
        time.sleep(0.3)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
