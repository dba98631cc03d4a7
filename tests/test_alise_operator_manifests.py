"""From specs to manifests: golden files for whole services, assertions for what must hold."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from alise_operator.manifests.container import USER_ID
from alise_operator.manifests.engine import engine_arguments
from alise_operator.manifests.kinds import HPA, KINDS, LWS, OPTIONAL, SCALED_OBJECT, kind_of
from alise_operator.manifests.merge import contains, merged
from alise_operator.manifests.network import network_policy, url
from alise_operator.manifests.pod import pod_template
from alise_operator.manifests.predictor import policy_knobs
from alise_operator.manifests.render import render
from alise_operator.manifests.service_view import ServiceView
from hypothesis import given
from hypothesis import strategies as st
from operator_fixtures import EXAMPLES, ROOT, example, spec, view

GOLDEN = ROOT / "tests" / "golden" / "operator"
# Beside the examples, what none of them shows.
MORE: dict[str, dict[str, Any]] = {
    "multi-node": {
        "engine": {
            "parallelism": {"tensor": 8, "pipeline": 2},
            "accelerator": {"count": 16, "perNode": 8},
        },
        "exposure": {"inferencePool": {"endpointPickerName": "picker"}},
    },
    "volumes": {
        "model": {"uri": "pvc://models/llama/8b", "servedName": "llama"},
        "predictor": {"modelRef": {"claimName": "predictors"}},
        "scheduling": {"policy": "SpeculativeSRTF", "preemption": {"enabled": False}},
        "podTemplate": {
            "labels": {"team": "search"},
            "spec": {"containers": [{"name": "engine", "env": [{"name": "A", "value": "b"}]}]},
        },
        "rollout": {"revision": "2"},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
    },
}
CASES = {path.stem: example(path.stem)["spec"] for path in EXAMPLES} | MORE


def manifests(service: ServiceView) -> dict[str, Any]:
    return {manifest["kind"]: manifest for manifest in render(service).manifests}


def pod_of(**fields: Any) -> dict[str, Any]:
    return pod_template(view(**fields))["spec"]


def engine_of(**fields: Any) -> dict[str, Any]:
    return pod_of(**fields)["containers"][0]


def predictor_of(**fields: Any) -> dict[str, Any]:
    return pod_of(**fields)["initContainers"][-1]


def arguments(**fields: Any) -> str:
    return " ".join(engine_arguments(view(**fields)))


@pytest.mark.parametrize("name", CASES)
def test_manifests_are_as_recorded(name: str) -> None:
    rendered = render(view(name, **CASES[name])).manifests
    text = yaml.safe_dump_all(rendered, sort_keys=False, width=100)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("ALISE_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # Compared as values: the text's anchors and folding are nobody's business.
    assert list(yaml.safe_load_all(path.read_text())) == list(yaml.safe_load_all(text)), (
        f"if the change is wanted: ALISE_UPDATE_GOLDEN=1 pytest {__file__}"
    )


@pytest.mark.parametrize("name", CASES)
def test_every_child_is_owned_labelled_and_in_order(name: str) -> None:
    service = view(name, **CASES[name])
    rendered = render(service).manifests
    order = [KINDS.index(kind_of(manifest)) for manifest in rendered]
    assert order == sorted(order)
    for manifest in rendered:
        metadata = manifest["metadata"]
        (owner,) = metadata["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (service.uid, True)
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "alise-operator"
        assert len(metadata["name"]) <= 63


def test_rendering_is_the_same_each_time() -> None:
    service = view(**CASES["production"])
    assert render(service) == render(service)


@pytest.mark.parametrize("container", ["engine", "predictor"])
def test_pods_meet_the_restricted_pod_security_standard(container: str) -> None:
    pod = pod_of(model={"uri": "pvc://c/p"}, predictor={"modelRef": {"claimName": "c"}})
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(pod)
    assert not any("hostPath" in volume for volume in pod["volumes"])
    for item in [*pod["initContainers"], *pod["containers"]]:
        security = item["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["readOnlyRootFilesystem"] is True


def test_pods_have_no_token_no_service_links_and_an_account_of_their_own() -> None:
    pod = pod_of()
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["serviceAccountName"] == "qwen"
    assert manifests(view())["ServiceAccount"]["automountServiceAccountToken"] is False


def test_the_predictor_cannot_hold_the_pod_back() -> None:
    predictor = predictor_of()
    assert predictor["restartPolicy"] == "Always"  # a native sidecar
    assert {"startupProbe", "readinessProbe"}.isdisjoint(predictor)
    assert "readinessProbe" in engine_of()


def test_engine_and_predictor_share_a_socket_and_its_owner() -> None:
    engine, predictor = engine_of(), predictor_of()
    address = "unix:///run/alise/scheduler.sock"
    assert engine["args"][engine["args"].index("--alise-scheduler") + 1] == address
    assert predictor["args"][predictor["args"].index("--listen") + 1] == address
    for container in (engine, predictor):
        assert {"name": "run", "mountPath": "/run/alise"} in container["volumeMounts"]
        assert "runAsUser" not in container["securityContext"]  # the pod's: the same for both


@pytest.fixture
def volumes() -> Iterator[Path]:
    """A claim, and an emptyDir as the kubelet makes it: root's, writable for the pod's group."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to run the script as another user than a folder's owner")
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "claim" / "alise").mkdir(parents=True)
        (folder / "state").mkdir()
        shutil.chown(folder / "state", 0, USER_ID)
        (folder / "state").chmod(0o2775)
        yield folder


