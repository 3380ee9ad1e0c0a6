"""A real Slurm cluster of four nodes on one machine, for tests: one munged, one slurmctld and four slurmd, no accounting.

The daemons are children of the test process and die with it. They listen only on the loopback interface, on free ports, and
keep their files in one directory. The only lasting change to the machine is a line in /etc/hosts with the nodes' names. slurmd
needs root. Debian's Slurm packages are installed if they are missing and apt-get is available.
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
# Short-lived credentials: a requeued job waits until the credential of its previous attempt has expired.
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
    """Raised with the reason if Slurm cannot run on this machine."""


class Cluster:
    """The cluster. After start(), run() runs a Slurm command and kill_node() kills a node. stop() and start() may alternate."""

    def __init__(self, home: Path, nodes: int = 4, cpus: int = 4):
        self.home, self.cpus = Path(home), cpus
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.conf = self.home / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Starts the daemons and waits until all nodes are idle. Raises Unavailable if Slurm cannot run here."""
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
            self._until(lambda: (self.home / "munge.sock").exists(), 10, "munged did not start")
            self._daemon("slurmctld", "-c")
            for node in self.nodes:
                self.start_node(node)
            self._until(self._all_idle, 30, "the nodes did not become idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        job_pids = set(self.job_processes())
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
        for pid in job_pids | set(self.job_processes()):
            _kill(pid)

    def run(self, *command: str, timeout: float = 20) -> subprocess.CompletedProcess:
        """Runs a Slurm command. Without the timeout, it would wait for ever if the controller is gone."""
        env = os.environ | self.environment
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)

    def job(self, number: str) -> dict[str, str]:
        """Returns the fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", number, "-o").stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """Kills a node as a power cut would: its daemon and all its processes. The controller is not told."""
        process = self.daemons.pop(node)
        process.kill()
        process.wait()
        for pid in self.job_processes(node):
            _kill(pid)

    def job_processes(self, node: str | None = None) -> list[int]:
        """Returns the process ids of ranks, batch scripts and their slurmstepd, on one node or on all nodes.

        Slurm sets SLURMD_NODENAME in the environment of ranks and batch scripts.
        """
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                env = dict(v.split("=", 1) for v in (folder / "environ").read_text(errors="replace").split("\0") if "=" in v)
                if env.get("SLURM_CONF") != str(self.conf) or "SLURMD_NODENAME" not in env:
                    continue
                if node in (None, env["SLURMD_NODENAME"]):
                    found |= {int(folder.name), _parent_slurmstepd(int(folder.name))}
        return sorted(found - {0, 1, os.getpid()})

    def _daemon(self, program: str, *arguments: str, name: str = "") -> None:
        foreground = "--foreground" if program == "munged" else "-D"
        with open(self.home / f"{name or program}.log", "ab") as log:
            self.daemons[name or program] = subprocess.Popen(
                [_find_program(program), foreground, *arguments],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must stop the tests, not the daemons
                preexec_fn=_die_with_parent,
            )

    def _until(self, condition, seconds: float, message: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, process in self.daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(self.home.glob("*.log")))
                raise RuntimeError(f"Slurm: {f'{ended[0]} ended' if ended else message}\n{logs}")
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


def _find_program(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _install() -> None:
    if all(_find_program(p) for p in ("munged", "slurmctld", "slurmd", "sbatch", "srun")):
        return
    if not shutil.which("apt-get"):
        raise Unavailable(f"Slurm is not installed, and there is no apt-get to install {', '.join(PACKAGES)}")
    policy = Path("/usr/sbin/policy-rc.d")  # with this script, apt-get starts no daemon of a package
    policy_is_ours = not policy.exists()
    if policy_is_ours:
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
        if policy_is_ours:
            policy.unlink()


def _name_hosts(names: list[str]) -> None:
    """Adds the nodes' names to /etc/hosts, because ranks connect to rank 0 by the name of its node."""
    known = {word for line in HOSTS.read_text().splitlines() for word in line.partition("#")[0].split()[1:]}
    if missing := [n for n in names if n not in known]:
        try:
            with open(HOSTS, "a") as file:
                file.write(f"127.0.0.1 {' '.join(missing)}\n")
        except OSError as error:
            raise Unavailable(f"cannot add the nodes' names to {HOSTS}: {error.strerror}") from None


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _parent_slurmstepd(pid: int) -> int:
    """Returns the id of the parent process if the parent is a slurmstepd, otherwise 0."""
    with contextlib.suppress(OSError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent
    return 0
