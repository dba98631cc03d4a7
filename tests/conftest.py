"""Fixtures for several test files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

# Examples take as long as a busy machine makes them take.
settings.register_profile("alise", deadline=None)
settings.load_profile("alise")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, and certificates for the server (localhost) and a client signed by it; `other-ca`."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for ca in ("ca", "other-ca"):
        openssl(
            "req", "-x509", *key, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN={ca}"
        )
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name, ca in (("server", "ca"), ("client", "ca"), ("stranger", "other-ca")):
        openssl(
            "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-extfile", "names",
        )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory):
    """A real Kubernetes API server; skips where there are no binaries."""
    pytest.importorskip("kopf", reason="needs the extra 'operator'")
    from operator_cluster import ApiServer

    server = ApiServer(tmp_path_factory.mktemp("api-server"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def crd(api_server):
    """A cluster with the CRD of ALISEService."""
    from operator_cluster import ROOT, Cluster

    cluster = Cluster(api_server)
    (path,) = (ROOT / "crds").glob("*.yaml")
    cluster.install_crd(path)
    for peering in (ROOT / "charts" / "alise-operator" / "files" / "peering").glob("*.yaml"):
        cluster.install_crd(peering)
    return cluster


@pytest.fixture(scope="session")
def operator_kubeconfig(crd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kubeconfig of the chart's service account, with the chart's rights and no others."""
    from operator_cluster import chart_account_token

    return crd.server.kubeconfig("operator", chart_account_token(crd))
