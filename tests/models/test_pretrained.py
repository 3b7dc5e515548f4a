"""Weights from local files and from hubs that cannot be reached."""

import pytest
import safetensors.torch
import torch

import models
import models.timm
import models.torchvision


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """A checkpoint in torchvision's layout, written by torchvision's own class."""
    import torchvision

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    safetensors.torch.save_file(torchvision.models.resnet18().state_dict(), path)
    return path


def test_trunk_is_taken_over_and_a_new_head_is_reported(resnet_file):
    state = safetensors.torch.load_file(resnet_file)
    model = models.create("resnet18", 10, image_size=64, pretrained=str(resnet_file), seed=0)
    assert torch.equal(model.features.conv1.weight, state["conv1.weight"])
    assert torch.equal(model.features.layer4[1].bn2.weight, state["layer4.1.bn2.weight"])
    source, head = model.recipe.notes
    assert source.startswith("weights from resnet18.safetensors (sha256 ")
    assert head == "head initialised afresh: head.fc"
    assert model.recipe.pretrained == "resnet18.safetensors"
    assert model.recipe.mean == (0.485, 0.456, 0.406)


def test_a_matching_head_is_kept_for_scores_but_not_for_coordinates(resnet_file):
    state = safetensors.torch.load_file(resnet_file)
    scores = models.create("resnet18", 1000, image_size=64, pretrained=resnet_file)
    assert torch.equal(scores.head.fc.weight, state["fc.weight"])
    assert len(scores.recipe.notes) == 1
    pixels = models.create("resnet18", 1000, image_size=64, pretrained=resnet_file, head="keypoints")
    assert not torch.equal(pixels.head.fc.weight, state["fc.weight"])
    assert pixels.recipe.notes[-1] == "head initialised afresh: head.fc"


def test_a_small_stem_is_fresh_and_reported(resnet_file):
    model = models.create("resnet18", 10, image_size=32, pretrained=resnet_file)
    assert "stem initialised afresh: (64, 3, 7, 7) in the checkpoint, (64, 3, 3, 3) here" in model.recipe.notes
    assert torch.equal(model.features.bn1.weight, safetensors.torch.load_file(resnet_file)["bn1.weight"])


def test_grey_images_give_the_response_of_the_same_grey_in_colour(resnet_file):
    arguments = {"image_size": 64, "pretrained": resnet_file, "mean": 0.5, "std": 0.5}
    colour = models.create("resnet18", 1000, **arguments).eval()
    grey = models.create("resnet18", 1000, in_channels=1, **arguments).eval()
    assert "stem weights summed over 3 input channels" in grey.recipe.notes
    x = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(grey(x), colour(x.expand(1, 3, 64, 64)), rtol=1e-4, atol=1e-4)
    default = models.create("resnet18", 2, in_channels=1, image_size=64, pretrained=resnet_file)
    assert default.recipe.mean == pytest.approx((0.449,), abs=1e-6)


def test_googlenet_drops_auxiliary_heads_and_uses_its_own_statistics(tmp_path):
    import torchvision

    theirs = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    assert any(key.startswith("aux1.") for key in theirs.state_dict())
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "g.pth")
    model = models.create("googlenet", 10, image_size=64, pretrained=tmp_path / "g.pth")
    assert torch.equal(model.features.inception5b.branch1.conv.weight, theirs.inception5b.branch1.conv.weight)
    assert model.recipe.mean == model.recipe.std == (0.5, 0.5, 0.5)


def test_our_own_checkpoints_are_accepted_with_their_normalisation(tmp_path):
    first = models.create("cnn7_nrs", 10, width=0.25, mean=(0.1, 0.2, 0.3), std=0.7, seed=0)
    path = models.save(first, tmp_path / "first")
    second = models.create("cnn7_nrs", 6, width=0.25, head="keypoints", pretrained=path, seed=1)
    assert torch.equal(second.features.conv3.weight, first.features.conv3.weight)
    assert torch.equal(second.head.fc1.weight, first.head.fc1.weight)
    assert second.recipe.mean == pytest.approx((0.1, 0.2, 0.3))
    assert second.recipe.notes[-1] == "head initialised afresh: head.fc"
    assert models.load(models.save(second, tmp_path / "second")).recipe == second.recipe
    override = models.create("cnn7_nrs", 10, width=0.25, mean=0.5, std=0.5, pretrained=path)
    assert override.normalise.mean.flatten().tolist() == [0.5] * 3


