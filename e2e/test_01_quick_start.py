"""The README's quick start: install, apply, Ready, a streamed answer, `kubectl get`."""

from __future__ import annotations

from cluster import chat, kubectl


def test_a_streamed_answer_comes_through_the_service(smol: str) -> None:
    (answer,) = chat(smol)
    assert "error" not in answer
    assert answer["pieces"] > 3, "streamed: token by token, not at once"
    assert answer["text"].strip()


def test_kubectl_get_alise_says_what_serves_where(smol: str) -> None:
    header, line = kubectl("get", "alise", smol).splitlines()
    shown = dict(zip(header.split(), line.split(), strict=True))
    shown.pop("AGE")
    assert shown == {
        "NAME": "smol",
        "READY": "True",
        "REASON": "AllReplicasReady",
        "REPLICAS": "1",
        "MODEL": "embedded://smollm2-135m-instruct",
        "POLICY": "Boost",
        "URL": "http://smol.alise-e2e.svc:8000/v1",
    }
