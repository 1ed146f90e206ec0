"""The launchers, with stand-ins for gcloud and the like that record calls."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
SHELL = sorted(
  path.name
  for path in (ROOT / "launch").iterdir()
  if path.suffix in (".sh", ".sbatch")
)
LAUNCHERS = ("tpu_vm.sh", "gke.sh", "slurm.sh", "sky.sh")

# Records its name, arguments and input; answers as answers.json says: for the
# first key found in the call, [output, exit code] after [output, exit code].
STUB = """#!{python} -IS
import json, os, sys
folder = os.path.dirname(sys.argv[0])
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
text = sys.stdin.read() if "--filename=-" in call else ""
with open(folder + "/calls.jsonl", "a") as file:
  file.write(json.dumps([call, text]) + "\\n")
with open(folder + "/answers.json") as file:
  answers = json.load(file)
for key, replies in answers.items():
  if key in " ".join(call):
    output, code = replies.pop(0) if len(replies) > 1 else replies[0]
    with open(folder + "/answers.json", "w") as file:
      json.dump(answers, file)
    print(output)
    sys.exit(code)
"""
STUBBED = (
  *("gcloud", "kubectl", "xpk", "sky", "sbatch", "squeue", "scancel"),
  *("tar", "mkdir", "tail"),
)

# What hardly survives a shell, or two.
NASTY = ["a b", "it's", 'say "hi"', "$HOME", "`id`", "\\n", "*", "", "é;&|<>#"]

TPU = ["--name=agrpo-1", "--zone=europe-west4-a", "--project=my-project"]
COMMAND = ["--", "python", "-m", "agrpo_jax.main", *NASTY]


@dataclasses.dataclass
class Cloud:
  """A copy of the launchers, with stand-ins before everything on PATH."""

  folder: pathlib.Path

  def __post_init__(self):
    self.project = self.folder / "a project"
    shutil.copytree(ROOT / "launch", self.project / "launch")
    self.bin = self.folder / "bin"
    self.bin.mkdir()
    self.stub(*STUBBED)
    self.answer({})

  def stub(self, *names: str) -> None:
    for name in names:
      program = self.bin / name
      program.write_text(STUB.format(python=sys.executable))
      program.chmod(0o755)

  def answer(self, answers: dict[str, list[tuple[str, int]]]) -> None:
    (self.bin / "answers.json").write_text(json.dumps(answers))

  def run(
    self, script: str, *arguments: str, **variables: str
  ) -> subprocess.CompletedProcess:
    return subprocess.run(
      [self.project / "launch" / script, *arguments],
      env={**os.environ, **self.path(), **variables},
      cwd=self.folder,
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )

  def path(self) -> dict[str, str]:
    return {"PATH": f"{self.bin}:{os.environ['PATH']}"}

  def bare(self, *names: str) -> pathlib.Path:
    """A PATH of almost nothing: the machine may have the real programs."""
    folder = self.folder / "bare"
    folder.mkdir()
    for name in ("bash", "env", "basename", "dirname", "sed", *names):
      (folder / name).symlink_to(shutil.which(name))
    return folder

  @property
  def records(self) -> list[tuple[list[str], str]]:
    file = self.bin / "calls.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(call, text) for call, text in map(json.loads, lines)]

  @property
  def calls(self) -> list[list[str]]:
    return [call for call, _ in self.records]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
  return Cloud(tmp_path)


def words_of(output: str) -> list[list[str]]:
  """The commands that a dry run prints."""
  lines = [line for line in output.splitlines() if not line.startswith("# ")]
  return [shlex.split(line) for line in lines]


# --- every launcher ---------------------------------------------------------


@pytest.mark.parametrize("name", SHELL)
def test_bash_can_read_it(name):
  subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)


def test_all_scripts_are_strict():
  for name in SHELL:
    text = (ROOT / "launch" / name).read_text()
    assert "pipefail" in text or "common.sh" in text, name


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_shows_the_comment_at_the_top(cloud, name):
  asked = cloud.run(name, "--help")
  assert asked.returncode == 0
  assert f"launch/{name} ACTION" in asked.stdout
  assert "--dry-run" in asked.stdout
  assert "common.sh" not in asked.stdout  # the comment only
  assert cloud.run(name, "delete", "--help").stdout == asked.stdout


GKE = ["--name=agrpo-1", "--namespace=team"]
JOB = ["--topology=v6e:4x4", "--image=registry/agrpo:1", "--bucket=my-bucket"]
XPK = [
  *("--name=agrpo-1", "--tool=xpk", "--cluster=c", "--zone=us-east5-a"),
  "--project=my-project",
]
SLURM = [
  *("--name=gsm8k", "--nodes=2", "--gpus-per-node=4", "--cpus-per-gpu=6"),
  *("--time=2-00:00", "--partition=a b", "--account=x"),
]
SKY = [
  *("--name=agrpo-1", "--accelerators=H100:8", "--bucket=gs://my-bucket"),
  *("--infra=gcp/us-east5", "--nodes=2", "--spot"),
]
ACTIONS = {
  "create": ["tpu_vm.sh", "create", *TPU, "--accelerator-type=v6e-16"],
  "create-spot": [
    *("tpu_vm.sh", "create", *TPU, "--accelerator-type=v5p-8", "--spot"),
    "--runtime-version=mine",
  ],
  "wait": ["tpu_vm.sh", "wait", *TPU],
  "copy": ["tpu_vm.sh", "copy", *TPU, "--bucket=my-bucket"],
  "run": ["tpu_vm.sh", "run", *TPU, *COMMAND],
  "up": ["tpu_vm.sh", "up", *TPU, "--accelerator-type=v5litepod-32", *COMMAND],
  "logs": ["tpu_vm.sh", "logs", *TPU],
  "status": ["tpu_vm.sh", "status", *TPU],
  "stop": ["tpu_vm.sh", "stop", *TPU],
  "delete": ["tpu_vm.sh", "delete", *TPU],
  "gke-logs": ["gke.sh", "logs", *GKE],
  "gke-status": ["gke.sh", "status", *GKE],
  "gke-delete": ["gke.sh", "delete", *GKE],
  "xpk-submit": ["gke.sh", "submit", *XPK, *JOB[:2], *COMMAND],
  "xpk-logs": ["gke.sh", "logs", *XPK],
  "xpk-status": ["gke.sh", "status", *XPK],
  "xpk-delete": ["gke.sh", "delete", *XPK],
  "slurm-submit": ["slurm.sh", "submit", *SLURM, *COMMAND],
  "slurm-logs": ["slurm.sh", "logs", "--name=gsm8k"],
  "slurm-status": ["slurm.sh", "status", "--name=gsm8k"],
  "slurm-delete": ["slurm.sh", "delete", "--name=gsm8k"],
  "sky-submit": ["sky.sh", "submit", *SKY, *COMMAND],
  "sky-logs": ["sky.sh", "logs", "--name=agrpo-1"],
  "sky-status": ["sky.sh", "status"],
  "sky-delete": ["sky.sh", "delete", "--name=agrpo-1"],
}


@pytest.mark.parametrize("arguments", ACTIONS.values(), ids=ACTIONS.keys())
def test_a_dry_run_prints_what_a_run_runs(cloud, arguments):
  cloud.answer({"describe": [("ACTIVE", 0)]})
  script, action, *rest = arguments
  dry = cloud.run(script, action, "--dry-run", *rest)
  assert dry.returncode == 0, dry.stderr
  assert not cloud.calls
  run = cloud.run(script, action, *rest)
  assert run.returncode == 0, run.stderr
  assert cloud.calls
  assert words_of(dry.stdout) == cloud.calls
  # And a run shows each command before it runs.
  shown = [line for line in run.stderr.splitlines() if ": ACTIVE" not in line]
  assert words_of("\n".join(shown)) == cloud.calls


@pytest.mark.parametrize(
  ("arguments", "messages"),
  [
    (["tpu_vm.sh"], ["an action is missing", "--name=... is missing"]),
    (["tpu_vm.sh", "fly", *TPU], ["'fly' is none of: create wait"]),
    (
      ["tpu_vm.sh", "create", "--name=Big_One", "--zone=europe", "--project="],
      [
        "--name=Big_One is not a name of",
        "--zone=europe is not a zone such as europe-west4-a",
        "--project=... is missing",
        "--accelerator-type=... is missing",
      ],
    ),
    (["tpu_vm.sh", "create", *TPU, "--accelerator-type=v6e"], ["not a type"]),
    (["tpu_vm.sh", "run", *TPU], ["the command to run is missing"]),
    (["tpu_vm.sh", "run", *TPU, "python"], ["unexpected 'python'"]),
    (["tpu_vm.sh", "wait", *TPU, "--", "x"], ["wait takes no command"]),
    (["tpu_vm.sh", "wait", *TPU, "--timeout=1h"], ["--timeout=1h is not"]),
    (["tpu_vm.sh", "wait", *TPU, "--poll=0"], ["at least 1"]),
    (["tpu_vm.sh", "wait", *TPU, "--sport"], ["no option --sport"]),
    (["tpu_vm.sh", "wait", *TPU, "--root=x"], ["no option --root="]),
    (["tpu_vm.sh", "wait", *TPU, "--zone"], ["--zone needs a value"]),
    (["tpu_vm.sh", "copy", *TPU, "--bucket=gs://b"], ["without gs://"]),
    (
      ["gke.sh", "submit", "--name=a", "--topology=v6e:16", "--image=a b"],
      ["--topology=v6e:16 is not", "--image=a b is not", "command to run"],
    ),
    (
      ["gke.sh", "manifest", *GKE, *JOB, "--topology=v5p:4x4", "--", "x"],
      ["not a slice such as"],
    ),
    (
      ["gke.sh", "manifest", *GKE, *JOB, "--topology=v6e:3x3", "--", "x"],
      ["9 chips; a host has 4"],
    ),
    (["gke.sh", "submit", *GKE, *JOB, "--", "a\nb"], ["line break"]),
    (
      ["gke.sh", "submit", *XPK, *JOB, "--spot", "--", "x"],
      ["spot is a property of the cluster", "a bucket is attached once"],
    ),
    (["gke.sh", "status", "--name=a", "--tool=xpk"], ["--cluster=... is miss"]),
    (["slurm.sh", "submit", "--name=a", "--nodes=two"], ["--nodes=two is not"]),
    (["slurm.sh", "submit", "--name=a/b", "--", "x"], ["--name=a/b is not"]),
    (
      ["sky.sh", "submit", "--name=a", "--accelerators=eight", "--bucket=b"],
      ["--accelerators=eight is not", "--bucket=b is not", "command to run"],
    ),
    (
      [
        *("sky.sh", "submit", "--name=a", "--accelerators=tpu-v6e-8"),
        *("--bucket=gs://bucket", "--nodes=2", "--", "x"),
      ],
      ["several TPU hosts are one slice"],
    ),
  ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_mistakes_are_reported_together(cloud, arguments, messages, dry_run):
  done = cloud.run(*arguments[:2], *dry_run, *arguments[2:])
  assert done.returncode == 2
  assert not done.stdout
  for message in messages:
    assert message in done.stderr
  assert f"launch/{arguments[0]}" in done.stderr
  assert not cloud.calls


@pytest.mark.parametrize(
  "name", ["wait", "gke-status", "xpk-status", "slurm-status", "sky-status"]
)
def test_a_missing_program_is_named(cloud, name):
  bare = str(cloud.bare())
  done = cloud.run(*ACTIONS[name], PATH=bare)
  assert done.returncode == 2
  assert "is not installed or not on PATH" in done.stderr
  dry = cloud.run(*ACTIONS[name], "--dry-run", PATH=bare)
  assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize(
  "name", [name for name in ACTIONS if name not in ("wait", "up")]
)
def test_a_failure_keeps_its_exit_code(cloud, name):
  cloud.answer({"": [("", 41)]})
  done = cloud.run(*ACTIONS[name])
  assert done.returncode == 41
  assert re.search(r"failed \(exit code 41\)", done.stderr)
  assert len(cloud.calls) == 1


# --- TPU VMs ----------------------------------------------------------------


def up(cloud: Cloud) -> subprocess.CompletedProcess:
  waiting = ["--poll=1", "--timeout=60"]
  return cloud.run(*ACTIONS["up"][:2], *waiting, *ACTIONS["up"][2:])


def test_up_waits_until_the_slice_is_there(cloud):
  states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
  cloud.answer({"describe": [(state, 0) for state in states]})
  done = up(cloud)
  assert done.returncode == 0
  for state in states:
    assert f"agrpo-1: {state}" in done.stderr
  kinds = [call[4] if call[0] == "gcloud" else call[0] for call in cloud.calls]
  assert kinds == [
    *("create", *["describe"] * 3, "mkdir", "tar"),
    *("scp", "ssh", "ssh"),
  ]


def test_nothing_follows_a_failed_creation(cloud):
  cloud.answer({" create ": [("", 1)]})
  done = up(cloud)
  assert done.returncode == 1
  assert "creating the request failed (exit code 1)" in done.stderr
  assert len(cloud.calls) == 1


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "SUSPENDING"])
def test_a_request_that_cannot_become_active(cloud, state):
  cloud.answer({"describe": [("PROVISIONING", 0), (state, 0)]})
  done = cloud.run("tpu_vm.sh", "wait", *TPU, "--poll=1")
  assert done.returncode == 1
  assert f"agrpo-1 is {state} and will not become active" in done.stderr
  assert f"delete {shlex.join(TPU)}" in done.stderr


def test_waiting_ends(cloud):
  cloud.answer({"describe": [("WAITING_FOR_RESOURCES", 0)]})
  done = cloud.run("tpu_vm.sh", "wait", *TPU, "--poll=1", "--timeout=1")
  assert done.returncode == 1
  assert "still WAITING_FOR_RESOURCES after 1 s" in done.stderr
  assert 2 <= len(cloud.calls) <= 3


def test_waiting_for_a_request_that_is_not_there(cloud):
  cloud.answer({"describe": [("", 1)]})
  done = cloud.run("tpu_vm.sh", "wait", *TPU)
  assert done.returncode == 1
  assert "asking for the state of agrpo-1 failed" in done.stderr


def test_a_worker_that_fails(cloud):
  cloud.answer({"on_worker.sh start": [("", 7)], "describe": [("ACTIVE", 0)]})
  done = up(cloud)
  assert done.returncode == 7
  assert "the command on a host failed (exit code 7)" in done.stderr
  assert "billed until: launch/tpu_vm.sh delete --name=agrpo-1" in done.stderr


def test_the_status_of_a_slice_that_was_taken_away(cloud):
  cloud.answer({"describe": [("SUSPENDED", 0)]})
  done = cloud.run(*ACTIONS["status"])
  assert (done.returncode, done.stdout) == (0, "agrpo-1: SUSPENDED\n")
  assert len(cloud.calls) == 1


def test_the_hosts_get_the_very_words(cloud):
  """Through our shell, gcloud and the host's shell."""
  assert cloud.run(*ACTIONS["run"]).returncode == 0
  (command,) = [word for word in cloud.calls[0] if "--command=" in word]
  host = shlex.split(command.removeprefix("--command="))
  assert host == [
    "bash",
    "agrpo_jax/launch/on_worker.sh",
    "start",
    *COMMAND[1:],
  ]


