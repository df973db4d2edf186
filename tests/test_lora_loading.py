"""Adapters of pipelines without a LoRA loader: what a run saves loads by its card's lines, and under a next stage."""

import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from peft import LoraConfig
from sft_setup import make_trainer

from vidtrl.toy.world import render
from vidtrl.trainer.lora import active_adapters, add_lora, load_base_adapters, lora_loader, save_adapter


FAMILIES = {"hunyuan15": "denoiser", "allegro": "none"}


def sample(pipe, call):
    source = torch.Generator().manual_seed(0)
    return pipe("a red circle", generator=source, num_inference_steps=2, output_type="latent", **call).frames


def base_adapter(family, folder, seed):
    """An adapter of an earlier stage, whose alpha is not its rank."""
    torch.manual_seed(seed)
    pipe, _ = tiny_pipelines.ALL[family]()
    folder.mkdir(parents=True)
    save_adapter(add_lora(pipe.transformer, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False)), folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_cards_lines_in_a_fresh_process(tmp_path, family):
    pipe, call = tiny_pipelines.ALL[family]()
    assert lora_loader(pipe, pipe.transformer) == FAMILIES[family]
    untrained = sample(pipe, call)
    size = {name: call[name] for name in ("height", "width", "num_frames")}
    extra = {name: value for name, value in call.items() if name not in (*size, "max_sequence_length")}
    clips = Dataset.from_list(
        [{"video": render("a red circle moving right", seed=i).numpy(), "prompt": "a red circle"} for i in range(2)]
    )
    config = dict(size, max_sequence_length=call.get("max_sequence_length"), pipeline_kwargs=extra)
    base = base_adapter(family, tmp_path / "base", seed=1)
    trainer = make_trainer(tmp_path / "run", clips, tmp_path / "cache", pipe=pipe, base_adapters=[base], **config)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    expected = sample(trainer.pipe, call)
    card = (tmp_path / "run" / "README.md").read_text()
    lines = re.search(r"^pipe = .*?\n(.*)^pipe\.to", card, re.MULTILINE | re.DOTALL).group(1)
    script = "\n".join(
        [
            "import sys, torch",
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
            "import tiny_pipelines",
            f"pipe, call = tiny_pipelines.ALL[{family!r}]()",
            lines,
            inspect.getsource(sample),
            f"torch.save(sample(pipe, call), {str(tmp_path / 'latents.pt')!r})",
        ]
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "latents.pt"), expected, rtol=0, atol=1e-5)
    # negative controls: the base, and without the earlier stage
    assert (expected - untrained).abs().max() > 1e-3
    with trainer.policies.active("base"):
        assert (sample(trainer.pipe, call) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", [*FAMILIES, "wan"])
def test_base_adapters_stack_with_their_own_scales(tmp_path, family):
    pipe, call = tiny_pipelines.ALL[family]()
    folders = [base_adapter(family, tmp_path / str(seed), seed) for seed in (1, 2)]
    folders[1] += "/pytorch_lora_weights.safetensors"  # a file is as good as its directory
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a model has several adapters is what is wanted
        loaded = load_base_adapters(pipe, ["transformer"], folders)
    assert [one.name for one in loaded] == ["base_0", "base_1"] == list(active_adapters(pipe.transformer))
    layer = next(m for m in pipe.transformer.modules() if getattr(m, "scaling", None))
    assert layer.scaling == {"base_0": 3.0, "base_1": 3.0}
    both = sample(pipe, call)
    alone, _ = tiny_pipelines.ALL[family]()
    load_base_adapters(alone, ["transformer"], folders[:1])
    assert (sample(alone, call) - both).abs().max() > 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(pipe.transformer, LoraConfig(r=2))  # the one to train
    assert layer.scaling == {"base_0": 3.0, "base_1": 3.0, "default": 4.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_is_not_there(tmp_path, family):
    with pytest.raises(ValueError, match="base_adapters: .*there is no pytorch_lora_weights.safetensors"):
        load_base_adapters(tiny_pipelines.ALL[family]()[0], ["transformer"], [str(tmp_path)])
