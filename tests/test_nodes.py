"""Two hosts: joined by torchrun or SLURM, one killed, and the run goes on to the same weights."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch

from simmim.command_line.configuration import config_folder
from support.commands import EXACT, assert_same_tensors, state, write_tiny
from support.folders import make_classes
from support.processes import command, end, in_processes, kill, program, said, start

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(sys.platform != "linux", reason="network namespaces and killpg are Linux's"),
]
SUBMIT = config_folder() / "slurm" / "submit.sh"

# Two network namespaces with a cable between them: this shell's is the first host's. The second is
# kept by a process that sleeps. What runs on a host is named by a file, and ends with this shell.
HOSTS = """
ip link set lo up
unshare -n sleep 1000 & second=$!
while [ "$(readlink /proc/$second/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link add one type veth peer name two
ip link set two netns $second
ip addr add 10.77.0.1/24 dev one; ip link set one up
there() { nsenter -t $second -n "$@"; }
there ip link set lo up; there ip addr add 10.77.0.2/24 dev two; there ip link set two up
GLOO_SOCKET_IFNAME=one setsid "$@" 0 10.77.0.1 & a=$!
GLOO_SOCKET_IFNAME=two setsid nsenter -t $second -n "$@" 1 10.77.0.1 & b=$!
wait $a; first=$?
wait $b; other=$?
kill $second
echo $first $other > ended.txt
"""
# Without the right to make namespaces, two launchers of one host.
LAUNCHERS = """
GLOO_SOCKET_IFNAME=lo setsid "$@" 0 127.0.0.1 & a=$!
GLOO_SOCKET_IFNAME=lo setsid "$@" 1 127.0.0.1 & b=$!
wait $a; first=$?
wait $b; other=$?
echo $first $other > ended.txt
"""
TORCHRUN = """#!/bin/sh
node=$1; address=$2
echo $$ > node_$node.pid
exec {python} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank $node \\
  --master-addr $address --master-port 29511 -m simmim $(cat command.txt)
"""
SRUN = """#!/bin/sh
shift  # --kill-on-bad-exit=1, which is not done here: a process must see by itself that it is alone
export SLURM_JOB_ID=4711 SLURM_JOB_NAME=train SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_LOCALID=0
export SLURM_JOB_NODELIST=127.0.0.1,127.0.0.2 SLURM_NNODES=2 SLURM_NTASKS_PER_NODE=1
for node in 0 1; do
  SLURM_PROCID=$node SLURM_NODEID=$node setsid "$@" & echo $! > node_$node.pid
done
wait $(cat node_0.pid); first=$?
wait $(cat node_1.pid); other=$?
echo $first $other > ended.txt
exit $((first | other))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with images/, tiny.yaml, and a complete run of one host in runs/whole."""
    folder = tmp_path_factory.mktemp("hosts")
    make_classes(folder / "images", 20, size=40)
    options = {**EXACT, "data": {**EXACT["data"], "batch_size": 2}}
    write_tiny(folder, **options, trainer={"strategy": "ddp", "max_epochs": 15})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        in_processes(2, command, *command_line("whole"), "--trainer.devices=2")
    return folder


@pytest.fixture
def place(whole: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(whole)
    return whole


def command_line(name: str) -> list[str]:
    often = "--checkpoint.every_n_minutes=0"
    return ["pretrain", "fit", "-c", "tiny.yaml", f"--name={name}", often]


def weights(name: str) -> tuple[int, dict[str, torch.Tensor]]:
    content = state(f"runs/{name}/version_0")
    return content["global_step"], content["state_dict"]


def assert_same(name: str) -> None:
    """The run of two hosts ended as that of one host did, in one folder."""
    (steps, one), (same, two) = weights("whole"), weights(name)
    assert same == steps
    assert_same_tensors(one, two)
    assert [path.name for path in Path("runs", name).iterdir()] == ["version_0"]


@contextmanager
def started(*words: str, **environment: str) -> Iterator[BaseProcess]:
    process = start(program, *words, **environment)
    try:
        yield process
    finally:
        for file in Path().glob("node_*.pid"):
            kill_tree(int(file.read_text()))
            file.unlink()
        kill(process)


def kill_tree(root: int) -> None:
    """Kill a process and all that came from it, as when a host fails."""
    with suppress(psutil.NoSuchProcess):  # it has ended
        process = psutil.Process(root)
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def kill_a_host(process: BaseProcess, name: str) -> None:
    """Kill the second host once the run has saved, and see that the first one ends by itself."""
    last = Path(f"runs/{name}/version_0/checkpoints/last.ckpt")
    while not last.exists():
        assert process.is_alive(), said()[-3000:]
        time.sleep(0.02)
    kill_tree(int(Path("node_1.pid").read_text()))
    began = time.monotonic()
    process.join(120)
    assert time.monotonic() - began < 90
    assert "0" not in Path("ended.txt").read_text().split()
    assert 0 < weights(name)[0] < weights("whole")[0]


def two_hosts() -> list[str]:
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip"))
    probe = ["unshare", "-rn", "ip", "link", "add", "one", "type", "veth", "peer", "name", "two"]
    if tools and subprocess.run(probe, capture_output=True).returncode == 0:
        return ["unshare", "-rn", "sh", "-c", HOSTS, "hosts"]
    return ["sh", "-c", LAUNCHERS, "launchers"]


def test_torchrun_on_two_hosts_goes_on_after_one_was_killed(place: Path) -> None:
    Path("node.sh").write_text(TORCHRUN.format(python=sys.executable))
    Path("node.sh").chmod(0o755)
    hosts = [*two_hosts(), str(place / "node.sh")]
    line = " ".join([*command_line("parts"), "--trainer.num_nodes=2"])
    Path("command.txt").write_text(line)
    with started(*hosts) as process:
        kill_a_host(process, "parts")
    Path("command.txt").write_text(f"{line} --ckpt_path=last")
    with started(*hosts) as process:
        end(process)
        assert Path("ended.txt").read_text() == "0 0\n", said()[-3000:]
    assert_same("parts")


def test_the_job_of_two_nodes_is_started_again_by_slurm(place: Path) -> None:
    """The script that is submitted, with an `srun` that starts two tasks."""
    assert "--requeue" in SUBMIT.read_text()
    (place / "bin").mkdir()
    simmim = f'#!/bin/sh\nexec {sys.executable} -m simmim "$@"\n'
    for name, text in {"srun": SRUN, "simmim": simmim}.items():
        (place / "bin" / name).write_text(text)
        (place / "bin" / name).chmod(0o755)
    job = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2"}
    options = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    words = ["sh", str(SUBMIT), *command_line("job")[2:], *options]
    with started(*words, **job) as process:
        kill_a_host(process, "job")
    with started(*words, **job, SLURM_RESTART_COUNT="1") as process:
        end(process)
    assert_same("job")