def test_the_archive_has_what_a_host_needs(cloud):
  (cloud.bin / "tar").unlink()
  (cloud.bin / "mkdir").unlink()
  for name in (
    *("agrpo_jax/main.py", "agrpo_jax/__pycache__/main.pyc", "runs/a/big"),
    *(".git/index", ".venv/bin/python", ".mypy_cache/x", "configs/a b.py"),
    *("agrpo_jax/assets/runs/kept", "a.egg-info/PKG-INFO"),
  ):
    path = cloud.project / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  done = cloud.run(*ACTIONS["copy"])
  assert done.returncode == 0, done.stderr
  with tarfile.open(cloud.project / "runs/launch/agrpo-1.tgz") as archive:
    files = {member.name for member in archive if member.isfile()}
  own = {f"./launch/{path.name}" for path in (ROOT / "launch").glob("*.*")}
  assert files - own == {
    *("./agrpo_jax/main.py", "./configs/a b.py"),
    *("./agrpo_jax/assets/runs/kept", "./launch/Dockerfile"),
  }


# --- on a host of a slice: really run ---------------------------------------


@pytest.fixture
def host(cloud) -> Cloud:
  for name in ("mkdir", "tail"):  # the only ones that it needs
    (cloud.bin / name).unlink()
  return cloud


