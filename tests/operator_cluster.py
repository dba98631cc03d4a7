"""A real API server for tests, a client for it, and the operator as a process.

The binaries kube-apiserver and etcd come from KUBEBUILDER_ASSETS, the places where envtest keeps
them, or PATH; without them the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "alise-operator"
HOW = (
    "no kube-apiserver and etcd: set KUBEBUILDER_ASSETS to a folder that has both "
    "(`setup-envtest use -p path` prints one), see docs/operator.md"
)
# Generous, as tests share the machine: only a failure waits this long.
WAIT_S = float(os.environ.get("ALISE_TEST_WAIT_S", "60"))
SERVICES = "apis/serving.alise.dev/v1alpha1"
# All that the chart makes on request.
CHART_EXTRAS = (
    *("--set", "podMonitor.enabled=true", "--set", "dashboard.enabled=true"),
    *("--set", "alerts.enabled=true"),
)
_START_S = 90
_ADMIN_TOKEN = "admin-token-of-tests"


def binary(name: str) -> str | None:
    """Return the path of a Kubernetes binary, None if there is none."""
    folders = [Path(os.environ["KUBEBUILDER_ASSETS"])] if "KUBEBUILDER_ASSETS" in os.environ else []
    folders.append(Path("/usr/local/kubebuilder/bin"))
    cache = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    folders += sorted((cache / "kubebuilder-envtest" / "k8s").glob("*"), reverse=True)
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    return shutil.which(name)


def needs(*names: str) -> list[str]:
    """Return the paths of binaries, or skip the test."""
    paths = [binary(name) for name in names]
    if missing := [name for name, path in zip(names, paths, strict=True) if path is None]:
        if set(missing) & {"kube-apiserver", "etcd"}:
            pytest.skip(HOW)
        pytest.skip(f"not installed: {', '.join(missing)}")
    return [path for path in paths if path]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(check: Callable[[], Any], what: str = "", wait_s: float = WAIT_S) -> Any:
    """Return the first true value of `check`; fails with its last one."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            value, error = check(), None
        except (LookupError, ValueError, AssertionError, StopIteration, httpx.HTTPError) as caught:
            value, error = None, caught
        if value:
            return value
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {wait_s:g} s: {what or check}; last: {error or value!r}")
        time.sleep(0.1)


class ApiServer:
    """etcd and kube-apiserver in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._apiserver, self._etcd = needs("kube-apiserver", "etcd")
        self._ports = [free_port() for _ in range(3)]
        self.url = f"https://127.0.0.1:{self._ports[2]}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._prepare()

    def _prepare(self) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs openssl")
        key = str(self.folder / "sa.key")
        for command in (["genrsa", "-out", key, "2048"], ["rsa", "-in", key, "-pubout"]):
            output = [] if command[0] == "genrsa" else ["-out", str(self.folder / "sa.pub")]
            subprocess.run(["openssl", *command, *output], check=True, capture_output=True)
        (self.folder / "tokens.csv").write_text(f"{_ADMIN_TOKEN},admin,admin,system:masters\n")

    def start(self) -> None:
        """Start what does not run; returns when the API server is ready."""
        client, peer, secure = self._ports
        etcd = f"http://127.0.0.1:{client}"
        peers = f"http://127.0.0.1:{peer}"
        self._spawn(
            "etcd",
            [
                self._etcd,
                *(f"--data-dir={self.folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=error"),
                *(f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}"),
                *(f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}"),
                f"--initial-cluster=default={peers}",
            ],
        )
        folder = self.folder
        self._spawn(
            "kube-apiserver",
            [
                self._apiserver,
                *(f"--etcd-servers={etcd}", f"--secure-port={secure}"),
                *("--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"),
                *("--endpoint-reconciler-type=none", f"--cert-dir={folder / 'certs'}"),
                *("--authorization-mode=RBAC", f"--token-auth-file={folder / 'tokens.csv'}"),
                "--service-cluster-ip-range=10.0.0.0/16",
                # No controller makes accounts for the pods that tests make up.
                "--disable-admission-plugins=ServiceAccount",
                "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={folder / 'sa.pub'}",
                f"--service-account-signing-key-file={folder / 'sa.key'}",
            ],
        )
        deadline_s = time.monotonic() + _START_S
        while not self._is_ready():
            if (
                time.monotonic() > deadline_s
                or self._processes["kube-apiserver"].poll() is not None
            ):
                log = (folder / "kube-apiserver.log").read_text()[-3000:]
                pytest.fail(f"the API server does not start: {log}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            with self.client() as client:
                return client.get("readyz").status_code == 200
        except (httpx.HTTPError, OSError):
            return False

    def _spawn(self, name: str, command: list[str]) -> None:
        if name in self._processes and self._processes[name].poll() is None:
            return
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self, *names: str) -> None:
        """Stop the named ones, or all."""
        for name in names or list(reversed(self._processes)):
            process = self._processes.pop(name, None)
            if process is None:
                continue
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def client(self, token: str = _ADMIN_TOKEN) -> httpx.Client:
        """Return an HTTP client of the API server, as administrator by default."""
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            verify=False,
            timeout=30,
        )

    def kubeconfig(self, name: str, token: str = _ADMIN_TOKEN, server: str | None = None) -> Path:
        """Write a kubeconfig; `server` is another address, such as a proxy's."""
        cluster: dict[str, Any] = {"server": server or self.url}
        if server is None:
            cluster["insecure-skip-tls-verify"] = True
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(yaml.safe_dump(content))
        return path


