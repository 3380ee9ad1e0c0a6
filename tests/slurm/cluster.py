"""A real Slurm of four nodes on this one machine, for tests: one munged, one slurmctld and four slurmd, no accounting.

The daemons are children of the process that starts them and die with it; they listen on the loopback only, on ports that
were free, and keep everything in a directory of their own. All that stays is the line in /etc/hosts that names the nodes.
Needs root (slurmd does) and Debian's packages, which are installed if they are missing and apt can.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
HOSTS = Path("/etc/hosts")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Credentials that expire soon: a requeued job waits for the old one's to go.
AuthInfo=socket={home}/munge.sock,cred_expire=5
CredType=cred/munge
AccountingStorageType=accounting_storage/none
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
MessageTimeout=10
CompleteWait=0
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1,bf_max_time=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Unavailable(RuntimeError):
    """Why there can be no Slurm on this machine."""


class Cluster:
    """start(), stop(); in between run() any Slurm command, kill_node(). Both may be called again and again."""

    def __init__(self, home: Path, nodes: int = 4, cpus: int = 4):
        self.home, self.cpus = Path(home), cpus
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.conf = self.home / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Raises Unavailable, with the reason, where Slurm cannot be had."""
        if self.daemons:
            return
        if os.geteuid() != 0:
            raise Unavailable("slurmd needs root")
        _install()
        _name_hosts([*self.nodes, socket.gethostname().partition(".")[0]])
        for folder in ("state", *(f"spool/{n}" for n in self.nodes)):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        key = self.home / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.conf.write_text(self._configuration())
        try:
            files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munge.seed"}
            self._daemon("munged", "--force", *(f"--{option}={self.home / name}" for option, name in files.items()))
            self._until(lambda: (self.home / "munge.sock").exists(), 10, "munged does not come up")
            self._daemon("slurmctld", "-c")
            for node in self.nodes:
                self.start_node(node)
            self._until(self._all_idle, 30, "the nodes do not become idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        ours = set(self.job_processes())
        if "slurmctld" in self.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.run("scancel", "-f", "-u", "root")
                deadline = time.monotonic() + 8
                while self.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
                    time.sleep(0.1)
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in self.daemons.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.daemons.clear()
        for pid in ours | set(self.job_processes()):
            _kill(pid)

    def run(self, *command: str, timeout: float = 20) -> subprocess.CompletedProcess:
        """A Slurm command; never waits for ever, as they do when the controller is gone."""
        env = os.environ | self.environment
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        words = self.run("scontrol", "show", "job", number, "-o").stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """As if its power were cut: the daemon and all that runs under it, without a word to the controller."""
        process = self.daemons.pop(node)
        process.kill()
        process.wait()
        for pid in self.job_processes(node):
            _kill(pid)

    def job_processes(self, node: str | None = None) -> list[int]:
        """Ranks, batch scripts and their slurmstepd, of one node or of all: known by the environment they were given."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                known = dict(v.split("=", 1) for v in (folder / "environ").read_text(errors="replace").split("\0") if "=" in v)
                if known.get("SLURM_CONF") != str(self.conf) or "SLURMD_NODENAME" not in known:
                    continue
                if node in (None, known["SLURMD_NODENAME"]):
                    found |= {int(folder.name), _keeper(int(folder.name))}
        return sorted(found - {0, 1, os.getpid()})

    def _daemon(self, program: str, *arguments: str, name: str = "") -> None:
        foreground = "--foreground" if program == "munged" else "-D"
        with open(self.home / f"{name or program}.log", "ab") as log:
            self.daemons[name or program] = subprocess.Popen(
                [_where(program), foreground, *arguments],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests
                preexec_fn=_die_with_parent,
            )

    def _until(self, true, seconds: float, complaint: str) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            gone = [name for name, process in self.daemons.items() if process.poll() is not None]
            if gone or time.monotonic() > deadline:
                logs = "\n".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(self.home.glob("*.log")))
                raise RuntimeError(f"Slurm: {f'{gone[0]} ended' if gone else complaint}\n{logs}")
            time.sleep(0.1)

    def _all_idle(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            states = self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%T", timeout=3).stdout.split()
            return states == ["idle"] * len(self.nodes)
        return False

    def _configuration(self) -> str:
        host, ports = socket.gethostname().partition(".")[0], _free_ports(1 + len(self.nodes))
        common = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={self.cpus} RealMemory=64000 State=UNKNOWN"
        nodes = "\n".join(f"NodeName={n} Port={p} {common}" for n, p in zip(self.nodes, ports[1:], strict=True))
        return CONF.format(host=host, home=self.home, ports=ports, nodes=nodes)


def _where(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _install() -> None:
    if all(_where(p) for p in ("munged", "slurmctld", "slurmd", "sbatch", "srun")):
        return
    if not shutil.which("apt-get"):
        raise Unavailable(f"Slurm is not installed, and there is no apt-get to install {', '.join(PACKAGES)}")
    policy = Path("/usr/sbin/policy-rc.d")  # packages start no daemon
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        for command in (install, ["apt-get", "update", "-qq"], install):
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
            if command is install and done.returncode == 0:
                return
        raise Unavailable(f"apt-get cannot install {', '.join(PACKAGES)}: {done.stderr.strip()[-300:]}")
    except subprocess.TimeoutExpired:
        raise Unavailable("apt-get did not install Slurm within 4 minutes") from None
    finally:
        if ours:
            policy.unlink()


def _name_hosts(names: list[str]) -> None:
    """Ranks find rank 0 by its node's name."""
    known = {word for line in HOSTS.read_text().splitlines() for word in line.partition("#")[0].split()[1:]}
    if missing := [n for n in names if n not in known]:
        try:
            with open(HOSTS, "a") as file:
                file.write(f"127.0.0.1 {' '.join(missing)}\n")
        except OSError as error:
            raise Unavailable(f"the nodes cannot be named in {HOSTS}: {error.strerror}") from None


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _keeper(pid: int) -> int:
    """The slurmstepd above a process, 0 if its parent is none."""
    with contextlib.suppress(OSError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent
    return 0