def wait_for(condition, seconds: float = 10.0) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "nothing happened"
    time.sleep(0.05)


def test_a_host_runs_the_very_words(host):
  script = (
    "import os, sys; print(sys.argv[1:], os.environ['AGRPO_DISTRIBUTED'])"
  )
  done = host.run("on_worker.sh", "start", sys.executable, "-c", script, *NASTY)
  assert done.returncode == 0, done.stderr
  assert done.stdout == f"{NASTY} auto\n"


def test_a_host_keeps_exit_code_and_output(host):
  command = ["bash", "-c", "echo out; echo err >&2; exit 7"]
  assert host.run("on_worker.sh", "start", *command).returncode == 7
  again = host.run("on_worker.sh", "follow")
  assert (again.returncode, again.stdout) == (7, "out\nerr\n")
  assert "ended with exit code 7" in host.run("on_worker.sh", "status").stdout


def test_the_command_outlives_the_connection_and_stops_when_asked(host):
  worker = host.project / "launch/on_worker.sh"
  script = (
    "trap 'echo saving; exit 9' TERM; echo up; while :; do sleep .1; done"
  )
  command = [worker, "start", "bash", "-c", script]
  connection = subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, start_new_session=True
  )
  try:
    assert connection.stdout.readline() == "up\n"
    os.killpg(connection.pid, signal.SIGKILL)
    connection.wait()
    assert "running, process" in host.run("on_worker.sh", "status").stdout
    second = host.run("on_worker.sh", "start", "bash", "-c", "other")
    assert second.returncode == 2
    assert "is still running" in second.stderr
    # gcloud starts the same again when a connection breaks.
    connection = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert connection.stdout.readline() == "up\n"
  finally:
    host.run("on_worker.sh", "stop")
  output, _ = connection.communicate(timeout=20)
  assert (connection.returncode, output) == (9, "saving\n")
  done = host.run("on_worker.sh", "follow")
  assert (done.returncode, done.stdout) == (9, "up\nsaving\n")
  assert host.run("on_worker.sh", "start", "true").returncode == 0


