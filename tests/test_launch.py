"""The launchers. Clouds and clusters are replaced by stand-ins: small scripts that record their calls and
answer from a state that the test writes. TPU workers are directories in which the commands sent to them run."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, plain_environment, tiny_flags

LAUNCH = ROOT / "launch"
TPU = [
    "tpu_pod.sh",
    "--name=pod",
    "--zone=z",
    "--accelerator_type=v6e-16",
    "--version=v2-alpha-tpuv6e",
    "--poll=0.05",
]
GKE = [
    "gke.sh",
    "--name=run",
    "--accelerator_type=tpu-v6e-slice",
    "--topology=4x4",
    "--bucket=b",
    "--poll=0.05",
]
GKE += ["--source=https://example.com/ekd_jax.git"]
PROGRAM = ["--config=configs/digits.py", "--workdir=/shared/run", "--config.model.students=(1,0.5)"]

# --- stand-ins -----------------------------------------------------------------------------------

ALL = r"""#!/usr/bin/env bash
{ IFS=$'\x1f'; printf '%s\x1e' "${0##*/}"$'\x1f'"$*"; unset IFS; } >>"$STATE/calls"
next() { # print the first line of a file and remove it, unless it is the last one
  [[ -e $STATE/$1 ]] || return 0
  head -n 1 "$STATE/$1"
  if (($(wc -l <"$STATE/$1") > 1)); then sed -i 1d "$STATE/$1"; fi
}
case " $* " in *" $(cat "$STATE/failing" 2>/dev/null || echo none) "*) echo "no way" >&2; exit 7 ;; esac
"""

STANDINS = {
    "gcloud": r"""
case "$3 $4" in
  *describe)
    state=$(next "$3")
    [[ $state != denied ]] || { echo "ERROR: PERMISSION_DENIED: not yours" >&2; exit 1; }
    [[ ${state:-absent} != absent ]] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }
    echo "$state"
    ;;
  "tpu-vm create") echo READY >"$STATE/tpu-vm" ;;
  "queued-resources create")
    echo ACTIVE >"$STATE/queued-resources"
    printf '%s\n' absent absent CREATING READY >"$STATE/tpu-vm"
    printf '%s\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >"$STATE/queued-resources"
    ;;
  *delete) rm -rf "$STATE/tpu-vm" "$STATE/$3" "$STATE"/worker-* ;;
  "tpu-vm scp") for i in 0 1; do mkdir -p "$STATE/worker-$i"; cp "$5" "$STATE/worker-$i/${6#*:}"; done ;;
  "tpu-vm ssh")
    for word; do
      case $word in --command=*) command=${word#*=} ;; --worker=*) workers=${word#*=} ;; esac
    done
    [[ $workers != all ]] || workers="0 1"
    for i in $workers; do
      mkdir -p "$STATE/worker-$i"
      (cd "$STATE/worker-$i" && HOME=$PWD PATH=$STATE/worker_bin:$PATH bash -c "$command") || code=$?
    done
    exit "${code:-0}"
    ;;
esac
""",
    "kubectl": r"""
case "$1 $2" in
  "get jobset")
    state=$(next jobset)
    [[ ${state:-absent} == absent ]] || echo "$3 ${state#going}"
    ;;
  "get pods") next pods ;;
  apply*) cat >"$STATE/manifest"; printf '%s\n' going Completed >"$STATE/jobset" ;;
  delete*) rm -f "$STATE/jobset" ;;
  logs*) echo "training" ;;
esac
""",
    "srun": 'exit "$(cat "$STATE/code" 2>/dev/null || echo 0)"',
    "scontrol": "",
    "ssh": "",
}

ON_WORKERS = {
    "git": 'mkdir "${!#}"',
    "uv": r"""
if [[ $1 == venv ]]; then
  mkdir -p .venv/bin
  [[ -e $STATE/program ]] || echo "echo training" >"$STATE/program"
  { echo "#!/usr/bin/env bash"; cat "$STATE/program"; } >.venv/bin/python
  chmod +x .venv/bin/python
