"""Upgrade and uninstallation of the chart: engines serve on, and only CRDs are left."""

from __future__ import annotations

import json

import cluster
import pytest
from cluster import SYSTEM_NAMESPACE, failed, load, restarts, run, uids, wait_ready
from conftest import RELEASE, helm, install


def state(service: str) -> tuple[set[str], int, int]:
    """Return what changes with any restart."""
    return uids(service), restarts(service, "engine"), restarts(service, "predictor")


def test_an_upgrade_restarts_no_engine(smol: str) -> None:
    before, resolved = state(smol), cluster.status(smol)["resolvedImages"]
    with load(smol) as results:
        # As a new version does it: another operator process, other default images.
        new = ("defaultImages.engineCpu=alise/next:1", "defaultImages.predictor=alise/next:1")
        helm("upgrade", "--reuse-values", *[f"--set-string={each}" for each in new])
        cluster.patch(smol, scheduling={"gammaMilli": 500})
        generation = cluster.objects("alise", smol)["metadata"]["generation"]
        cluster.eventually(
            lambda: cluster.status(smol)["observedGeneration"] == generation, "it is seen", 120
        )
    assert failed(results) == []
    assert cluster.status(smol)["resolvedImages"] == resolved
    assert state(smol) == before


def left() -> set[str]:
    """Return all objects of the release, and all in its namespace that Kubernetes did not make."""
    kinds = run("kubectl", "api-resources", "--verbs=list", "-o", "name").split()
    names = ",".join(kind for kind in kinds if not kind.startswith("events"))
    get = ("kubectl", "get", names, "-o", "json", "--ignore-not-found")
    found = set()
    for where in (
        ("--all-namespaces", "-l", f"app.kubernetes.io/instance={RELEASE}"),
        ("--namespace", SYSTEM_NAMESPACE),
    ):
        for item in json.loads(run(*get, *where))["items"]:
            meta = item["metadata"]
            if where[0] == "--all-namespaces" or meta.get("namespace"):
                found.add(f"{item['kind']}/{meta['name']}")
    return found - {"ServiceAccount/default", "ConfigMap/kube-root-ca.crt"}


@pytest.mark.timeout(600)
def test_uninstalled_only_crds_are_left_and_engines_serve_on(smol: str) -> None:
    before = state(smol)
    with load(smol) as results:
        helm("uninstall")
        crds = {
            f"CustomResourceDefinition/{name}"
            for name in (
                "aliseservices.serving.alise.dev",
                "clusterkopfpeerings.kopf.dev",
                "kopfpeerings.kopf.dev",
            )
        }
        cluster.eventually(lambda: left() == crds, "only the CRDs are left", 60)
        install()
        wait_ready(smol)
    assert failed(results) == []
    assert state(smol) == before