def test_a_host_without_a_command(host):
  assert "nothing is running" in host.run("on_worker.sh", "status").stdout
  assert host.run("on_worker.sh", "follow").returncode == 2
  assert host.run("on_worker.sh", "start").returncode == 2
  assert host.run("on_worker.sh", "stop").returncode == 0
  assert host.run("on_worker.sh").returncode == 2


@pytest.mark.parametrize("has_gcsfuse", [True, False])
def test_a_host_is_set_up(host, has_gcsfuse):
  host.stub("python3", "sudo", "mountpoint", "curl")
  if has_gcsfuse:
    host.stub("gcsfuse")
  host.answer({"mountpoint": [("", 1)], "curl": [("", 22)]})
  path = f"{host.bin}:{host.bare('id')}"
  done = host.run("on_worker.sh", "setup", "my-bucket", PATH=path)
  calls = [shlex.join(call) for call in host.calls]
  assert "uv venv" in calls[1]
  assert calls[2].endswith(
    "--constraint requirements.txt --editable '.[tpu,hub]'"
  )
  if has_gcsfuse:
    assert done.returncode == 0, done.stderr
    assert host.calls[-1][0] == "gcsfuse"
    assert host.calls[-1][-2:] == ["my-bucket", "/bucket"]
    assert "--metadata-cache-ttl-secs=0" in host.calls[-1]
  else:
    assert done.returncode == 22  # the download failed, and nothing follows
    assert calls[-1].startswith("curl")


