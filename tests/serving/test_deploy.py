"""The Kubernetes manifest: its arguments and probes, and that the docs name what it needs."""

import yaml
from paths import ROOT

from llamavid_jax.serving.__main__ import parse_arguments
from llamavid_jax.serving.guard import OPEN

DEPLOYMENT, SERVICE = yaml.safe_load_all((ROOT / "deploy" / "serve.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
DOCS = (ROOT / "docs" / "serving.md").read_text()


def test_the_command_takes_its_arguments():
    options = parse_arguments(CONTAINER["args"])
    (port,) = CONTAINER["ports"]
    assert options.port == port["containerPort"] == SERVICE["spec"]["ports"][0]["targetPort"]
    assert POD["terminationGracePeriodSeconds"] > options.deadline
    mounted = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    for path in (options.model, options.uploads, str(options.cache.folder)):
        assert path.startswith(mounted["data"] + "/")
    assert set(mounted) == {volume["name"] for volume in POD["volumes"]}


def test_probes_need_no_key():
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = CONTAINER[name]["httpGet"]
        assert probe["path"] in OPEN and probe["port"] == CONTAINER["ports"][0]["containerPort"]


def test_labels_and_names():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels


def test_the_docs_make_what_it_names():
    secret = CONTAINER["env"][0]["valueFrom"]["secretKeyRef"]
    (claim,) = [volume["persistentVolumeClaim"] for volume in POD["volumes"] if "persistentVolumeClaim" in volume]
    assert f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}=" in DOCS
    assert f"claim `{claim['claimName']}`" in DOCS and "kubectl apply -f deploy/serve.yaml" in DOCS
    build = f"docker build -t {CONTAINER['image']} --build-arg EXTRA=serve ."
    assert build in DOCS and build in (ROOT / "Dockerfile").read_text()
