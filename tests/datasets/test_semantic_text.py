"""Text-guided edits, through a tiny instruct-pix2pix pipeline that is built here and saved to disk."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch

from datasets import semantic
from datasets.errors import MissingData
from datasets.semantic import adapter


def build(folder: Path) -> Path:
    """Random weights, 32×32 images, a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers", reason="the pipeline's text encoder")
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    source = folder / "tokenizer-files"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(source / "vocab.json"), str(source / "merges.txt"), model_max_length=24)
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_a_saved_pipeline_edits_along_a_straight_line_of_instructions(tmp_path: Path) -> None:
    folder = build(tmp_path)
    config = semantic.TextConfig("sun", steps=2)
    edit = semantic.TextEdit(folder, config)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = semantic.apply(edit, x, [0, 1], torch.tensor([0.0, 1.0]))
    assert out.shape == x.shape
    assert torch.allclose(semantic.apply(edit, x, [0, 1], torch.tensor([0.0, 1.0])), out, atol=1e-5)
    alone = semantic.apply(edit, x[1:], [1], 1.0)
    assert torch.allclose(alone[0], out[1], atol=1e-4)  # the noise follows the image, not its row
    rest = semantic.apply(edit, x[1:], [1], 0.0)
    assert not torch.allclose(rest, alone, atol=1e-4)
    other = semantic.TextEdit(folder, semantic.TextConfig("moon", steps=2))
    assert torch.allclose(semantic.apply(other, x[1:], [1], 0.0), rest, atol=1e-4)  # delta = 0 says nothing yet
    assert semantic.fingerprint(other) != semantic.fingerprint(edit)
    assert str(tmp_path) not in json.dumps(edit.describe())
    with pytest.raises(ValueError, match="sides divisible by 2"):
        semantic.apply(edit, x[:, :, :31], [0, 1], 0.5)


def test_without_transformers_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest, **more):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="needs the package transformers"):
        semantic.TextEdit(tmp_path)


def test_a_pipeline_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(MissingData, match=r"no model_index\.json"):
        semantic.TextEdit(tmp_path)


def test_sources_are_folders_or_pinned_repositories(tmp_path: Path) -> None:
    assert adapter.fetch(tmp_path, None) == tmp_path
    with pytest.raises(MissingData, match="no such folder"):
        adapter.fetch(tmp_path / "none" / "here" / "x", None)
    for revision in (None, "main", "0" * 39):
        with pytest.raises(ValueError, match="pinned revision"):
            adapter.fetch("timbrooks/instruct-pix2pix", revision)


@pytest.mark.parametrize("bad", [{"instruction": ""}, {"steps": 0}, {"guidance": 1.0}, {"image_guidance": 0.5}])
def test_bad_settings(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"instruction|steps must be"):
        semantic.TextConfig(**bad)