def test_another_head_in_our_own_checkpoint_is_replaced(tmp_path):
    path = models.save(models.create("cnn7_cw", 4, width=0.25, head="dsnt"), tmp_path / "dsnt")
    model = models.create("cnn7_cw", 10, width=0.25, pretrained=path)
    assert model.recipe.notes[-1] == "head initialised afresh: head.fc1, head.fc2, head.fc"


def test_a_trunk_that_does_not_fit_is_refused_by_name(resnet_file, tmp_path):
    with pytest.raises(models.CheckpointError, match=r"features.bn1.weight is \(64,\) instead of \(16,\)"):
        models.create("resnet18", 10, image_size=64, width=0.25, pretrained=resnet_file)
    state = safetensors.torch.load_file(resnet_file)
    del state["layer3.0.conv2.weight"]
    state["layer5.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(
        models.CheckpointError, match=r"missing features\.layer3\.0\.conv2\.weight; unknown features\.layer5"
    ):
        models.create("resnet18", 10, image_size=64, pretrained=tmp_path / "odd.pth")
    with pytest.raises(models.CheckpointError, match=r"Expected a checkpoint written by models\.save"):
        models.create("cnn7_nrs", 10, pretrained=resnet_file)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pth"):
        models.create("resnet18", 10, pretrained=tmp_path / "absent.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(models.CheckpointError, match=f"{name} is not a readable checkpoint"):
            models.create("resnet18", 10, pretrained=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(models.CheckpointError, match="holds no state dict"):
        models.create("resnet18", 10, pretrained=tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("name", "owner", "attribute"),
    [
        ("resnet18", models.torchvision.ResNet18_Weights, "get_state_dict"),
        ("googlenet", models.torchvision.GoogLeNet_Weights, "get_state_dict"),
        ("mobilenetv2", models.timm.timm, "create_model"),
        ("efficientnet_lite0", models.timm.timm, "create_model"),
    ],
)
def test_a_hub_out_of_reach_says_what_to_do(name, owner, attribute, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(owner, attribute, unreachable)
    message = rf"weights of '{name}' through (timm|torchvision) \(OSError: Name or .*pretrained='path/to/checkpoint'"
    with pytest.raises(RuntimeError, match=message):
        models.create(name, 10, pretrained=True)


def test_published_weights_arrive_through_the_library(monkeypatch):
    import timm

    theirs = timm.create_model("mobilenetv2_100")
    asked = []

    def create_model(name, pretrained):
        asked.append((name, pretrained))
        return theirs

    monkeypatch.setattr(models.timm.timm, "create_model", create_model)
    model = models.create("mobilenetv2", 10, image_size=64, pretrained=True)
    assert asked == [("mobilenetv2_100", True)]
    assert torch.equal(model.features.bn1.norm.weight, theirs.bn1.weight)
    assert torch.equal(model.features.conv_head.weight, theirs.conv_head.weight)
    assert model.recipe.pretrained is True
    assert model.recipe.notes == ("published weights from timm", "head initialised afresh: head.fc")


def test_published_weights_exist_for_full_width_only():
    with pytest.raises(ValueError, match=r"width 1 only, got width=0.5"):
        models.create("resnet18", 10, width=0.5, pretrained=True)


@pytest.mark.network
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenetv2", "efficientnet_lite0"])
def test_real_published_weights(name):
    model = models.create(name, 1000, image_size=224, pretrained=True).eval()
    assert len(model.recipe.notes) == 1
    assert model(torch.rand(1, 3, 224, 224)).std() > 0.5
