"""Adapters in ComfyUI's layout: what stock diffusers reads back, and what ComfyUI would add to the original weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(Path(__file__).parent))

import tiny_pipelines  # noqa: E402
from hub_server import hub  # noqa: E402, F401
from torch import nn  # noqa: E402

from vidtrl.cli.main import main  # noqa: E402
from vidtrl.hub import HubError, export_comfyui  # noqa: E402
from vidtrl.hub.comfyui import KEY_MAPS, to_comfyui  # noqa: E402
from vidtrl.trainer.lora import add_lora, save_adapter  # noqa: E402


def adapter(pipe, folder, name="transformer", file=None, **config):
    """An adapter that matters, saved as the trainers save it."""
    config = {"r": 4, "lora_alpha": 8, **config}
    model = add_lora(getattr(pipe, name), LoraConfig(**config))
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.2, generator=generator)
    folder.mkdir(exist_ok=True)
    save_adapter(model, folder, **({"file": file} if file else {}))
    family = {"model": {"pipeline": type(pipe).__name__}}
    (folder / "vidtrl.json").write_text(json.dumps(family))
    return model


def sample(pipe, call):
    call = {**call, "num_inference_steps": 2, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt="a red circle moves", generator=torch.Generator().manual_seed(0), **call).frames


DOUBLE_BLOCKS = {
    "target_modules": r"transformer_blocks\.\d+\..*(to_q|to_k|to_v|add_\w_proj|to_out\.0|to_add_out|net\.0\.proj|net\.2|linear)"
}
CASES = {
    "wan": {},
    "wan_rslora": {"use_rslora": True},
    "wan_patterns": {
        "rank_pattern": {"attn1.to_q": 2, "ffn.net.2": 6},
        "alpha_pattern": {"attn1.to_q": 7, "blocks.0.attn2.to_k": 3},
    },
    "wan_everywhere": {"target_modules": "all-linear"},
    "wan_i2v": {},
    "wan21_i2v": {},
    "wan22_ti2v_i2v": {},
    "skyreels": {},
    "skyreels_i2v": {},
    "ltx": {},
    "ltx_i2v": {},
    "hunyuan": DOUBLE_BLOCKS,
    "hunyuan_i2v": DOUBLE_BLOCKS,
    "hunyuan_i2v_concat": DOUBLE_BLOCKS,
}


@pytest.mark.parametrize("case", CASES)
def test_stock_diffusers_reads_it_back(case, tmp_path):
    build = getattr(tiny_pipelines, case if hasattr(tiny_pipelines, case) else "wan")
    pipe, call = build()
    untrained = sample(pipe, call)
    adapter(pipe, tmp_path / "run", **CASES[case])
    expected = sample(pipe, call)
    assert (expected - untrained).abs().max() > 1e-3

    (file,) = export_comfyui(tmp_path / "run", tmp_path / "out.safetensors")
    fresh, _ = build()
    fresh.load_lora_weights(str(file))
    torch.testing.assert_close(sample(fresh, call), expected, rtol=1e-4, atol=1e-5)


def test_the_scale_is_in_the_alpha_keys(tmp_path):
    pipe, call = tiny_pipelines.wan()
    adapter(pipe, tmp_path / "run")
    expected = sample(pipe, call)
    (file,) = export_comfyui(tmp_path / "run", tmp_path)
    assert file == tmp_path / "run.safetensors"
    weights = load_file(file)
    layers = {name.removesuffix(".alpha") for name in weights if name.endswith(".alpha")}
    assert "diffusion_model.blocks.0.self_attn.q" in layers and "diffusion_model.blocks.1.ffn.2" in layers
    assert set(weights) == {f"{n}.{end}" for n in layers for end in ("alpha", "lora_up.weight", "lora_down.weight")}
    assert {weights[f"{n}.alpha"].item() for n in layers} == {8.0}

    for name, other in (("keys", {}), ("halved", {f"{n}.alpha": torch.tensor(4.0) for n in layers})):
        kept = {k: v for k, v in weights.items() if not k.endswith(".alpha")} | other
        save_file(kept, tmp_path / f"{name}.safetensors")
        fresh, _ = tiny_pipelines.wan()
        fresh.load_lora_weights(str(tmp_path / f"{name}.safetensors"))
        assert (sample(fresh, call) - expected).abs().max() > 1e-3, name


def test_the_scale_in_the_weights_is_the_same_adapter(tmp_path):
    pipe, call = tiny_pipelines.wan()
    adapter(pipe, tmp_path / "run")
    expected = sample(pipe, call)
    (file,) = export_comfyui(tmp_path / "run", tmp_path / "baked.safetensors", alpha_keys=False)
    assert not any(name.endswith(".alpha") for name in load_file(file))
    fresh, _ = tiny_pipelines.wan()
    fresh.load_lora_weights(str(file))
    torch.testing.assert_close(sample(fresh, call), expected, rtol=1e-4, atol=1e-5)


def test_two_experts_are_two_files(tmp_path):
    pipe, call = tiny_pipelines.wan22()
    untrained = sample(pipe, call)
    for name, noise in (("transformer", "high"), ("transformer_2", "low")):
        adapter(pipe, tmp_path / "run", name, f"pytorch_lora_weights_{noise}_noise.safetensors")
    expected = sample(pipe, call)
    high, low = export_comfyui(tmp_path / "run", tmp_path / "wan.safetensors")
    assert (high.name, low.name) == ("wan_high_noise.safetensors", "wan_low_noise.safetensors")
    fresh, _ = tiny_pipelines.wan22()
    fresh.load_lora_weights(str(high), adapter_name="high")
    half = sample(fresh, call)
    fresh.load_lora_weights(str(low), adapter_name="low", load_into_transformer_2=True)
    torch.testing.assert_close(sample(fresh, call), expected, rtol=1e-4, atol=1e-5)
    assert (half - expected).abs().max() > 1e-4 and (half - untrained).abs().max() > 1e-4


# ---- As ComfyUI adds it: to the weights of the original model ----


def add_patches(original, lora):
    """W + alpha / rank * up @ down; alpha is the rank where it is not given."""
    patched, used = {name: weight.clone() for name, weight in original.items()}, set()
    for name in original:
        key = f"diffusion_model.{name}"
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
            if f"{key}.{up}.weight" in lora:
                a, b = lora[f"{key}.{down}.weight"], lora[f"{key}.{up}.weight"]
                alpha = lora.get(f"{key}.alpha", torch.tensor(float(a.shape[0])))
                patched[name] = patched[name] + alpha / a.shape[0] * b @ a
                used |= {f"{key}.{down}.weight", f"{key}.{up}.weight", f"{key}.alpha"}
    assert set(lora) <= used
    return patched


def original_mochi(weights):
    """As Genmo's checkpoint has them; the inverse of diffusers' convert_mochi_to_diffusers.py."""
    result = {}
    for i in range(2):
        ours, theirs = f"transformer_blocks.{i}.", f"blocks.{i}."
        w = {name.removeprefix(ours): weight for name, weight in weights.items() if name.startswith(ours)}
        result[f"{theirs}attn.qkv_x"] = torch.cat([w[f"attn1.to_{x}"] for x in "qkv"])
        result[f"{theirs}attn.qkv_y"] = torch.cat([w[f"attn1.add_{x}_proj"] for x in "qkv"])
        result[f"{theirs}attn.proj_x"] = w["attn1.to_out.0"]
        for name, mlp in (("ff", "mlp_x"), ("ff_context", "mlp_y")):
            if f"{name}.net.2" in w:
                gate, projection = w[f"{name}.net.0.proj"].chunk(2)
                result[f"{theirs}{mlp}.w1"] = torch.cat([projection, gate])
                result[f"{theirs}{mlp}.w2"] = w[f"{name}.net.2"]
        names = {"norm1.linear": "mod_x", "norm1_context.linear": "mod_y", "norm1_context.linear_1": "mod_y"}
        for name, mod in {**names, "attn1.to_add_out": "attn.proj_y"}.items():
            if name in w:
                result[f"{theirs}{mod}"] = w[name]
    return result


def original_hunyuan(weights):
    """As Tencent's checkpoint has them."""
    ours, theirs = "transformer_blocks.0.", "double_blocks.0."
    w = {name.removeprefix(ours): weight for name, weight in weights.items() if name.startswith(ours)}
    result = {
        f"{theirs}img_attn_qkv": torch.cat([w[f"attn.to_{x}"] for x in "qkv"]),
        f"{theirs}txt_attn_qkv": torch.cat([w[f"attn.add_{x}_proj"] for x in "qkv"]),
        f"{theirs}img_attn_proj": w["attn.to_out.0"],
        f"{theirs}txt_attn_proj": w["attn.to_add_out"],
        f"{theirs}img_mod.linear": w["norm1.linear"],
        f"{theirs}txt_mod.linear": w["norm1_context.linear"],
        f"{theirs}img_mlp.fc1": w["ff.net.0.proj"],
        f"{theirs}img_mlp.fc2": w["ff.net.2"],
        f"{theirs}txt_mlp.fc1": w["ff_context.net.0.proj"],
        f"{theirs}txt_mlp.fc2": w["ff_context.net.2"],
    }
    ours, theirs = "single_transformer_blocks.0.", "single_blocks.0."
    w = {name.removeprefix(ours): weight for name, weight in weights.items() if name.startswith(ours)}
    result[f"{theirs}linear1"] = torch.cat([*(w[f"attn.to_{x}"] for x in "qkv"), w["proj_mlp"]])
    return result | {f"{theirs}linear2": w["proj_out"], f"{theirs}modulation.linear": w["norm.linear"]}