fi
""",
    "mountpoint": "[[ -e ~/mounted ]]",
    "gcsfuse": "touch ~/mounted",
    "sudo": "",
}


class Cloud:
    """A directory with the stand-ins, their state and a record of their calls."""

    def __init__(self, path):
        self.path = path
        for folder, scripts in (("bin", STANDINS), ("worker_bin", ON_WORKERS)):
            (path / folder).mkdir()
            for name, text in scripts.items():
                write_script(path / folder / name, ALL + text)
        (path / "source").mkdir()
        (path / "source" / "file.py").write_text("one")

    def environment(self):
        path = f"{self.path}/bin:{os.environ['PATH']}"
        return plain_environment() | {"STATE": str(self.path), "TMPDIR": str(self.path), "PATH": path}

    def launch(self, script, *arguments, code=0):
        """Run a launcher to its end and return its output."""
        done = subprocess.run(
            [LAUNCH / script, *map(str, arguments)],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def tpu(self, *options, code=0, program=PROGRAM):
        return self.launch(*TPU, f"--source={self.path}/source", *options, "--", *program, code=code)

    def gke(self, *options, code=0):
        return self.launch(*GKE, *options, "--", *PROGRAM, code=code)

    def state(self, **files):
        """Set the answers of the stand-ins: one line, or several for consecutive calls."""
        for name, lines in files.items():
            lines = [lines] if isinstance(lines, str) else lines
            (self.path / name.replace("__", "-")).write_text("\n".join(lines) + "\n")

    def calls(self, tool):
        """Return the words of every call of a tool so far."""
        file = self.path / "calls"
        calls = (
            [call.split("\x1f") for call in file.read_text().split("\x1e")[:-1]] if file.exists() else []
        )
        return [words[1:] for words in calls if words[0] == tool]

    def steps(self):
        """Return the calls of gcloud so far in short (describe, create, ssh install, ...) and forget them."""
        steps = []
        for words in self.calls("gcloud"):
            if words[3] == "ssh":
                steps.append("ssh " + re.search(r"\}; (\w+)", words[-1])[1])
            else:
                steps.append(" ".join(words[2:4]).removeprefix("tpu-vm "))
        (self.path / "calls").unlink()
        return steps


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["local.sh", "tpu_pod.sh", "gke.sh", "slurm.sbatch"])
def test_help_is_the_header(script, cloud):
    printed = cloud.launch(script, "--help") if script != "slurm.sbatch" else slurm(cloud, "--help")
    assert printed.startswith("Train ")
    assert f"launch/{script}" in printed
    assert "--dry_run" in printed
    assert "set -e" not in printed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["local.sh", "--proceses=2"], "unknown option --proceses=2"),
        (["local.sh", "--processes"], "--processes needs a value"),
        (["local.sh", "--gpus=1"], "--gpus takes no value"),
        (["local.sh", "--processes=0", "--", *PROGRAM], "--processes=0 must be a positive integer"),
        (["local.sh", "--gpus", "--devices=2", "--", *PROGRAM], "omit it with --gpus"),
        (["local.sh", "--config=configs/digits.py"], "is an option of the program: pass it after --"),
        (["local.sh", "--", "--workdir=x"], "--config=... of the program is missing"),
        (["tpu_pod.sh", "--zone=z"], "--name=... is missing"),
        (["tpu_pod.sh", "--name=pod", "--delete"], "--zone=... is missing"),
        ([*TPU[:3], "--", *PROGRAM], "--accelerator_type=... is missing"),
        ([*TPU, "--quque"], "unknown option --quque"),
        ([*TPU, "--"], "--config=... of the program is missing"),
        ([*TPU, "--bucket=b", "--", "--config=c", "--workdir=runs/x"], "must be below /shared"),
        ([*TPU, "--", "--config=c", "--workdir=gs://b/x"], "must be a directory"),
        ([*TPU, "--source=nowhere", "--", *PROGRAM], "--source=nowhere is neither"),
        (["gke.sh"], "--name=... is missing"),
        ([*GKE, "--topologie=4x4"], "unknown option --topologie=4x4"),
        ([*GKE, "--topology=4by4", "--", *PROGRAM], "--topology=4by4 must look like 4x4"),
        ([*GKE, "--topology=3x3", "--", *PROGRAM], "9 chips cannot be divided into hosts of 4"),
        ([*GKE, "--hosts=4", "--", *PROGRAM], "follows from --topology"),
        ([*GKE, "--claim=c", "--", *PROGRAM], "only one"),
        ([*GKE[:4], "--", *PROGRAM], "--source=URL is missing"),
        ([*GKE, "--", "--config=c", "--workdir=runs/x"], "must be below /shared"),
    ],
)
def test_mistakes_get_one_line(command, message, cloud):
    printed = cloud.launch(*command, code=2)
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert not (cloud.path / "calls").exists()


def test_dry_runs_print_the_commands_and_run_nothing(cloud):
    local = cloud.launch("local.sh", "--dry_run", "--processes=3", "--", *PROGRAM)
    assert local.count("python -m ekd_jax.main") == 3
    tpu = cloud.tpu("--dry_run", "--bucket=b", "--spot")
    for part in ("tpu-vm create pod", "tpu-vm scp", "install ()", "share b", "start --config=", "follow'"):
        assert part in tpu
    assert "queued-resources create pod --node-id=pod" in cloud.tpu("--dry_run", "--queue")
    delete = cloud.launch("tpu_pod.sh", "--name=pod", "--zone=z", "--delete", "--dry_run")
    for part in ("stop ()", "queued-resources delete pod --zone=z --force", "tpu-vm delete pod --zone=z"):
        assert part in delete
    gke = cloud.gke("--dry_run")
    for part in ("kubectl get jobset run", "kind: JobSet", "kubectl apply", "kubectl logs --follow"):
        assert part in gke
    assert "kubectl delete jobset run" in cloud.launch("gke.sh", "--name=run", "--delete", "--dry_run")
    assert "srun " in slurm(cloud, "--dry_run", *PROGRAM)
    assert not (cloud.path / "calls").exists()
    assert not list(cloud.path.glob("*.tar.gz"))


# --- Cloud TPU -----------------------------------------------------------------------------------

NEW = ["describe", "queued-resources describe", "create", "describe"]
INSTALL = ["scp", "ssh install"]
RUN = ["ssh start", "ssh follow"]


def test_tpu_pod_is_created_and_the_command_can_be_repeated(cloud):
    printed = cloud.tpu("--bucket=b", "--spot", "--project=p")
    assert "complete: /shared/run" in printed
    assert "pod costs money until it is deleted" in printed
    create = next(words for words in cloud.calls("gcloud") if words[3] == "create")
    assert create[4:] == [
        *(
            "pod",
            "--zone=z",
            "--project=p",
            "--accelerator-type=v6e-16",
            "--version=v2-alpha-tpuv6e",
            "--spot",
        )
    ]
    assert cloud.calls("gcsfuse") == 2 * [cloud.calls("gcsfuse")[0]]
    assert cloud.calls("gcsfuse")[0][-2:] == ["b", "/shared"]
    assert cloud.steps() == [*NEW, "ssh look", *INSTALL, "ssh share", *RUN]
    for worker in ("worker-0", "worker-1"):
        assert (cloud.path / worker / "ekd_jax.log").read_text() == "training\n"
        assert (cloud.path / worker / "ekd_jax" / "file.py").read_text() == "one"

    cloud.tpu("--bucket=b", "--spot", "--project=p")
    assert cloud.calls("gcsfuse") == cloud.calls("uv") == []
    assert cloud.steps() == ["describe", "ssh look", "ssh share", *RUN]

    (cloud.path / "source" / "file.py").write_text("two")
    cloud.tpu()
    assert cloud.steps() == ["describe", "ssh look", *INSTALL, *RUN]
    assert (cloud.path / "worker-1" / "ekd_jax" / "file.py").read_text() == "two"


def test_tpu_program_gets_its_options_unchanged(cloud):
    options = [*PROGRAM, "--config.data.name=a b", '--config.x=it\'s $HOME & "more"']
    cloud.state(program="printf '<%s>\\n' \"$@\"")
    cloud.tpu("--source=https://example.com/ekd_jax.git", program=options)
    assert cloud.calls("git")[0] == [
        "clone",
        "--quiet",
        "--depth=1",
        "https://example.com/ekd_jax.git",
        "ekd_jax",
    ]
    log = (cloud.path / "worker-1" / "ekd_jax.log").read_text()
    assert log.splitlines() == [f"<{word}>" for word in ["-m", "ekd_jax.main", *options]]


def test_tpu_program_outlives_the_launcher_and_is_followed_again(cloud):
    cloud.state(program="echo training; sleep 2; echo done")
    command = [LAUNCH / TPU[0], *TPU[1:], f"--source={cloud.path}/source", "--", *PROGRAM]
    first = subprocess.Popen(command, env=cloud.environment(), stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "training\n"
    first.kill()
    first.wait()
    cloud.steps()
    printed = cloud.tpu()
    assert "already running" in printed
    assert "training\ndone\n" in printed
    assert cloud.steps() == ["describe", "ssh look", "ssh follow"]


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_tpu_pod_that_was_preempted_is_created_again(state, cloud):
    cloud.state(tpu__vm=state)
    assert f"preempted ({state})" in cloud.tpu()
    deleted = ["describe", "queued-resources describe", "describe", "delete"]
    assert cloud.steps() == [*deleted, *NEW, "ssh look", *INSTALL, *RUN]


def test_tpu_pod_that_is_preempted_while_training_is_created_again(cloud):
    preempted = (
        "if mkdir $STATE/once; then sleep 0.5; echo PREEMPTED >$STATE/tpu-vm; exit 143; fi 2>/dev/null"
    )
    cloud.state(program=["[[ $PWD == */worker-0/* ]] || exit 0", preempted, "echo again"])
    printed = cloud.tpu("--queue")
    assert "queue: WAITING_FOR_RESOURCES" in printed
    assert "again\n" in printed
    assert [step for step in cloud.steps() if step.startswith("queued") and "describe" not in step] == [
        *("queued-resources create", "queued-resources delete", "queued-resources create")
    ]


def test_tpu_pod_starts_again_when_a_process_was_lost(cloud):
    lost = "if mkdir $STATE/once; then sleep 0.5; exit 75; fi 2>/dev/null"
    cloud.state(program=["[[ $PWD == */worker-0/* ]] || exit 0", lost, "echo again"])
    printed = cloud.tpu()
    assert "a process was lost: starting the program again" in printed
    assert "again\n" in printed
    assert "delete" not in cloud.steps()


@pytest.mark.slow  # test_slurm counts, too
def test_tpu_pod_does_not_start_for_ever(cloud):
    cloud.state(program=["[[ $PWD == */worker-0/* ]] || exit 0", "exit 75"])
    printed = cloud.tpu(code=75)
    assert printed.count("starting the program again") == 10
    assert "error: a process was lost again and again" in printed


def test_tpu_queue_that_was_suspended_or_failed(cloud):
    cloud.state(queued__resources="SUSPENDED")
    assert "preempted (queue: SUSPENDED)" in cloud.tpu("--queue")
    assert "queued-resources delete" in cloud.steps()
    cloud.state(queued__resources="FAILED", tpu__vm="absent")
    assert "error: the queued resource pod failed" in cloud.tpu("--queue", code=1)


def test_tpu_delete(cloud):
    until_deleted = "while [[ -d $HOME ]]; do sleep 0.1; done"
    cloud.state(program=f"trap 'echo saved; exit 143' TERM; {until_deleted}")
    command = [LAUNCH / TPU[0], *TPU[1:], f"--source={cloud.path}/source", "--", *PROGRAM]
    with subprocess.Popen(command, env=cloud.environment(), stderr=subprocess.PIPE, text=True) as first:
        while not cloud.calls("gcloud") or "follow" not in cloud.calls("gcloud")[-1][-1]:
            time.sleep(0.05)
        first.kill()
    log = cloud.path / "worker-0" / "ekd_jax.log"
    (cloud.path / "saved.log").hardlink_to(log)
    cloud.steps()
    cloud.launch("tpu_pod.sh", "--name=pod", "--zone=z", "--delete")
    assert (cloud.path / "saved.log").read_text() == "saved\n"
    assert cloud.steps() == ["describe", "ssh stop", "queued-resources describe", "describe", "delete"]
    cloud.launch("tpu_pod.sh", "--name=pod", "--zone=z", "--delete")
    assert cloud.steps() == ["describe", "queued-resources describe", "describe"]
    cloud.state(queued__resources="ACTIVE", tpu__vm="READY")
    cloud.launch("tpu_pod.sh", "--name=pod", "--zone=z", "--delete")
    assert cloud.steps()[-2:] == ["queued-resources delete", "describe"]


def test_tpu_failures_end_with_their_code_and_a_clear_line(cloud):
    cloud.state(failing="create")
    assert (
        "error: cannot create pod (if there is no capacity, --queue waits for it): exit code 7"
        in cloud.tpu(code=7)
    )
    cloud.state(failing="clone")
    printed = cloud.tpu("--source=https://example.com/ekd_jax.git", code=7)
    assert "error: cannot install ekd_jax: exit code 7" in printed
    assert "costs money" in printed
    cloud.state(failing="none", program="echo last words; exit 3")
    printed = cloud.tpu("--source=https://example.com/ekd_jax.git", code=3)
    assert printed.count("last words") == 3, "once in the log of worker 0, and at the end of both logs"
    assert "error: the program exited with code 3" in printed
    cloud.state(program="exit 143")
    cloud.tpu(code=143)
    cloud.state(tpu__vm="denied")
    assert "gcloud cannot describe pod: ERROR: PERMISSION_DENIED: not yours" in cloud.tpu(code=1)


# --- Kubernetes ----------------------------------------------------------------------------------


def kubectl_steps(cloud):
    steps = [words[0] for words in cloud.calls("kubectl") if words[:2] != ["get", "jobset"]]
    (cloud.path / "calls").unlink()
    return steps


def test_gke_first_start_repetition_and_start_after_a_failure(cloud):
    cloud.state(pods="pod-a Running")
    printed = cloud.gke()
    assert "following the log of pod-a" in printed
    assert "training" in printed
    assert "run is complete" in printed
    assert kubectl_steps(cloud) == ["apply", "get", "logs"]
    assert "run is complete" in cloud.gke()
    assert kubectl_steps(cloud) == []
    cloud.state(jobset=["going", "going", "going", "Completed"], pods=["pod-a Pending", "pod-b Running"])
    assert "is running, with the options" in cloud.gke()
    assert kubectl_steps(cloud) == ["get", "get", "logs"]
    cloud.state(jobset="Failed")
    assert "run failed earlier" in cloud.gke()
    assert kubectl_steps(cloud) == ["delete", "apply", "get", "logs"]
    cloud.state(jobset=["going", "Failed"])
    assert "error: JobSet run failed" in cloud.gke(code=1)
    cloud.launch("gke.sh", "--name=run", "--delete")
    assert cloud.calls("kubectl")[-1][:3] == ["delete", "jobset", "run"]


def test_gke_failures_end_with_their_code_and_a_clear_line(cloud):
    cloud.state(failing="apply")
    assert "error: cannot apply run: exit code 7" in cloud.gke(code=7)
    cloud.state(failing="jobset")
    assert "error: kubectl cannot get run" in cloud.gke(code=7)


def manifest(cloud, *command):
    cloud.state(jobset="absent", pods="pod-a Running")
    cloud.launch(*command, "--", *PROGRAM, "--config.data.name=a & b's")
    whole = yaml.safe_load((cloud.path / "manifest").read_text())
    assert not re.search(r"\$\{\w", (cloud.path / "manifest").read_text())
    job = whole["spec"]["replicatedJobs"][0]["template"]["spec"]
    return whole, job, job["template"]["spec"]


def test_manifest_for_tpus(cloud):
    whole, job, pod = manifest(cloud, *GKE, "--spot", "--restarts=3", "--service_account=me")
    assert whole["kind"] == "JobSet"
    assert whole["metadata"]["name"] == "run"
    assert whole["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert job["parallelism"] == job["completions"] == 4
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["serviceAccountName"] == "me"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["image"] == "python:3.12"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    lines = container["args"][0].splitlines()
    assert lines[0] == "git clone --quiet --depth=1 https://example.com/ekd_jax.git /ekd_jax"
    assert "jax[tpu]" in lines[2]
    words = subprocess.run(["bash", "-c", f"printf '%s\n' {lines[3]}"], capture_output=True, text=True)
    program = [
        "exec",
        "python",
        "-m",
        "ekd_jax.main",
        "--coordinator_timeout=1800",
        *PROGRAM,
        "--config.data.name=a & b's",
    ]
    assert words.stdout.splitlines() == program
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
    assert "persistentVolumeClaim" not in pod["volumes"][0]


def test_manifest_for_gpus(cloud):
    options = ["--hosts=2", "--chips_per_host=8", "--image=me/ekd_jax", "--claim=disk", "--poll=0.05"]
    _, job, pod = manifest(cloud, "gke.sh", "--name=run", "--accelerator_type=nvidia-h100-80gb", *options)
    assert job["completions"] == 2
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    (line,) = container["args"][0].splitlines()
    rank = "--coordinator=run-host-0-0.run:8476 --num_processes=2 --process_id=$JOB_COMPLETION_INDEX"
    assert line.startswith(
        "exec python -m ekd_jax.main --coordinator_timeout=1800 --config=configs/digits.py"
    )
    assert line.endswith(rank)
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}


# --- Slurm ---------------------------------------------------------------------------------------


def slurm(cloud, *arguments, code=0, **environment):
    """Run a copy of the batch script, as Slurm does."""
    spool = cloud.path / "spool"
    spool.mkdir(exist_ok=True)
    script = spool / "slurm_script"
    script.write_text((LAUNCH / "slurm.sbatch").read_text())
    done = subprocess.run(
        ["bash", script, *arguments], env=cloud.environment() | environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_slurm(cloud):
    job = {"SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "8"}
    slurm(cloud, *PROGRAM, **job)
    options = ["--cpus-per-task=8", "--kill-on-bad-exit=1"]
    assert cloud.calls("srun") == [[*options, "python", "-m", "ekd_jax.main", *PROGRAM]]
    cloud.state(code="3")
    assert "error: the program exited with code 3" in slurm(cloud, *PROGRAM, code=3, **job)
    assert cloud.calls("scontrol") == []
    for times, code in enumerate((143, 75, 137), 1):
        cloud.state(code=str(code))
        assert "requeueing the job" in slurm(cloud, *PROGRAM, code=code, **job, SLURM_RESTART_COUNT="9")
        assert cloud.calls("scontrol") == [["requeue", "12"]] * times
    assert "exited with code 137" in slurm(cloud, *PROGRAM, code=137, **job, SLURM_RESTART_COUNT="10")
    assert cloud.calls("scontrol") == [["requeue", "12"]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config=... is missing"),
        (PROGRAM[:1], "--workdir=... is missing"),
        ([*PROGRAM, "now"], "unexpected argument now"),
        ([*PROGRAM, "--dry_run"], "--dry_run must come first"),
        (PROGRAM, "this script runs under Slurm"),
    ],
)
def test_slurm_mistakes_get_one_line(arguments, message, cloud):
    printed = slurm(cloud, *arguments, code=2)
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


# --- one machine ---------------------------------------------------------------------------------


def local(cloud, body, *options, code=0):
    """Run local.sh with a program that has its process number in $i."""
    write_script(cloud.path / "bin" / "python", ALL + f"i=${{!#}}; i=${{i#--process_id=}}\n{body}")
    return cloud.launch("local.sh", *options, "--", *PROGRAM, code=code)


def test_local_processes_get_coordinator_and_devices(cloud):
    printed = local(cloud, 'echo "out $i $XLA_FLAGS $JAX_PLATFORMS"; echo "error $i" >&2', "--devices=3")
    assert re.search(r"out 0 .*--xla_force_host_platform_device_count=3 cpu", printed)
    assert "out 1" not in printed
    assert "error 1" in printed
    calls = sorted(cloud.calls("python"), key=lambda words: words[-1])
    assert [words[:5] for words in calls] == 2 * [["-m", "ekd_jax.main", *PROGRAM]]
    assert [words[-2:] for words in calls] == [["--num_processes=2", f"--process_id={i}"] for i in range(2)]
    assert calls[0][-3] == calls[1][-3]
    assert re.fullmatch(r"--coordinator=localhost:\d+", calls[0][-3])
    printed = local(cloud, 'echo "$i has $CUDA_VISIBLE_DEVICES" >&2', "--processes=3", "--gpus")
    assert sorted(line for line in printed.splitlines() if "has" in line) == [
        "0 has 0",
        "1 has 1",
        "2 has 2",
    ]


def test_local_failure_of_one_ends_the_others(cloud):
    forever = "while true; do sleep 0.1; done"
    ends = f"trap 'echo told $i >&2; exit 143' TERM; sleep 0.5; ((i != 1)) || exit 5; {forever}"
    printed = local(cloud, ends, "--processes=3", code=5)
    assert "launch: process 1 ended with code 5; ending the others" in printed
    assert "told 0" in printed
    assert "told 2" in printed
    stubborn = f"trap '' TERM; ((i != 1)) || exit 6; {forever}"
    started = time.monotonic()
    local(cloud, stubborn, "--grace=1", code=6)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_signal_is_passed_on(number, cloud):
    """Every process gets it once, and the launcher waits for all of them."""
    traps = 'for s in INT TERM; do trap "sleep 0.\\$i; echo $s to \\$i >&2; exit $((128 + code))" $s; done'
    body = f"code={int(number)}\n{traps}\necho up $i >&2; while true; do sleep 0.1; done"
    write_script(cloud.path / "bin" / "python", ALL + "i=${!#}; i=${i#--process_id=}\n" + body)
    command = [LAUNCH / "local.sh", "--", *PROGRAM]
    with subprocess.Popen(command, env=cloud.environment(), stderr=subprocess.PIPE, text=True) as running:
        assert sorted(running.stderr.readline() for _ in range(2)) == ["up 0\n", "up 1\n"]
        running.send_signal(number)
        said = running.stderr.read().splitlines()
    assert running.returncode == 128 + number
    assert sorted(said) == [f"{number.name[3:]} to {i}" for i in range(2)]


@pytest.mark.slow  # a run of several processes; test_processes.py has them
def test_local_for_real(tmp_path):
    """Two processes with two devices each save when they are told to end, and a second start resumes them."""
    flags = tiny_flags(train__epochs=2, train__log_every_steps=1)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = plain_environment() | {"PATH": path}
    start = lambda: subprocess.Popen(
        [LAUNCH / "local.sh", "--devices=2", "--", *flags, f"--workdir={tmp_path}/run"],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with start() as running:
        for line in running.stdout:
            if line.startswith("step 1/12"):
                running.send_signal(signal.SIGTERM)
                break
        said = running.stdout.read()
    assert running.returncode == 143, said
    assert "interrupted at step" in said
    with start() as running:
        said = running.stdout.read()
    assert running.returncode == 0, said
    assert "resuming from step" in said
    assert "4 x cpu" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["students"]