def test_a_mounted_bucket_stays(host):
  host.stub("python3", "sudo", "mountpoint", "gcsfuse")
  assert host.run("on_worker.sh", "setup", "my-bucket").returncode == 0
  assert host.calls[-1] == ["mountpoint", "-q", "/bucket"]
  assert host.run("on_worker.sh", "setup").returncode == 0


# --- GKE --------------------------------------------------------------------


def manifest(cloud: Cloud, *arguments: str) -> dict:
  done = cloud.run("gke.sh", "manifest", *GKE, *JOB, *arguments)
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


def pod_of(jobset: dict) -> dict:
  (job,) = jobset["spec"]["replicatedJobs"]
  return job["template"]["spec"]["template"]["spec"]


def test_the_jobset(cloud):
  jobset = manifest(cloud, "--spot", *COMMAND)
  assert jobset["kind"] == "JobSet"
  assert jobset["metadata"]["name"] == "agrpo-1"
  assert jobset["metadata"]["namespace"] == "team"
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4
  pod = pod_of(jobset)
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
    "cloud.google.com/gke-tpu-topology": "4x4",
    "cloud.google.com/gke-spot": "true",
  }
  (main,) = pod["containers"]
  assert main["image"] == "registry/agrpo:1"
  assert main["command"] == COMMAND[1:]
  assert main["env"] == [{"name": "AGRPO_DISTRIBUTED", "value": "auto"}]
  assert main["resources"]["limits"] == {"google.com/tpu": 4}
  assert main["volumeMounts"] == [{"name": "bucket", "mountPath": "/bucket"}]
  (volume,) = pod["volumes"]
  attributes = volume["csi"]["volumeAttributes"]
  assert attributes["bucketName"] == "my-bucket"
  assert "metadata-cache:ttl-secs:0" in attributes["mountOptions"].split(",")


def test_a_mistake_in_the_settings_is_not_tried_again(cloud):
  spec = manifest(cloud, "--max-restarts=5", "--", "x")["spec"]
  assert spec["failurePolicy"]["maxRestarts"] == 5
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet"
  job = spec["replicatedJobs"][0]["template"]["spec"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [2, 3]
  assert rule["onExitCodes"]["containerName"] == "main"


def test_the_jobset_without_extras(cloud):
  pod = pod_of(manifest(cloud, "--bucket=", "--", "x"))
  assert "volumes" not in pod
  assert "volumeMounts" not in pod["containers"][0]
  assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]


@pytest.mark.parametrize(
  ("topology", "accelerator", "hosts", "chips_per_host", "tpu_type"),
  [
    ("v5e:4x8", "tpu-v5-lite-podslice", 8, 4, "v5litepod-32"),
    ("v6e:2x4", "tpu-v6e-slice", 1, 8, "v6e-8"),
    ("v6e:1x1", "tpu-v6e-slice", 1, 1, "v6e-1"),
    ("v5p:2x2x1", "tpu-v5p-slice", 1, 4, "v5p-8"),
    ("v4:2x2x4", "tpu-v4-podslice", 4, 4, "v4-32"),
    ("tpu7x:2x2x2", "tpu7x", 2, 4, "tpu7x-2x2x2"),
  ],
)
def test_slices(cloud, topology, accelerator, hosts, chips_per_host, tpu_type):
  jobset = manifest(cloud, f"--topology={topology}", "--", "x")
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = pod_of(jobset)
  selector = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
  limits = pod["containers"][0]["resources"]["limits"]
  assert (selector, job["completions"]) == (accelerator, hosts)
  assert limits["google.com/tpu"] == chips_per_host
  job_options = [f"--topology={topology}", "--image=a"]
  cloud.run("gke.sh", "submit", *XPK, *job_options, "--", "x")
  assert f"--tpu-type={tpu_type}" in cloud.calls[0]


