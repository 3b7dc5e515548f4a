"""Saving and loading: exact, strict, and loud about damage."""

import json
import os

import pytest
import safetensors.torch
import torch

import models
import models.io


def used(name="cnn7_nrs", **arguments):
    """A small net whose batch-norm statistics differ from the fresh ones."""
    model = models.create(name, 10, width=0.125, seed=0, **arguments)
    model(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return model.eval()


@pytest.mark.parametrize("name", models.names())
def test_round_trip_is_exact(name, tmp_path):
    model = used(name, mean=0.4, std=0.2)
    path = models.save(model, tmp_path / "runs" / "net")
    assert path == tmp_path / "runs" / "net.safetensors"
    loaded = models.load(tmp_path / "runs" / "net")
    assert loaded.recipe == model.recipe
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    loaded(x).sum().backward()


def test_keypoint_heads_and_dtypes_survive(tmp_path):
    model = models.create("cnn7_cw", 6, width=0.25, head="dsnt").double().eval()
    loaded = models.load(models.save(model, tmp_path / "net.safetensors"))
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    assert loaded(x).dtype == torch.float64
    assert torch.equal(loaded(x), model(x))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["net.json", "net.safetensors"]


def test_dots_in_names_are_kept(tmp_path):
    path = models.save(models.create("mlp", 2, width=0.1), tmp_path / "eps0.1")
    assert path.name == "eps0.1.safetensors"
    assert (tmp_path / "eps0.1.json").exists()


def test_loading_leaves_the_random_state_alone(tmp_path):
    path = models.save(used(), tmp_path / "net")
    before = torch.random.get_rng_state()
    models.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_truncation_and_flipped_bits_are_noticed(tmp_path):
    path = models.save(used(), tmp_path / "net")
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(models.CheckpointError, match=f"is damaged: {len(data) - 100} bytes"):
        models.load(path)
    flipped = bytearray(data)
    flipped[-7] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(models.CheckpointError, match=r"do not match the checksum in net\.json"):
        models.load(path)
    path.write_bytes(data)
    assert models.load(path).recipe.name == "cnn7_nrs"


def edit(sidecar, **changes):
    record = json.loads(sidecar.read_text())
    record["recipe"].update(changes)
    sidecar.write_text(json.dumps(record))


def test_a_wrong_recipe_is_named(tmp_path):
    path = models.save(used(), tmp_path / "net")
    sidecar, original = tmp_path / "net.json", (tmp_path / "net.json").read_text()
    edit(sidecar, width=0.25)
    with pytest.raises(models.CheckpointError, match=r"conv1.weight is \(4, 3, 3, 3\) instead of \(8, 3, 3, 3\)"):
        models.load(path)
    sidecar.write_text(original)
    edit(sidecar, name="cnn_large")
    with pytest.raises(models.CheckpointError, match=r"does not hold the network of net.json \('cnn_large'\): missing"):
        models.load(path)
    sidecar.write_text(original)
    edit(sidecar, name="cnn8")
    with pytest.raises(models.CheckpointError, match="unknown model 'cnn8'"):
        models.load(path)
    sidecar.write_text(original)
    edit(sidecar, depth=3)
    with pytest.raises(models.CheckpointError, match=r"unknown fields \['depth'\]"):
        models.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "does not describe a saved model"),
        ('{"format": "other"}', "expected format 'certprune.model/1', found 'other'"),
        ('{"format": "certprune.model/1", "bytes": 3}', "field 'sha256' is missing"),
    ],
)
def test_a_damaged_sidecar_is_named(tmp_path, content, message):
    path = models.save(models.create("mlp", 2, width=0.1), tmp_path / "net")
    (tmp_path / "net.json").write_text(content)
    with pytest.raises(models.CheckpointError, match=message):
        models.load(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*net\.safetensors"):
        models.load(tmp_path / "net")
    path = models.save(models.create("mlp", 2, width=0.1), tmp_path / "net")
    (tmp_path / "net.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*net\.json"):
        models.load(path)


def test_only_intact_zoo_networks_are_saved(tmp_path):
    with pytest.raises(TypeError, match="Linear has no recipe"):
        models.save(torch.nn.Linear(2, 2), tmp_path / "net")
    model = models.create("mlp", 2, width=0.1)
    model.head.fc2 = torch.nn.Linear(10, 7)
    with pytest.raises(
        ValueError, match=r"head.fc2.weight is \(7, 10\) instead of \(10, 10\).*before channels are removed"
    ):
        models.save(model, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_earlier_checkpoint_and_leaves_no_debris(tmp_path, monkeypatch):
    path = models.save(models.create("mlp", 2, width=0.1, seed=0), tmp_path / "net")
    before = path.read_bytes()
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        models.save(models.create("mlp", 2, width=0.1, seed=1), tmp_path / "net")
    assert path.read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["net.json", "net.safetensors"]
    assert models.load(path).recipe.seed == 0


def test_the_weights_are_plain_safetensors(tmp_path):
    model = used()
    state = safetensors.torch.load_file(models.save(model, tmp_path / "net"))
    assert set(state) == set(model.state_dict())
    record = json.loads((tmp_path / "net.json").read_text())
    assert record["recipe"] == model.recipe.to_dict()
    assert record["bytes"] == (tmp_path / "net.safetensors").stat().st_size