class Cluster:
    """What tests do to the cluster, by path: `api/v1/namespaces/NAME/pods`."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.http = server.client()

    def get(self, path: str) -> dict[str, Any] | None:
        answer = self.http.get(path)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return answer.json()  # type: ignore[no-any-return]

    def items(self, path: str) -> list[dict[str, Any]]:
        return (self.get(path) or {"items": []})["items"]  # type: ignore[no-any-return]

    def create(self, path: str, body: Mapping[str, Any], **params: str) -> httpx.Response:
        return self.http.post(path, json=body, params=params)

    def patch(self, path: str, body: Any, kind: str = "merge-patch+json") -> httpx.Response:
        headers = {"Content-Type": f"application/{kind}"}
        return self.http.patch(path, content=json.dumps(body), headers=headers)

    def apply(self, path: str, body: Mapping[str, Any], **params: str) -> httpx.Response:
        """Apply on the server's side, as the user."""
        return self.http.patch(
            path,
            content=json.dumps(body),
            params={"fieldManager": "user", "force": "true", **params},
            headers={"Content-Type": "application/apply-patch+yaml"},
        )

    def delete(self, path: str) -> httpx.Response:
        return self.http.delete(path)

    def namespace(self, name: str) -> str:
        """Make a namespace; returns its name."""
        body = {"metadata": {"name": name}}
        assert self.create("api/v1/namespaces", body).status_code in (201, 409)
        return name

    def install_crd(self, path: Path) -> None:
        """Install a CRD and wait until it is served."""
        for body in yaml.safe_load_all(path.read_text()):
            name = body["metadata"]["name"]
            where = f"apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
            answer = self.apply(where, body)
            assert answer.is_success, answer.text
            group, plural = body["spec"]["group"], body["spec"]["names"]["plural"]
            (version, *_) = [v["name"] for v in body["spec"]["versions"] if v["storage"]]
            eventually(lambda g=group, v=version, p=plural: self.get(f"apis/{g}/{v}/{p}"))

    def remove_crd(self, name: str) -> None:
        """Remove a CRD and wait until it is gone."""
        where = f"apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
        self.delete(where)
        eventually(lambda: self.get(where) is None)

    def kubectl(
        self, *arguments: str, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as administrator."""
        (kubectl,) = needs("kubectl")
        config = self.server.kubeconfig("admin")
        return subprocess.run(
            [kubectl, "--kubeconfig", str(config), *arguments],
            capture_output=True,
            text=True,
            input=stdin,
            timeout=60,
        )


class Service:
    """One ALISEService in a test, and its children."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name
        self.path = f"{SERVICES}/namespaces/{namespace}/aliseservices/{name}"

    def child(self, plural: str, name: str | None = None, api: str = "apis/apps/v1") -> Any:
        where = f"{api}/namespaces/{self.namespace}/{plural}/{name or self.name}"
        return self.cluster.get(where)

    @property
    def body(self) -> dict[str, Any]:
        found = self.cluster.get(self.path)
        assert found is not None
        return found

    def condition(self, name: str) -> dict[str, Any]:
        conditions = self.body.get("status", {}).get("conditions", [])
        return next(item for item in conditions if item["type"] == name)

    def patch(self, **spec: Any) -> None:
        answer = self.cluster.patch(self.path, {"spec": spec})
        assert answer.is_success, answer.text

    def has_settled(self) -> bool:
        body = self.body
        return body.get("status", {}).get("observedGeneration") == body["metadata"]["generation"]

    def settle(self) -> None:
        eventually(self.has_settled, f"{self.name} is reconciled")


class OperatorProcess:
    """`alise operator run` as a process."""

    def __init__(self, kubeconfig: Path, folder: Path, *options: str, **environment: str) -> None:
        self.port = free_port()
        self._log_path = folder / f"operator-{self.port}.log"
        self._command = [sys.executable, "-m", "alise_scheduler", "operator", "run"]
        self._command += ["--port", str(self.port), "--log-format", "text", *options]
        path = os.pathsep.join(str(ROOT / part) for part in ("scheduler_sidecar", "operator"))
        self._environment = {
            **os.environ,
            "PYTHONPATH": path,
            "KUBECONFIG": str(kubeconfig),
            "ALISE_OPERATOR_DISCOVERY_S": "1",
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        with self._log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log
            )
        if wait:
            eventually(self._is_ready, "the operator is ready")

    def _is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"the operator has ended: {self.log[-4000:]}")
        return self.get("readyz").status_code == 200

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it as Kubernetes would; returns its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait until it ends; returns its exit status."""
        assert self.process is not None
        return self.process.wait(WAIT_S)

    def get(self, page: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}/{page}", timeout=5)

    def metric(self, start: str) -> float:
        """Return the sum of the samples whose line starts so."""
        lines = self.get("metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))

    @property
    def log(self) -> str:
        return self._log_path.read_text()


@contextmanager
def running(operator: OperatorProcess) -> Iterator[OperatorProcess]:
    """Run an operator inside the block; its log is shown if the test fails."""
    try:
        operator.start()
        yield operator
    except BaseException:
        print(operator.log[-6000:])
        raise
    finally:
        operator.stop()


@contextmanager
def restarted(operator: OperatorProcess) -> Iterator[None]:
    """Start the operator again whenever it fails, as the kubelet does."""
    stopping = threading.Event()

    def restart() -> None:
        while not stopping.wait(0.2):
            if operator.process is not None and operator.process.poll() == 1:
                operator.start(wait=False)

    kubelet = threading.Thread(target=restart)
    kubelet.start()
    try:
        yield
    finally:
        stopping.set()
        kubelet.join()


def render_chart(*options: str, release: str = "alise") -> list[dict[str, Any]]:
    """Return the manifests of the chart."""
    (helm,) = needs("helm")
    command = [helm, "template", release, str(CHART), "--namespace", "alise-system"]
    command += ["--kube-version", "1.34.0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [body for body in yaml.safe_load_all(done.stdout) if body]


def chart_account_token(cluster: Cluster, *options: str, release: str = "alise") -> str:
    """Return a token of the chart's service account, made with the chart's roles."""
    cluster.namespace("alise-system")
    account = ""
    for body in render_chart(*options, release=release):
        metadata = body["metadata"]
        if body["kind"] == "ServiceAccount":
            account = metadata["name"]
            path = f"api/v1/namespaces/alise-system/serviceaccounts/{account}"
        elif body["apiVersion"].startswith("rbac."):
            plural = f"{body['kind'].lower()}s"
            where = f"namespaces/{metadata['namespace']}/" if "namespace" in metadata else ""
            path = f"apis/{body['apiVersion']}/{where}{plural}/{metadata['name']}"
        else:
            continue
        answer = cluster.apply(path, body)
        assert answer.is_success, answer.text
    path = f"api/v1/namespaces/alise-system/serviceaccounts/{account}/token"
    answer = cluster.create(
        path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest"}
    )
    assert answer.is_success, answer.text
    return str(answer.json()["status"]["token"])