def test_no_variable_of_kubernetes_in_the_command(cloud):
  """It would replace $(x), and reads $$(x) as the text $(x)."""
  jobset = manifest(cloud, "--", "$(HOME) $x")
  assert pod_of(jobset)["containers"][0]["command"] == ["$$(HOME) $x"]


def test_submit_applies_the_manifest(cloud):
  text = cloud.run("gke.sh", "manifest", *GKE, *JOB, *COMMAND).stdout
  assert cloud.run("gke.sh", "submit", *GKE, *JOB, *COMMAND).returncode == 0
  assert cloud.records == [(["kubectl", "apply", "--filename=-"], text)]


def test_a_dry_submission_can_be_fed_to_a_shell(cloud):
  dry = cloud.run("gke.sh", "submit", *GKE, *JOB, "--dry-run", *COMMAND)
  assert not cloud.calls
  subprocess.run(
    ["bash", "-c", dry.stdout], env={**os.environ, **cloud.path()}, check=True
  )
  ((call, text),) = cloud.records
  assert call == ["kubectl", "apply", "--filename=-"]
  assert pod_of(yaml.safe_load(text))["containers"][0]["command"] == COMMAND[1:]


def test_a_submission_that_fails(cloud):
  cloud.answer({"apply": [("", 6)]})
  done = cloud.run("gke.sh", "submit", *GKE, *JOB, *COMMAND)
  assert done.returncode == 6
  assert "submitting failed (exit code 6)" in done.stderr


def test_xpk_gets_the_very_words(cloud):
  assert cloud.run(*ACTIONS["xpk-submit"]).returncode == 0
  (command,) = [word for word in cloud.calls[0] if "--command=" in word]
  words = shlex.split(command.removeprefix("--command="))
  assert words == ["env", "AGRPO_DISTRIBUTED=auto", *COMMAND[1:]]


# --- SLURM ------------------------------------------------------------------


@pytest.fixture
def node(cloud) -> Cloud:
  """A stand-in for srun that runs the command; scancel reaches it."""
  cloud.stub("scontrol")
  (cloud.bin / "srun").write_text(
    '#!/usr/bin/env bash\necho "srun $1 $2"\nshift 2\n'
    f'echo $$ >"{cloud.bin}/srun.pid"\nexec "$@"\n'
  )
  (cloud.bin / "scancel").write_text(
    '#!/usr/bin/env bash\necho "scancel $*"\n'
    f'kill -TERM "$(<"{cloud.bin}/srun.pid")"\n'
  )
  for name in ("srun", "scancel"):
    (cloud.bin / name).chmod(0o755)
  return cloud


def start_job(node: Cloud, script: str) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [node.project / "launch/slurm.sbatch", "bash", "-c", script],
    env={
      **os.environ,
      **node.path(),
      "SLURM_JOB_ID": "42",
      "SLURM_CPUS_PER_TASK": "6",
    },
    cwd=node.project,
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_ends_as_its_command_does(node, code):
  job = start_job(node, f"echo $AGRPO_DISTRIBUTED; exit {code}")
  output, _ = job.communicate(timeout=20)
  assert job.returncode == code
  assert "srun --kill-on-bad-exit=1 --cpus-per-task=6\nauto\n" in output
  assert not node.calls


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_job_at_its_time_limit_saves_and_queues_again(node, code):
  job = start_job(
    node,
    f"trap 'sleep .3; echo saved; exit {code}' TERM; echo up;"
    " while :; do sleep .1; done",
  )
  lines = [job.stdout.readline() for _ in range(2)]
  assert lines[1] == "up\n"
  job.send_signal(signal.SIGUSR1)
  output, _ = job.communicate(timeout=20)
  assert "scancel --signal=TERM 42" in output
  assert output.index("saved") < output.index("queued again")
  assert job.returncode == code
  assert node.calls == [["scontrol", "requeue", "42"]]


def test_a_job_with_wrong_settings_is_not_queued_again(node):
  job = start_job(
    node, "trap 'exit 2' TERM; echo up; while :; do sleep .1; done"
  )
  assert "srun" in job.stdout.readline()
  assert job.stdout.readline() == "up\n"
  job.send_signal(signal.SIGUSR1)
  job.communicate(timeout=20)
  assert job.returncode == 2
  assert not node.calls


