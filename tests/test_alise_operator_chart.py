"""The Helm chart: what it renders, and that what is generated or copied is up to date."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from alise_operator.api.crd import FILE_NAME
from operator_cluster import (
    CHART,
    CHART_EXTRAS,
    ROOT,
    Cluster,
    OperatorProcess,
    eventually,
    needs,
    render_chart,
    running,
)

DIGEST = f"sha256:{'0' * 64}"


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    (path,) = needs("helm")
    return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=120)


def kinds(manifests: list[dict[str, Any]]) -> list[str]:
    return [manifest["kind"] for manifest in manifests]


def one(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def test_the_charts_crd_is_the_one_in_crds() -> None:
    copy = CHART / "files" / "crds" / FILE_NAME
    assert copy.read_text() == (ROOT / "crds" / FILE_NAME).read_text(), (
        "run: make operator-generate"
    )


def test_the_readme_is_the_generated_one() -> None:
    generated = runpy.run_path(str(CHART / "generate_readme.py"))["readme"]()
    assert (CHART / "README.md").read_text() == generated, "run: make operator-generate"


def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        here = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict) and value and name not in ("resources", "labels"):
            yield from leaves(value, here)
        else:
            yield here


def test_each_value_is_described_and_in_the_schema() -> None:
    text = (CHART / "values.yaml").read_text()
    described = dict(runpy.run_path(str(CHART / "generate_readme.py"))["described"](text))
    schema = json.loads((CHART / "values.schema.json").read_text())
    for path in leaves(yaml.safe_load(text)):
        assert path in described, f"{path} has no comment"
        node = schema
        for name in path.split("."):
            node = node["properties"][name]


def test_lint() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "value",
    ["image.pullPolicy=Sometimes", "image.digest=latest", "operator.workers=0", "unknown=1"],
)
def test_the_schema_refuses(value: str) -> None:
    done = helm("template", "x", str(CHART), "--kube-version", "1.34.0", "--set", value)
    assert done.returncode != 0
    assert "schema" in done.stderr


def test_crds_can_be_left_out_and_are_kept() -> None:
    crds = [m for m in render_chart() if m["kind"] == "CustomResourceDefinition"]
    assert {crd["metadata"]["name"] for crd in crds} == {
        "aliseservices.serving.alise.dev",
        "clusterkopfpeerings.kopf.dev",
        "kopfpeerings.kopf.dev",
    }
    for crd in crds:
        assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    without = render_chart("--set", "crds.install=false", "--set", "crds.installPeering=false")
    assert "CustomResourceDefinition" not in kinds(without)


def test_the_operator_meets_the_restricted_pod_security_standard() -> None:
    pod = one(render_chart(), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def test_one_replica_that_is_replaced_and_not_doubled() -> None:
    content = one(render_chart(), "Deployment")["spec"]
    assert content["replicas"] == 1
    assert content["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize(
    ("options", "image"),
    [
        ((), "alise/operator:0.1.0"),
        (("--set", "image.tag=2.0.0"), "alise/operator:2.0.0"),
        (("--set", f"image.digest={DIGEST}"), f"alise/operator@{DIGEST}"),
    ],
    ids=["default", "tag", "digest"],
)
def test_the_image(options: tuple[str, ...], image: str) -> None:
    pod = one(render_chart(*options), "Deployment")["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == image


def test_a_released_chart_names_the_images_that_were_pushed(tmp_path: Path) -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    chart = tmp_path / "charts" / "alise-operator"
    shutil.copytree(CHART, chart)
    (script,) = [s["run"] for s in jobs["chart"]["steps"] if s.get("name", "").startswith("Name")]
    environment = {**os.environ, "REGISTRY": "host/path", "VERSION": f"v{version}"}
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, check=True, timeout=60)
    done = helm("template", "x", str(chart), "--kube-version", "1.34.0")
    assert done.returncode == 0, done.stderr
    found = set(re.findall(r"host/path/([a-z-]+):", done.stdout))
    pushed = jobs["images"]["strategy"]["matrix"]["include"]
    assert found == {name for group in pushed for name in group["names"].split()}
    assert f"--engine-image=host/path/engine:{version}" in done.stdout
    assert f"--engine-cpu-image=host/path/engine-cpu:{version}" in done.stdout
    assert f"--predictor-image=host/path/sidecar:{version}" in done.stdout
    assert f'image: "host/path/operator:{version}"' in done.stdout


def test_the_operator_knows_the_options_that_the_chart_passes() -> None:
    pytest.importorskip("kopf", reason="needs the extra 'operator'")
    import typer
    from alise_operator.cli import app

    (container,) = one(
        render_chart(
            *("--set", "watchNamespaces={a,b}", "--set", "defaultImages.engine=e"),
            *("--set", "defaultImages.engineCpu=c", "--set", "defaultImages.predictor=p"),
        ),
        "Deployment",
    )["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["alise", "operator", "run"]
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    with command.make_context("run", list(container["args"])) as context:
        assert context.params["namespaces"] == ["a", "b"]
        assert context.params["peering"] == "alise-operator"
        assert context.params["engine_cpu_image"] == "c"


def rules(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [rule for m in manifests if m["kind"] == kind for rule in m["rules"]]


@pytest.mark.parametrize("options", [(), ("--set", "watchNamespaces={a,b}")], ids=["all", "some"])
def test_rights_have_no_wildcards_and_reach_no_secrets(options: tuple[str, ...]) -> None:
    manifests = render_chart(*options)
    found = rules(manifests, "ClusterRole") + rules(manifests, "Role")
    assert found
    for rule in found:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert "secrets" not in rule["resources"]
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_with_namespaces_there_are_no_rights_in_the_cluster() -> None:
    manifests = render_chart("--set", "watchNamespaces={a,b}")
    assert not {"ClusterRole", "ClusterRoleBinding"} & set(kinds(manifests))
    roles = [m["metadata"]["namespace"] for m in manifests if m["kind"] == "Role"]
    assert roles == ["a", "b"]


def test_dashboard_and_alerts_are_rendered_as_they_are_in_the_files() -> None:
    manifests = render_chart(*CHART_EXTRAS)
    (dashboard,) = [m for m in manifests if m["metadata"]["name"].endswith("-dashboard")]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = CHART / "files"
    rendered = json.loads(dashboard["data"]["alise.json"])
    assert rendered == json.loads((files / "dashboard.json").read_text())
    rules = one(manifests, "PrometheusRule")["spec"]
    assert rules == yaml.safe_load((files / "alerts.yaml").read_text())


def test_services_keep_their_namespace_when_they_are_scraped() -> None:
    # Or an alert about team-a/chat would speak of alise-system/chat.
    (endpoint,) = one(render_chart(*CHART_EXTRAS), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True


@pytest.mark.cluster
def test_upgrade_and_uninstall_keep_all_services(crd: Cluster, tmp_path: Path) -> None:
    config = str(crd.server.kubeconfig("admin"))
    where = ("--kubeconfig", config, "--namespace", "helm-test")
    # The CRDs are there already, put by another test: Helm may take over what it can adopt.
    for body in crd.items("apis/apiextensions.k8s.io/v1/customresourcedefinitions"):
        if body["metadata"]["name"].endswith(("alise.dev", "kopf.dev")):
            crd.remove_crd(body["metadata"]["name"])
    installed = helm("install", "readme", str(CHART), *where, "--create-namespace")
    assert installed.returncode == 0, installed.stderr
    try:
        minimal = str(ROOT / "examples" / "minimal.yaml")
        applied = eventually(
            lambda: (done := crd.kubectl("apply", "-f", minimal)).returncode == 0 and done
        )
        assert "created" in applied.stdout
        path = "apis/serving.alise.dev/v1alpha1/namespaces/default/aliseservices/qwen"
        # No kubelet runs the chart's pod here: the same command runs with the same account.
        account = "api/v1/namespaces/helm-test/serviceaccounts/readme-alise-operator/token"
        token = crd.create(account, {"kind": "TokenRequest"}).json()["status"]["token"]
        kubeconfig = crd.server.kubeconfig("installed", token)
        with running(OperatorProcess(kubeconfig, tmp_path, "--peering", "alise-operator")):
            row = eventually(
                lambda: (
                    "PodsPending" in (shown := crd.kubectl("get", "alise").stdout)
                    and shown.splitlines()[1].split()
                )
            )
        assert row[:2] == ["qwen", "False"]
        assert "http://qwen.default.svc:8000/v1" in row
        before = crd.get(path)
        newer = tmp_path / "newer"
        shutil.copytree(CHART, newer)
        text = (newer / "Chart.yaml").read_text()
        (newer / "Chart.yaml").write_text(text.replace("version: 0.1.0", "version: 0.1.1", 1))
        upgraded = helm("upgrade", "readme", str(newer), *where)
        assert upgraded.returncode == 0, upgraded.stderr
        assert crd.get(path) == before
        deployment = crd.get("apis/apps/v1/namespaces/helm-test/deployments/readme-alise-operator")
        assert deployment is not None
        assert deployment["metadata"]["labels"]["helm.sh/chart"] == "alise-operator-0.1.1"
    finally:
        removed = helm("uninstall", "readme", *where)
    assert removed.returncode == 0, removed.stderr
    assert crd.get(path) == before  # the CRD is kept, and with it all services
    crd.delete(path)
