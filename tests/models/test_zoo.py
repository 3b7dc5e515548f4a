"""Every network of the zoo: shapes, published sizes, faithfulness to the library it comes from, errors."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import models
from models.backbone import scaled

CONVOLUTIONAL = [name for name in models.names() if name != "mlp"]
IMAGENET = ["resnet18", "googlenet", "mobilenetv2", "efficientnet_lite0"]


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(name, size, channels):
    model = models.create(name, 7, in_channels=channels, image_size=size, width=0.125, seed=0)
    x = torch.rand(2, channels, size, size)
    assert model(x).shape == (2, 7)
    y = model.eval()(x)
    assert torch.isfinite(y).all()
    assert not torch.equal(y[0], y[1])  # the image matters


@pytest.mark.parametrize("name", models.names())
def test_the_graph_can_be_traced(name):
    model = models.create(name, 4, width=0.125, head="keypoints" if name == "mlp" else "dsnt", seed=0).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("name", models.names())
def test_activations_are_never_hidden_inside_a_batch_norm(name):
    model = models.create(name, 4, width=0.125)
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds <= {nn.BatchNorm2d}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_689_512), ("googlenet", 6_624_904), ("mobilenetv2", 3_504_872), ("efficientnet_lite0", 4_652_008)],
)
def test_published_parameter_counts(name, parameters):
    assert models.count(models.create(name, 1000, image_size=224)) == parameters


def test_cnn7_nrs_has_the_papers_convolution_weights():
    model = models.create("cnn7_nrs", 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.weight.shape[0] for m in convolutions] == [32, 64, 64, 128, 128]
    assert sum(m.weight.numel() for m in convolutions) == 463_712
    relus = 32 * 32 * 32 + 64 * 16 * 16 * 2 + 128 * 8 * 8 + 128 * 4 * 4 + 100
    assert relus == 75_876  # the paper's neuron count; counted below on the running network
    seen = []
    for m in model.modules():
        if isinstance(m, nn.ReLU):
            m.register_forward_hook(lambda module, args, out: seen.append(out[0].numel()))
    model.eval()(torch.rand(1, 3, 32, 32))
    assert sum(seen) == relus
    wide = models.create("cnn7_nrs", 48, image_size=64, head="keypoints")
    assert wide.head.fc1.weight.shape == (100, 8192)


def test_cnn_large_layers():
    model = models.create("cnn_large", 10)
    shapes = [tuple(p.shape) for key, p in model.named_parameters() if key.endswith("weight")]
    assert shapes == [
        (32, 3, 3, 3),
        (32, 32, 4, 4),
        (64, 32, 3, 3),
        (64, 64, 4, 4),
        (512, 64 * 8 * 8),
        (512, 512),
        (10, 512),
    ]


def test_cnn7_cw_on_mnist_has_carlini_and_wagners_layers():
    model = models.create("cnn7_cw", 10, in_channels=1, image_size=28)
    shapes = [tuple(p.shape) for key, p in model.named_parameters() if key.endswith("weight")]
    assert shapes == [
        (32, 1, 3, 3),
        (32, 32, 3, 3),
        (64, 32, 3, 3),
        (64, 64, 3, 3),
        (200, 64 * 4 * 4),
        (200, 200),
        (10, 200),
    ]


@pytest.mark.parametrize("name", models.names())
def test_half_width_halves_every_hidden_layer(name):
    full, half = models.create(name, 10), models.create(name, 10, width=0.5)
    hidden = [m for m in full.modules() if isinstance(m, nn.Conv2d | nn.Linear)][:-1]
    narrow = [m for m in half.modules() if isinstance(m, nn.Conv2d | nn.Linear)][:-1]
    assert len(hidden) == len(narrow) > 1
    for a, b in zip(hidden, narrow, strict=True):
        # timm rounds to multiples of 8: 24 channels become 16
        assert 0.45 <= b.weight.shape[0] / a.weight.shape[0] < 0.67 or b.weight.shape[0] <= 16
    assert models.count(half) < 0.55 * models.count(full)


@pytest.mark.parametrize("name", IMAGENET)
def test_small_images_get_a_stride_one_stem_and_a_note(name):
    small = models.create(name, 10, image_size=63, width=0.125)
    large = models.create(name, 10, image_size=64, width=0.125)
    stems = [next(m for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (small, large)]
    assert (stems[0].kernel_size, stems[0].stride) == ((3, 3), (1, 1))
    assert stems[1].stride == (2, 2)
    assert small.recipe.notes == ("3x3 stride-1 stem without max-pool (image below 64 px)",)
    assert large.recipe.notes == ()
    pools = [sum(isinstance(m, nn.MaxPool2d) for m in net.features.children()) for net in (small, large)]
    assert pools[1] - pools[0] == (1 if name in ("resnet18", "googlenet") else 0)
    assert small.features(torch.rand(2, 3, 63, 63)).shape[-1] > large.features(torch.rand(2, 3, 64, 64)).shape[-1]


def library_net(name):
    if name in ("resnet18", "googlenet"):
        import torchvision

        extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, **extra)
    import timm

    return timm.create_model({"mobilenetv2": "mobilenetv2_100"}.get(name, name))


@pytest.mark.parametrize("name", IMAGENET)
def test_same_function_as_the_library_with_its_weights(name, tmp_path):
    theirs = library_net(name)
    generator = torch.Generator().manual_seed(0)
    for module in theirs.modules():  # fresh statistics are 0 and 1: make every buffer count
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.05, 0.2, generator=generator)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = models.create(name, 1000, image_size=64, pretrained=tmp_path / "theirs.pth").eval()
    x = torch.rand(2, 3, 64, 64, generator=generator)
    mean, std = torch.tensor(ours.recipe.mean).view(3, 1, 1), torch.tensor(ours.recipe.std).view(3, 1, 1)
    expected = theirs.eval()((x - mean) / std)
    assert expected.std() > 1e-3
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", models.names())
def test_seed_fixes_the_weights_and_leaves_the_global_state_alone(name):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = models.create(name, 10, width=0.125, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    second, other = models.create(name, 10, width=0.125, seed=5), models.create(name, 10, width=0.125, seed=6)
    pairs = list(zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(1)
    a, b = models.create("mlp", 10), models.create("mlp", 10)
    torch.manual_seed(1)
    c = models.create("mlp", 10)
    assert torch.equal(a.head.fc.weight, c.head.fc.weight)
    assert not torch.equal(a.head.fc.weight, b.head.fc.weight)


def test_initial_weights_do_not_follow_the_default_device():
    plain = models.create("mlp", 3, seed=0)
    with torch.device("meta"):
        inside = models.create("mlp", 3, seed=0)
    assert torch.equal(inside.head.fc.weight, plain.head.fc.weight)


@pytest.mark.parametrize("width", [0.125, 1.0])
def test_googlenet_keeps_its_signal_at_any_width(width):
    model = models.create("googlenet", 10, width=width, seed=0)
    features = model.features(model.normalise(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))))
    assert 0.4 < features.std() < 0.8  # a standard normal behind a ReLU has 0.58
    fresh = models.create("googlenet", 10, width=width, seed=0).eval()
    scores = fresh(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert (scores[0] - scores[1]).abs().max() > 1e-3  # with the running statistics of an untrained net too


def test_normalisation_is_the_first_layer_and_works_per_channel():
    model = models.create("cnn7_nrs", 10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125), width=0.125)
    name, first = next(iter(model.named_children()))
    assert name == "normalise"
    assert first.mean.shape == first.std.shape == (1, 3, 1, 1)
    x = torch.tensor([0.6, 0.45, 0.425]).view(1, 3, 1, 1)
    torch.testing.assert_close(first(x), torch.ones(1, 3, 1, 1))
    seen = []
    model.features.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()(x.expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.ones(1, 3, 32, 32))
    assert {"normalise.mean", "normalise.std"} <= set(model.state_dict())


def test_normalisation_defaults_and_forms():
    assert models.create("mlp", 2).recipe.mean == (0.485, 0.456, 0.406)
    grey = models.create("mlp", 2, in_channels=1)
    assert (grey.recipe.mean, grey.recipe.std) == ((0.5,), (0.5,))
    none = models.create("mlp", 2, mean=0, std=1)
    assert (none.recipe.mean, none.recipe.std) == ((0.0,) * 3, (1.0,) * 3)
    given = models.create("mlp", 2, mean=torch.tensor([0.25, 0.5, 0.75]), std=[1, 2, 3])
    assert (given.recipe.mean, given.recipe.std) == ((0.25, 0.5, 0.75), (1.0, 2.0, 3.0))


def test_recipe_is_frozen_complete_and_survives_json():
    recipe = models.create("resnet18", 8, 1, 28, 0.125, head="linear", mean=0.3, std=0.4, seed=3).recipe
    assert recipe == models.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert (recipe.name, recipe.num_outputs, recipe.in_channels, recipe.image_size) == ("resnet18", 8, 1, 28)
    assert (recipe.width, recipe.pretrained, recipe.head, recipe.seed) == (0.125, False, "keypoints", 3)
    assert (recipe.mean, recipe.std) == ((0.3,), (0.4,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.width = 1.0


def test_registry_is_described():
    assert set(models.describe()) == set(models.names())
    assert {"cnn7_nrs", "cnn7_cw", "cnn_large", "mlp", *IMAGENET} == set(models.names())
    assert all(line and "\n" not in line for line in models.describe().values())


def test_listing_imports_no_heavy_library():
    code = (
        "import sys, models; print(models.names(), models.describe());"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'safetensors'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cnn7_nrs" in done.stdout


def test_small_nets_do_not_import_timm_or_torchvision():
    code = (
        "import sys, models; models.create('cnn7_nrs', 10, width=.125);"
        "assert not {'timm', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", models.names())
def test_minimum_image_size_is_the_real_one(name):
    smallest = models.zoo.entry(name).minimum
    model = models.create(name, 3, image_size=smallest, width=0.125).eval()
    assert model(torch.rand(1, 3, smallest, smallest)).shape == (1, 3)
    if smallest > 1:
        with pytest.raises(ValueError, match=f"at least {smallest} px, got {smallest - 1}"):
            models.create(name, 3, image_size=smallest - 1)


@pytest.mark.parametrize("wrong", ["resnet-18", "ResNet18", "cnn7", "mobilenet_v2"])
def test_unknown_names_get_close_matches(wrong):
    with pytest.raises(ValueError, match=f"unknown model '{wrong}': did you mean") as error:
        models.create(wrong, 10)
    assert "efficientnet_lite0" in str(error.value)  # the whole list follows


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_outputs": 0}, ValueError, "num_outputs must be at least 1, got 0"),
        ({"num_outputs": 2.5}, TypeError, "num_outputs must be a whole number, got 2.5"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1"),
        ({"image_size": True}, TypeError, "image_size must be a whole number"),
        ({"width": 0}, ValueError, "width must be finite and above 0, got 0"),
        ({"width": -1.0}, ValueError, "width must be finite and above 0"),
        ({"width": float("nan")}, ValueError, "width must be finite"),
        ({"width": "wide"}, TypeError, "width must be a number, got 'wide'"),
        ({"head": "heatmap"}, ValueError, "unknown head 'heatmap'.*'dsnt'"),
        ({"head": "dsnt", "num_outputs": 5}, ValueError, "num_outputs must be even, got 5"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean has 2 values for 3 input channels"),
        ({"std": (1, 1, 0)}, ValueError, "std must be positive"),
        ({"mean": float("inf")}, ValueError, "mean must be finite"),
        ({"seed": "a"}, TypeError, "seed must be a whole number"),
        ({"pretrained": True}, ValueError, "no weights are published for 'cnn7_nrs'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        models.create(**({"name": "cnn7_nrs", "num_outputs": 4} | arguments))


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'crate'"):
        models.crate  # noqa: B018


def test_scaling_rounds_and_has_a_floor():
    assert [scaled(100, 0.25), scaled(16, 0.25, least=8), scaled(3, 0.01)] == [25, 8, 1]


def test_a_backbone_without_a_map_cannot_have_heat_maps():
    with pytest.raises(ValueError, match="'mlp' has no spatial feature map"):
        models.create("mlp", 4, head="dsnt")