def test_a_preempted_job_waits_for_its_command(node):
  """SLURM sends TERM to the steps itself, and queues the job again."""
  job = start_job(
    node,
    "trap 'sleep .3; echo saved; exit 143' TERM; echo up;"
    " while :; do sleep .1; done",
  )
  assert "srun" in job.stdout.readline()
  assert job.stdout.readline() == "up\n"
  os.kill(int((node.bin / "srun.pid").read_text()), signal.SIGTERM)
  job.send_signal(signal.SIGTERM)
  output, _ = job.communicate(timeout=20)
  assert "saved" in output
  assert job.returncode == 143
  assert not node.calls


# --- SkyPilot ---------------------------------------------------------------


def sky_task() -> dict:
  return yaml.safe_load((ROOT / "launch/sky.yaml").read_text())


def test_the_sky_task_is_complete():
  task = sky_task()
  assert task["envs"] == dict.fromkeys(["BUCKET", "EXTRA", "RUN"])
  assert task["file_mounts"]["/bucket"]["source"] == "${BUCKET}"
  assert task["resources"]["job_recovery"]["max_restarts_on_errors"] == 0
  for part in ("setup", "run"):
    subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


def run_sky(cloud: Cloud, extra: str, num_nodes: int) -> list:
  """Runs the task as node 1 of some; (arguments, AGRPO variables) it got."""
  script = (
    "import json, os, sys; print(json.dumps([sys.argv[1:],"
    " {k: v for k, v in os.environ.items() if k.startswith('AGRPO')}]))"
  )
  cloud.run(
    *("sky.sh", "submit", "--name=a", "--accelerators=H100:8"),
    *("--bucket=gs://bucket", "--", sys.executable, "-c", script, *NASTY),
  )
  given = dict(
    word.removeprefix("--env=").split("=", 1)
    for word in cloud.calls[0]
    if word.startswith("--env=")
  )
  assert given.pop("BUCKET") == "gs://bucket"
  assert given.pop("EXTRA") == "cuda"
  done = subprocess.run(
    ["bash", "-c", sky_task()["run"]],
    env={
      **os.environ,
      **given,
      "EXTRA": extra,
      "SKYPILOT_NUM_NODES": str(num_nodes),
      "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
      "SKYPILOT_NODE_RANK": "1",
    },
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


def test_several_gpu_machines_are_told_of_each_other(cloud):
  arguments, variables = run_sky(cloud, "cuda", 2)
  assert arguments == NASTY
  assert variables == {
    "AGRPO_COORDINATOR": "10.0.0.1:8482",
    "AGRPO_NUM_PROCESSES": "2",
    "AGRPO_PROCESS_ID": "1",
  }


def test_one_gpu_machine_is_alone_and_tpus_find_each_other(cloud):
  assert run_sky(cloud, "cuda", 1)[1] == {}
  assert run_sky(cloud, "tpu", 1)[1] == {"AGRPO_DISTRIBUTED": "auto"}


# --- several processes on this machine --------------------------------------


def local(*arguments: str, **options) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, ROOT / "launch/local.py", *arguments],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
    **options,
  )


SHOW = "import os, sys; print(sys.argv[1:], *[os.environ.get(x) for x in {}])"


def test_local_processes_get_their_variables():
  names = ["AGRPO_COORDINATOR", "AGRPO_NUM_PROCESSES", "AGRPO_PROCESS_ID"]
  names += ["JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"]
  done = local(
    *("--num-processes=3", "--cpu-devices=4", "--port=1234", "--"),
    *(sys.executable, "-c", SHOW.format(names), *NASTY),
  )
  assert done.returncode == 0, done.stderr
  assert sorted(done.stdout.splitlines()) == [
    f"[{i}] {NASTY} 127.0.0.1:1234 3 {i} cpu 4" for i in range(3)
  ]


def test_connections_of_gloo_do_not_drown_what_is_said():
  gloo = (
    "[Gloo] Rank 0 is connected to 1 peer ranks. "
    "Expected number of connected peer ranks is : 1"
  )
  said = f"{gloo}\nfirst\n\nsecond{gloo}\n[Gloo] Error: lost\n"
  done = local(
    "--num-processes=1",
    *("--", sys.executable, "-c", f"print({said!r}, end='')"),
  )
  assert done.stdout.splitlines() == [
    "[0] first",
    "[0] ",
    "[0] second",
    "[0] [Gloo] Error: lost",
  ]


def test_a_local_dry_run_prints_what_a_run_runs():
  names = ["AGRPO_COORDINATOR", "AGRPO_NUM_PROCESSES", "AGRPO_PROCESS_ID"]
  options = ["--num-processes=2", "--port=1234"]
  command = ["--", sys.executable, "-c", SHOW.format(names), *NASTY]
  dry = local(*options, "--dry-run", *command)
  run = local(*options, *command)
  again = [
    subprocess.run(
      ["bash", "-c", line], capture_output=True, text=True, check=True
    ).stdout
    for line in dry.stdout.splitlines()
  ]
  assert len(again) == 2
  assert sorted(run.stdout.splitlines(keepends=True)) == [
    f"[{i}] {line}" for i, line in enumerate(again)
  ]