def linear_weights(model):
    return {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize(
    "family, original, config",
    [
        ("mochi", original_mochi, {}),
        (
            "mochi",
            original_mochi,
            {"target_modules": ["attn1.to_k", "add_v_proj"], "alpha_pattern": {"add_v_proj": 3}},
        ),
        ("hunyuan", original_hunyuan, {}),
        ("hunyuan_i2v", original_hunyuan, {}),
        ("hunyuan_i2v_concat", original_hunyuan, {}),
        ("hunyuan", original_hunyuan, {"target_modules": r".*transformer_blocks\.\d+\.attn\.(to_v|add_q_proj)"}),
        (
            "hunyuan",
            original_hunyuan,
            {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"proj_mlp": 5}, "use_rslora": True},
        ),
    ],
)
@pytest.mark.parametrize("alpha_keys", [None, True, False])
def test_comfyui_would_add_the_same(family, original, config, alpha_keys, tmp_path):
    pipe, _ = getattr(tiny_pipelines, family)()
    before = original(linear_weights(pipe.transformer))
    model = adapter(pipe, tmp_path / "run", **config)
    (file,) = export_comfyui(tmp_path / "run", tmp_path / "out.safetensors", alpha_keys=alpha_keys)
    after = add_patches(before, load_file(file))
    expected = original(linear_weights(model.merge_and_unload()))
    changed = {name for name in expected if not torch.equal(expected[name], before[name])}
    assert len(changed) >= 2
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rank", [2])
def test_single_blocks_of_hunyuan_video_through_diffusers(rank):
    """diffusers splits them at the real model's width."""
    width, generator = 3072, torch.Generator().manual_seed(0)
    sizes = {"attn.to_q": width, "attn.to_k": width, "attn.to_v": width, "proj_mlp": 4 * width}
    weights = {}
    for block, names in (("single_transformer_blocks.3", sizes), ("transformer_blocks.0", {"attn.to_q": width})):
        for name, outputs in names.items():
            weights[f"{block}.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
            weights[f"{block}.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    exported = to_comfyui(weights, {"lora_alpha": 4 * rank}, KEY_MAPS["hunyuan-video"])
    read = HunyuanVideoPipeline.lora_state_dict(exported)
    x = torch.randn(width, generator=generator)
    for name in weights:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix("lora_A.weight")
            expected = 4 * weights[f"{layer}lora_B.weight"] @ (weights[name] @ x)
            got = read[f"transformer.{layer}lora_B.weight"] @ (read[f"transformer.{layer}lora_A.weight"] @ x)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)
    left_out = read["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"]
    assert left_out.shape[0] == width and not left_out.any()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_fused_layers_keep_each_members_product(data):
    """Any ranks and scales, whichever of the members are there."""
    members = [name for name, _ in KEY_MAPS["hunyuan-video"].fused["single_blocks.{n}.linear1"]]
    present = data.draw(st.lists(st.sampled_from(members), min_size=1, unique=True))
    width, weights, alphas = 6, {}, {}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for name in present:
        layer, rank = name.replace("{n}", "2"), data.draw(st.integers(1, 4))
        outputs = 4 * width if name.endswith("proj_mlp") else width
        weights[f"{layer}.lora_A.weight"] = torch.randn(rank, width, generator=generator, dtype=torch.float64)
        weights[f"{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator, dtype=torch.float64)
        alphas[layer] = data.draw(st.sampled_from([1, 2, 3.5, 8]))
    exported = to_comfyui(weights, {"alpha_pattern": alphas}, KEY_MAPS["hunyuan-video"], alpha_keys=True)
    before = {"single_blocks.2.linear1": torch.zeros(7 * width, width, dtype=torch.float64)}
    (after,) = add_patches(before, exported).values()
    rows = 0
    for name in members:
        layer, size = name.replace("{n}", "2"), 4 * width if name.endswith("proj_mlp") else width
        expected = torch.zeros(size, width, dtype=torch.float64)
        if name in present:
            a, b = weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"]
            expected = alphas[layer] / a.shape[0] * b @ a
        torch.testing.assert_close(after[rows : rows + size], expected, rtol=1e-5, atol=1e-5)
        rows += size


# ---- Refusals, and the command ----


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
    pipe, _ = tiny_pipelines.wan()
    adapter(pipe, tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        export_comfyui(tmp_path / "dora", tmp_path)
    pipe, _ = tiny_pipelines.ltx()
    adapter(pipe, tmp_path / "ltx", target_modules=["proj_in", "attn1.to_q"])
    with pytest.raises(ValueError, match="no place for proj_in"):
        export_comfyui(tmp_path / "ltx", tmp_path)
    pipe, _ = tiny_pipelines.cogvideox()
    adapter(pipe, tmp_path / "cog")
    with pytest.raises(ValueError, match="no ComfyUI key map of the cogvideox family.*wan"):
        export_comfyui(tmp_path / "cog", tmp_path)
    with pytest.raises(ValueError, match="there is no family 'wam'"):
        export_comfyui(tmp_path / "cog", tmp_path, family="wam")
    (tmp_path / "ltx" / "vidtrl.json").unlink()
    with pytest.raises(ValueError, match="pass family"):
        export_comfyui(tmp_path / "ltx", tmp_path)
    with pytest.raises(ValueError, match="organisation/name"):
        export_comfyui(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pytorch_lora_weights"):
        export_comfyui(tmp_path / "empty", tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_adapters_below_are_pointed_out(tmp_path, caplog):
    pipe, _ = tiny_pipelines.wan()
    adapter(pipe, tmp_path / "run")
    below = tmp_path / "run" / "base_adapters" / "0" / "transformer.safetensors"
    below.parent.mkdir(parents=True)
    below.write_bytes((tmp_path / "run" / "pytorch_lora_weights.safetensors").read_bytes())
    (top,) = export_comfyui(tmp_path / "run", tmp_path / "top.safetensors")
    assert str(below) in caplog.text
    (base,) = export_comfyui(below, tmp_path / "base.safetensors", family="wan")
    assert set(load_file(top)) == set(load_file(base))


def test_from_the_hub(hub, tmp_path):  # noqa: F811
    pipe, _ = tiny_pipelines.wan()
    adapter(pipe, tmp_path / "run")
    hub.put("me/wan-sft", {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()})
    (remote,) = export_comfyui("me/wan-sft", tmp_path / "remote")
    (local,) = export_comfyui(tmp_path / "run", tmp_path / "local.safetensors")
    assert remote == tmp_path / "remote" / "wan-sft.safetensors" and remote.read_bytes() == local.read_bytes()
    with pytest.raises(HubError, match="cannot pull me/nowhere: there is no such repository"):
        export_comfyui("me/nowhere", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nothing at './run'"):
        export_comfyui("./run", tmp_path / "nowhere")


def test_every_row_belongs_to_a_family():
    from vidtrl.models.families import FAMILIES

    assert set(KEY_MAPS) <= {family.name for family in FAMILIES}


def test_command(tmp_path, capsys):
    pipe, _ = tiny_pipelines.wan()
    adapter(pipe, tmp_path / "run")
    out = tmp_path / "loras" / "mine.safetensors"
    assert main(["export", str(tmp_path / "run"), str(out), "--format", "comfyui"]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.is_file()
    for argv, message in (
        ([str(tmp_path / "run"), str(out), "--format", "comfyui", "--base_model", "x"], "--family"),
        ([str(tmp_path / "run"), str(out), "--format", "lora", "--family", "wan"], "for --format comfyui"),
        ([str(tmp_path / "run"), str(out)], "--format"),
        ([str(tmp_path / "run"), str(out), "--format", "comfyui", "--dtype", "float16"], "for --format skyreels-v2"),
        ([str(tmp_path / "run"), str(out), "--format", "skyreels-v2", "--dtype", "half-full"], "bfloat16"),
    ):
        assert main(["export", *argv]) == 2
        assert message in capsys.readouterr().err
