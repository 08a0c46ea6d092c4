"""deploy/ for training: all files start the run of docs/tpu-pod.md and end and resume it in the same way."""

import dataclasses
import math
import re
import shlex
import subprocess

import pytest
import yaml
from paths import ROOT

import train
from llamavid_jax.parallel.mesh import parse_mesh
from llamavid_jax.training.config import TrainConfig, read_config
from llamavid_jax.training.loop import PREEMPTED
from llamavid_jax.training.pace import HUNG

BAD_INPUT, GRACE, RESTARTS = 2, 600, 50

# Every field that the manifests use, as spelled in the schemas of JobSet v1alpha2 and Kueue v1beta2.
NAMES = """
  action annotations apiVersion args backoffLimit clusterQueue command completions containerName containers
  coveredResources failurePolicy flavors image kind labels limits maxRestarts metadata name namespace
  namespaceSelector nodeLabels nodeSelector nominalQuota onExitCodes onJobFailureReasons operator parallelism
  podFailurePolicy preemption replicas replicatedJobs resourceGroups resources restartPolicy rules spec template
  terminationGracePeriodSeconds value values withinClusterQueue
"""


def read(name: str) -> str:
    return (ROOT / "deploy" / name).read_text(encoding="utf-8")


def told(script: str, command: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Runs `bash script`; stand-ins for `command` (exit code `code`) and Slurm's scontrol print their arguments."""
    stubs = f"{command}() {{ printf '%s\\n' \"$@\"; return {code}; }}; scontrol() {{ echo scontrol $@; }}"
    line = f"{stubs}; export -f {command} scontrol; exec bash deploy/{script}"
    env = {"PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def jobset() -> dict:
    return yaml.safe_load(read("jobset.yaml"))["spec"]


def pod() -> dict:
    return jobset()["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def xpk() -> list[str]:
    done = told("xpk.sh", "xpk", PROJECT="p", ZONE="z", CLUSTER="c", IMAGE="i", BUCKET="BUCKET")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def slurm(code: int = 0, restarts: int = 0) -> subprocess.CompletedProcess:
    return told("slurm.sh", "srun", code, SHARED="gs://BUCKET", SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))


def arguments() -> dict[str, list[str]]:
    """The arguments that each of the files gives to train.py."""
    (command,) = (line.removeprefix("--command=") for line in xpk() if line.startswith("--command="))
    managed = yaml.safe_load(read("skypilot.yaml"))["run"].replace("\\\n", " ").replace("$BUCKET", "BUCKET")
    page = (ROOT / "docs" / "tpu-pod.md").read_text(encoding="utf-8").replace("$BUCKET", "BUCKET")
    return {
        "docs/tpu-pod.md": shlex.split(re.search(r'^RUN=".*?train\.py (.*?)>>', page, re.DOTALL | re.MULTILINE)[1]),
        "jobset.yaml": pod()["containers"][0]["args"],
        "xpk.sh": shlex.split(command.partition("llamavid-train ")[2]),
        "skypilot.yaml": shlex.split(managed.partition("train.py ")[2]),
        "slurm.sh": slurm().stdout.split("llamavid-train\n")[1].splitlines(),
    }


def configs() -> dict[str, TrainConfig]:
    read_by_us = {name: train.parse_arguments(given) for name, given in arguments().items()}
    assert all(options.distributed for options in read_by_us.values())
    return {name: read_config(options.config, options.overrides) for name, options in read_by_us.items()}


def test_one_run_everywhere(monkeypatch):
    monkeypatch.chdir(ROOT)
    every = configs()
    page, gpus = every["docs/tpu-pod.md"], every.pop("slurm.sh")
    assert all(config == page for config in every.values())
    assert (
        dataclasses.replace(gpus, mesh=page.mesh, training=page.training) == page
    )  # another mesh, other micro-batches
    assert gpus.training == dataclasses.replace(page.training, micro_batches=gpus.training.micro_batches)
    for config, devices in ((page, 64), (gpus, 16)):
        axes = parse_mesh(config.mesh)
        assert math.prod(axes.values()) == devices
        assert config.training.batch_size % (config.training.micro_batches * axes["fsdp"]) == 0


def test_the_slice_has_the_chips_of_the_mesh():
    job, selector = jobset()["replicatedJobs"][0]["template"]["spec"], pod()["nodeSelector"]
    chips = job["parallelism"] * pod()["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"] and chips == 64
    assert math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))) == chips
    assert "--tpu-type=v5litepod-64" in xpk()
    assert yaml.safe_load(read("skypilot.yaml"))["resources"]["accelerators"] == "tpu-v5litepod-64"
    kinds = {}
    for one in yaml.safe_load_all(read("kueue.yaml")):
        kinds.setdefault(one["kind"], []).append(one)
    (flavor,), (cluster,), (local,) = kinds["ResourceFlavor"], kinds["ClusterQueue"], kinds["LocalQueue"]
    (group,) = cluster["spec"]["resourceGroups"]
    labels = yaml.safe_load(read("jobset.yaml"))["metadata"]["labels"]
    assert flavor["spec"]["nodeLabels"] == selector
    assert group["flavors"][0]["name"] == flavor["metadata"]["name"]
    assert group["flavors"][0]["resources"] == [{"name": "google.com/tpu", "nominalQuota": chips}]
    assert cluster["spec"]["preemption"] == {"withinClusterQueue": "LowerPriority"}
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    assert labels["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    value = {one["metadata"]["name"]: one["value"] for one in kinds["WorkloadPriorityClass"]}
    assert value[labels["kueue.x-k8s.io/priority-class"]] < value["urgent"]


def test_what_ends_a_run_and_what_starts_it_again():
    policy, job = jobset()["failurePolicy"], jobset()["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {
        "containerName": pod()["containers"][0]["name"],
        "operator": "In",
        "values": [BAD_INPUT],
    }
    assert policy["rules"][0]["action"] == "FailJobSet" and policy["maxRestarts"] == RESTARTS
    assert job["backoffLimit"] == 0 and pod()["restartPolicy"] == "Never"
    assert pod()["terminationGracePeriodSeconds"] == GRACE
    assert {
        f"--restart-on-exit-codes=1,{HUNG}",
        f"--max-restarts={RESTARTS}",
        f"--termination-grace-period-seconds={GRACE}",
    } <= set(xpk())
    recovery = yaml.safe_load(read("skypilot.yaml"))["resources"]["job_recovery"]
    assert {HUNG, PREEMPTED} <= set(recovery["recover_on_exit_codes"]) and BAD_INPUT not in recovery[
        "recover_on_exit_codes"
    ]
    assert f"#SBATCH --signal=TERM@{GRACE}\n" in read("slurm.sh")


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, False),
        (BAD_INPUT, 0, False),
        (1, 0, True),
        (PREEMPTED, 0, True),
        (137, 3, True),
        (HUNG, 0, True),
        (134, RESTARTS, False),
    ],
)
def test_slurm_queues_what_was_stopped(code, restarts, again):
    done = slurm(code, restarts)
    assert done.returncode == code and ("scontrol requeue 7" in done.stdout) == again


def test_names_are_those_of_the_schemas():
    def names(value):
        if isinstance(value, dict):
            yield from (key for key in value if "/" not in key and "." not in key)
            value = list(value.values())
        if isinstance(value, list):
            yield from (name for one in value for name in names(one))

    for file in ("jobset.yaml", "kueue.yaml"):
        assert not set(names(list(yaml.safe_load_all(read(file))))) - set(NAMES.split())


def test_the_page_has_every_file():
    page = (ROOT / "docs" / "tpu-pod.md").read_text(encoding="utf-8")
    for file in ("jobset.yaml", "kueue.yaml", "xpk.sh", "skypilot.yaml", "slurm.sh"):
        assert f"](../deploy/{file})" in page and f"deploy/{file}" in page.replace(f"](../deploy/{file})", "")