def test_local_mistakes():
  done = local("--num-processes=0", "--port=99999", "--cpu-devices=-1")
  assert done.returncode == 2
  for message in (
    *("--num-processes=0 is not 1", "--port=99999 is not a port"),
    *("--cpu-devices=-1 is negative", "the command is missing"),
  ):
    assert message in done.stderr
  done = local("--", "no-such-program")
  assert done.returncode == 2
  assert "Cannot run 'no-such-program'" in done.stderr


@pytest.mark.parametrize(
  ("end", "code"), [("exit 7", 7), ("kill -KILL $$", 137)]
)
def test_one_local_process_that_fails_ends_the_others(end, code):
  done = local(
    *("--", "bash", "-c"),
    f"[ $AGRPO_PROCESS_ID = 1 ] && {end}; trap 'echo saved; exit 1' TERM;"
    " while :; do sleep .1; done",
  )
  assert done.returncode == code
  assert f"Process 1 ended with exit code {code}" in done.stderr
  assert "[0] saved" in done.stdout


def test_a_local_process_that_does_not_end_is_killed():
  started = time.monotonic()
  done = local(
    *("--grace=0.5", "--", "bash", "-c"),
    "[ $AGRPO_PROCESS_ID = 1 ] && sleep .3 && exit 3;"
    " trap '' TERM; echo $$; sleep 20; sleep 20",
  )
  assert done.returncode == 3
  assert "Process 0 did not end; killed" in done.stderr
  assert time.monotonic() - started < 20
  with pytest.raises(ProcessLookupError):
    os.kill(int(done.stdout.split()[1]), 0)


def test_local_processes_are_told_to_stop():
  process = subprocess.Popen(
    [
      *(sys.executable, ROOT / "launch/local.py", "--", "bash", "-c"),
      "trap 'echo saved; exit 5' TERM; echo up; while :; do sleep .1; done",
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert {process.stdout.readline() for _ in range(2)} == {
    "[0] up\n",
    "[1] up\n",
  }
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=20)
  assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]
  assert process.returncode == 5


def test_local_processes_are_killed_when_told_twice():
  process = subprocess.Popen(
    [
      *(sys.executable, ROOT / "launch/local.py", "--", "bash", "-c"),
      "trap 'echo no' TERM; echo up; for i in {1..200}; do sleep .1; done",
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  for word in ("up", "no"):
    lines = {process.stdout.readline() for _ in range(2)}
    assert lines == {f"[0] {word}\n", f"[1] {word}\n"}
    process.send_signal(signal.SIGTERM)
  process.communicate(timeout=20)
  assert process.returncode == 137


def test_local_processes_find_each_other():
  """The same variables that the program reads."""
  script = """
from agrpo_jax.parallel import processes
processes.initialize()
import jax, sys
found = jax.device_count(), processes.exchange(jax.process_index())
print(*found, file=sys.stderr)  # Gloo writes in between on stdout
"""
  done = local(
    *("--num-processes=2", "--cpu-devices=2", "--"),
    *(sys.executable, "-c", script),
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  lines = {*done.stdout.splitlines(), *done.stderr.splitlines()}
  assert lines >= {"[0] 4 [0, 1]", "[1] 4 [0, 1]"}


# --- the document -----------------------------------------------------------


def documented() -> list[str]:
  """Commands of launch/ in docs/cloud.md, and the variables before them."""
  text = (ROOT / "docs/cloud.md").read_text()
  lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
  joined = "\n".join(lines).replace("\\\n", " ")
  return [
    line
    for line in joined.splitlines()
    if line.startswith(("launch/", "python launch/", "export "))
  ]


def dry_runs(lines: Sequence[str]) -> list[str]:
  """The same with --dry-run, before the command that they launch if any."""
  return [
    line
    if line.startswith("export ")
    else " --dry-run -- ".join(line.split(" -- ", 1))
    if " -- " in line
    else f"{line} --dry-run"
    for line in lines
  ]


def test_the_documented_commands_are_right(cloud):
  commands = documented()
  used = {line.split()[0] for line in commands} - {"export", "python"}
  assert used == {f"launch/{name}" for name in LAUNCHERS}
  for folder in ("configs", "agrpo_jax"):
    (cloud.project / folder).symlink_to(ROOT / folder)
  done = subprocess.run(
    ["bash", "-euxc", "\n".join(dry_runs(commands))],
    env={**os.environ, **cloud.path()},
    cwd=cloud.project,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert not cloud.calls
