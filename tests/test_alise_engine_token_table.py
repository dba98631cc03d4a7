import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from alise_engine.token_table import TokenTableUnavailable, build_token_table  # noqa: E402
from alise_scheduler.token_table import DIMENSIONS, read_token_table  # noqa: E402


def make_model(folder: Path, shards: int = 1, width: int = 300) -> Path:
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {t: i for i, t in enumerate(["<|end|>", *sorted(letters), "Ġa", "Ġlist", "ing"])}
    for i in range(40):
        vocab[f"Ġw{i}"] = len(vocab)
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()
    raw.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    fast.save_pretrained(folder)
    rows = torch.randn(len(vocab) + 5, width, generator=torch.Generator().manual_seed(0))
    tensors = {"model.embed_tokens.weight": rows.to(torch.bfloat16), "other": torch.zeros(2)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"model-{i}.safetensors")
        places[name] = f"model-{i}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(("shards", "width"), [(1, 300), (2, 300), (1, 32)])
def test_the_sidecar_reads_what_the_engine_writes(tmp_path: Path, shards: int, width: int) -> None:
    model = make_model(tmp_path / "m", shards, width)
    build_token_table(model, tmp_path / "out" / "t.npz")
    table = read_token_table(tmp_path / "out" / "t.npz")
    norms = np.linalg.norm(table.embedding[:-1].astype(np.float32), axis=1)
    assert abs(norms.mean() - 1) < 0.01
    assert table.embedding.shape[1] == DIMENSIONS
    with np.load(tmp_path / "out" / "t.npz") as file:
        offsets, blob = file["text_offsets"], file["text_bytes"].tobytes()
    texts = [blob[a:b] for a, b in pairwise(offsets)]
    assert texts[0] == b"", "special"
    assert b" list" in texts
    assert b"\n" in texts
    assert texts[-5:] == [b""] * 5, "rows beyond the tokenizer's"
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "t.npz"]


def test_every_build_gives_the_same_fingerprint(tmp_path: Path) -> None:
    one, two = make_model(tmp_path / "a"), make_model(tmp_path / "b", shards=2)
    build_token_table(one, tmp_path / "1.npz")
    build_token_table(two, tmp_path / "2.npz")
    first, second = (read_token_table(tmp_path / f"{n}.npz") for n in (1, 2))
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.embedding, second.embedding)


def test_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenTableUnavailable, match="no tokenizer"):
        build_token_table(tmp_path, tmp_path / "t.npz")
    model = make_model(tmp_path / "m")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(TokenTableUnavailable, match="unreadable"):
        build_token_table(model, tmp_path / "t.npz")
    weights.unlink()
    with pytest.raises(TokenTableUnavailable, match="no token embedding"):
        build_token_table(model, tmp_path / "t.npz")