def seeded(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the seed container's command as the pod's user, on `volumes`."""
    seed = pod_of(predictor={"modelRef": {"claimName": "c"}})["initContainers"][0]
    source, target = str(folder / "claim" / "alise"), str(folder / "state")
    assert seed["args"] == ["/seed/alise", "/var/lib/alise"]
    python = shutil.which("python3", path=os.defpath)
    if python is None:
        pytest.skip("needs a system Python: that of the tests may be closed to other users")
    return subprocess.run(
        [python, *seed["command"][1:], source, target],
        user=USER_ID,
        group=USER_ID,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_predictor_is_seeded_into_a_folder_that_root_owns(volumes: Path) -> None:
    trained = volumes / "claim" / "alise"
    (trained / "more").mkdir()
    (trained / "samples.sqlite").write_text("trained")
    (trained / "more" / "file").write_text("too")
    for path in (trained / "more" / "file", trained / "more"):
        path.chmod(0o555)  # as on a volume that is only read
    done = seeded(volumes)
    assert done.returncode == 0, done.stderr
    state = volumes / "state"
    found = {str(p.relative_to(state)) for p in state.rglob("*") if p.is_file()}
    assert found == {"samples.sqlite", "more/file"}
    assert (state / "samples.sqlite").read_text() == "trained"
    assert (state / "samples.sqlite").stat().st_uid == USER_ID
    # The same once more, as after a restart of the node: what was learned since is newer.
    (state / "samples.sqlite").write_text("learned")
    assert seeded(volumes).returncode == 0
    assert (state / "samples.sqlite").read_text() == "learned"


def test_a_seed_that_is_not_there_says_so(volumes: Path) -> None:
    done = seeded(volumes)
    assert done.returncode == 1
    assert "no files in 'alise': predictor.modelRef.path must name the folder" in done.stderr


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "org/model --host 0.0.0.0 --port 8000 --served-model-name org/model"),
        ({"model": {"revision": "main"}}, "org/model --revision main"),
        ({"model": {"uri": "s3://b/m"}}, "s3://b/m --load-format runai_streamer"),
        ({"model": {"uri": "pvc://c/a/b"}}, "/models/a/b --host"),
        ({"model": {"uri": "oci://models/x:1"}}, "/models --host"),
        (
            {"model": {"uri": "embedded://smollm2-135m-instruct"}},
            "--served-model-name smollm2-135m-instruct",
        ),
        ({"model": {"servedName": "m"}}, "--served-model-name m"),
        ({"engine": {"maxModelLen": 2048}}, "--max-model-len 2048"),
        ({"engine": {"gpuMemoryUtilizationPercent": 85}}, "--gpu-memory-utilization 0.85"),
        (
            {"engine": {"parallelism": {"tensor": 2}, "accelerator": {"count": 2}}},
            "--tensor-parallel-size 2",
        ),
        ({"engine": {"kvCacheDtype": "fp8"}}, "--kv-cache-dtype fp8"),
        ({"engine": {"args": ["--seed", "1"]}}, "--seed 1"),
        ({"lifecycle": {"drainSeconds": 60}}, "--alise-drain-s 60"),
        ({"scheduling": {"preemption": {"enabled": False}}}, "--no-alise-preemption "),
        (
            {"scheduling": {"preemption": {"marginSeconds": 9}}},
            "--alise-preemption --alise-preemption-margin-s 9",
        ),
        ({"kvSwap": {"enabled": False}}, "--alise-kv-host-gib 0"),
        (
            {"kvSwap": {"enabled": True, "hostGiB": 8, "quantization": "none"}},
            "--alise-kv-host-gib 8 --alise-kv-quantization none",
        ),
        (
            {"lora": {"adapters": [{"name": "a", "uri": "pvc://c/x"}]}},
            "--enable-lora --max-lora-rank 16 --max-loras 1 --lora-modules a=/adapters/a/x",
        ),
        (
            {"speculativeDecoding": {"method": "ngram"}},
            '--speculative-config {"method": "ngram", "num_speculative_tokens": 4, '
            '"prompt_lookup_max": 4}',
        ),
    ],
)
def test_fields_become_options(fields: dict[str, Any], expected: str) -> None:
    assert expected in arguments(**fields)


def test_a_cpu_service_asks_for_no_accelerator() -> None:
    service = view(engine={"accelerator": {"count": 0}})
    engine = pod_template(service)["spec"]["containers"][0]
    assert engine["image"] == "alise/engine-cpu:1"
    assert "nvidia.com/gpu" not in engine["resources"]["limits"]


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, 12.4 / 23),  # 90% of 16 less 2; the limit also has 2 of /dev/shm and 5 of the tier
        ({"gpuMemoryUtilizationPercent": 50}, 6 / 23),
        ({"resources": {"cpu": "4", "memoryGiB": 64}, "shmGiB": 8}, 55.6 / 77),
        ({"resources": {"cpu": "4", "memoryGiB": 1}}, 0.001),  # vLLM says that it is too little
    ],
    ids=["default", "half", "large", "too-little"],
)
def test_on_the_cpu_vllm_takes_a_share_of_the_engines_own_memory(
    fields: dict[str, Any], share: float
) -> None:
    engine = engine_of(engine={"accelerator": {"count": 0}, **fields})
    found = engine["args"][engine["args"].index("--gpu-memory-utilization") + 1]
    assert float(found) == pytest.approx(share, abs=0.0006)


def test_secrets_are_passed_by_reference() -> None:
    service = view(
        model={"tokenSecretRef": {"name": "hub"}},
        engine={"env": [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
    )
    environment = {item["name"]: item for item in engine_arguments_env(service)}
    assert environment["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert environment["K"]["valueFrom"] == {"secretKeyRef": {"name": "s", "key": "k"}}


def test_torch_listens_on_the_loopback_interface_unless_a_replica_spans_nodes() -> None:
    inside = {"name": "GLOO_SOCKET_IFNAME", "value": "lo"}
    assert inside in engine_arguments_env(view())
    parallel = {"parallelism": {"tensor": 16}, "accelerator": {"count": 16, "perNode": 8}}
    assert inside not in engine_arguments_env(view(engine=parallel))


def engine_arguments_env(service: ServiceView) -> list[dict[str, Any]]:
    return pod_template(service)["spec"]["containers"][0]["env"]


def test_own_variables_replace_the_operators() -> None:
    service = view(engine={"env": [{"name": "HF_HOME", "value": "/mine"}]})
    values = [item for item in engine_arguments_env(service) if item["name"] == "HF_HOME"]
    assert values == [{"name": "HF_HOME", "value": "/mine"}]


def test_a_replica_over_nodes_is_a_group_whose_leader_serves() -> None:
    service = view(**MORE["multi-node"])
    found = manifests(service)
    group = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert "Deployment" not in found
    assert group["size"] == 2
    leader = group["leaderTemplate"]["spec"]["containers"][0]
    worker = group["workerTemplate"]["spec"]
    assert leader["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "--headless" in worker["containers"][0]["args"]
    assert "readinessProbe" not in worker["containers"][0]
    assert worker["initContainers"] == []
    index = "leaderworkerset.sigs.k8s.io/worker-index"
    assert found["Service"]["spec"]["selector"][index] == "0"
    # Ports between workers take commands: only pods of this service may reach them.
    _, between = found["NetworkPolicy"]["spec"]["ingress"]
    assert between == {"from": [{"podSelector": {"matchLabels": service.selector}}]}


def test_only_wanted_ports_are_open() -> None:
    service = view(
        networkPolicy={"allowFrom": [{"namespaceLabels": {}}, {"podLabels": {"a": "b"}}]}
    )
    (rule,) = network_policy(service)["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [8000, 9464]
    assert rule["from"] == [
        {"namespaceSelector": {}},
        {"podSelector": {"matchLabels": {"a": "b"}}},
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"policy": "boost", "aging_s": 30}),
        ({"gammaMilli": 50}, {"policy": "boost", "gamma": 0.05, "aging_s": 30}),
        ({"policy": "SpeculativeSRTF"}, {"policy": "srtf-aging", "aging_s": 30}),
        ({"policy": "SpeculativeSRTF", "agingSeconds": 0}, {"policy": "srtf"}),
        ({"policy": "MLFQ"}, {"policy": "mlfq", "aging_s": 30}),
        ({"policy": "FCFS"}, {"policy": "fcfs", "aging_s": 30}),
    ],
)
def test_policy_knobs_in_the_sidecars_terms(fields: dict[str, Any], expected: Any) -> None:
    assert policy_knobs(spec(scheduling=fields).scheduling) == expected


def test_the_sidecar_understands_its_policy_file() -> None:
    parse = pytest.importorskip("alise_scheduler.policy_file", reason="needs the extra 'sidecar'")
    from alise_scheduler.engine_state import PolicySettings

    data = manifests(view(scheduling={"policy": "SpeculativeSRTF", "gammaMilli": 5}))["ConfigMap"]
    settings = parse.parse_policy(data["data"]["policy.json"], PolicySettings())
    assert (settings.policy.value, settings.gamma_per_s) == ("srtf-aging", 0.005)


@pytest.mark.parametrize(
    ("autoscaling", "absent", "kinds", "missing"),
    [
        ({"maxReplicas": 3}, (), {"HorizontalPodAutoscaler"}, ()),
        ({"maxReplicas": 3, "prometheusAddress": "http://p"}, (), {"ScaledObject"}, ()),
        (
            {"maxReplicas": 3, "prometheusAddress": "http://p"},
            (SCALED_OBJECT,),
            {"HorizontalPodAutoscaler"},
            (SCALED_OBJECT,),
        ),
    ],
    ids=["hpa", "keda", "keda-absent"],
)
def test_one_autoscaler_whose_target_is_the_service_itself(
    autoscaling: dict[str, Any], absent: Any, kinds: set[str], missing: Any
) -> None:
    rendered = render(view(autoscaling=autoscaling), absent)
    found = [m for m in rendered.manifests if kind_of(m) in (HPA, SCALED_OBJECT)]
    assert {manifest["kind"] for manifest in found} == kinds
    assert all(m["spec"]["scaleTargetRef"]["kind"] == "ALISEService" for m in found)
    assert rendered.missing == missing


@pytest.mark.parametrize(
    ("engine", "own", "others"),
    [
        (
            {},
            ("chat-6d4cf56db6-x2x7p", "chat-5cx2x7p"),
            ("chat-large-6d4cf56db6-x2x7p", "chat-2-6d4cf56db6-x2x7p", "chat-0", "chat-large-0"),
        ),
        (
            MORE["multi-node"]["engine"],
            ("chat-0", "chat-12"),
            ("chat-0-1", "chat-large-0", "chat-large-6d4cf56db6-x2x7p"),
        ),
    ],
    ids=["one-node", "multi-node"],
)
def test_a_service_scales_by_the_backlog_of_its_own_pods(
    engine: dict[str, Any], own: tuple[str, ...], others: tuple[str, ...]
) -> None:
    scaling = {"maxReplicas": 3, "prometheusAddress": "http://p"}
    trigger = manifests(view("chat", autoscaling=scaling, engine=engine))["ScaledObject"]
    query = trigger["spec"]["triggers"][0]["metadata"]["query"]
    found = re.fullmatch(r'sum\(alise_backlog_seconds\{namespace="default",pod=~"(.+)"\}\)', query)
    assert found is not None
    names = re.compile(found.group(1))
    assert all(names.fullmatch(name) for name in own)
    assert not any(names.fullmatch(name) for name in others)


def test_without_optional_apis_everything_else_is_still_there() -> None:
    service = view(**CASES["production"])
    rendered = render(service, OPTIONAL)
    assert not [m for m in rendered.manifests if kind_of(m).is_optional]
    assert {kind.kind for kind in rendered.missing} == {"ScaledObject", "PodMonitor", "HTTPRoute"}
    assert render(view(**MORE["multi-node"]), OPTIONAL).missing[0] is LWS


def test_the_route_leads_to_the_pool_where_there_is_one() -> None:
    exposure = {
        "httpRoute": {"parentRefs": [{"name": "g"}], "hostnames": ["a.example"]},
        "inferencePool": {"endpointPickerName": "p"},
    }
    route = manifests(view(exposure=exposure))["HTTPRoute"]
    ((backend,),) = [rule["backendRefs"] for rule in route["spec"]["rules"]]
    assert backend["kind"] == "InferencePool"
    assert url(view(exposure=exposure)) == "http://a.example/v1"
    assert url(view()) == "http://qwen.default.svc:8000/v1"


def test_the_escape_hatch_merges_by_name_and_comes_last() -> None:
    overlay = {
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["x"]}],
        "terminationGracePeriodSeconds": 7,
        "containers": [{"name": "engine", "resources": {"limits": {"memory": "1Gi"}}}],
    }
    pod = pod_of(podTemplate={"spec": overlay, "labels": {"team": "a"}, "annotations": {"n": "1"}})
    assert pod["terminationGracePeriodSeconds"] == 7
    assert pod["hostAliases"] == overlay["hostAliases"]
    (engine,) = pod["containers"]
    assert engine["resources"]["limits"]["memory"] == "1Gi"
    assert engine["command"] == ["alise", "serve"]


def test_pod_labels_of_the_user_cannot_break_the_selector() -> None:
    service = view(podTemplate={"labels": {"serving.alise.dev/service": "other", "team": "a"}})
    labels = pod_template(service)["metadata"]["labels"]
    assert labels["serving.alise.dev/service"] == "qwen"
    assert labels["team"] == "a"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "a", "b", "mountPath"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_everything_contains_itself(value: Any) -> None:
    assert contains(value, value)


@given(
    st.dictionaries(st.sampled_from("abc"), json_values),
    st.dictionaries(st.sampled_from("abc"), json_values),
)
def test_an_overlay_wins(base: dict[str, Any], overlay: dict[str, Any]) -> None:
    result = merged(base, overlay)
    assert result.keys() == base.keys() | overlay.keys()
    for name, value in overlay.items():
        if not isinstance(value, (dict, list)):
            assert result[name] == value


@pytest.mark.parametrize(
    ("live", "desired", "holds"),
    [
        ({"a": 1, "default": 2}, {"a": 1}, True),
        ({"a": 2}, {"a": 1}, False),
        ({}, {"a": False, "b": [], "c": ""}, True),
        ({}, {"a": True}, False),
        ([{"name": "x", "v": 1}, {"name": "injected"}], [{"name": "x", "v": 1}], True),
        ([{"name": "y"}], [{"name": "x"}], False),
        (["a", "b"], ["a"], False),
        ([{"name": "x", "a": 1}, {"name": "x", "a": 2}],) * 2 + (True,),
        (None, {"a": 1}, False),
    ],
)
def test_live_may_have_more_but_not_less(live: Any, desired: Any, holds: bool) -> None:
    assert contains(live, desired) is holds
