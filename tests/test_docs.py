"""Every Python block of README and docs runs, page by page, with the big checkpoint replaced by the toy pipeline."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines
from diffusers import WanPipeline
from hub_server import Hub
from peft import LoraConfig

from vidtrl import toy
from vidtrl.data.video import write_video
from vidtrl.models import check_model
from vidtrl.toy.paraphrases import enhancer_path
from vidtrl.trainer.lora import ADAPTER_FILE, add_lora, save_adapter


ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if "```python\n" in p.read_text())
SMALL = {  # what a reader would change to run the same program on a laptop
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": toy.pipeline_path(),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "./wan-i2v",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "./wan-a14b",
    "Qwen/Qwen2.5-0.5B-Instruct": enhancer_path(),
    "max_steps=200": "max_steps=2, use_cpu=True, bf16=False, report_to='none'",
    "height=480": "height=64",
    "width=832": "width=64",
    "num_frames=81).frames": "num_frames=17, num_inference_steps=2).frames",
    "num_frames=81": "num_frames=17",
    "fps=16, max_steps=1000": "fps=8, max_sequence_length=16, per_device_train_batch_size=2, use_cpu=True, max_steps=2",
    "max_steps=3600": "max_sequence_length=16, per_device_train_batch_size=2, fake_updates_per_student=1, use_cpu=True, "
    'max_steps=2, cache_dir="cache"',
    'recipe="self-forcing"': 'recipe="self-forcing", frames_per_block=1',
    "gradient_accumulation_steps=8": "gradient_accumulation_steps=1",
    "max_steps=300": "max_sequence_length=16, num_inference_steps=3, use_cpu=True, max_steps=1",
    '.to("cuda")': "",
    "torch.bfloat16": "torch.float32",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.write_dataset(tmp_path / "clips", num_clips=4)
    tiny_pipelines.tiny_image(64).save(tmp_path / "first_frame.png")
    if "Wan-AI/Wan2.1-I2V" in page.read_text():
        tiny_pipelines.wan_i2v()[0].save_pretrained(tmp_path / "wan-i2v")
    if "Wan-AI/Wan2.2-T2V-A14B" in page.read_text():
        tiny_pipelines.wan22()[0].save_pretrained(tmp_path / "wan-a14b")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    for big, small in SMALL.items():
        code = code.replace(big, small)
    if page.name == "hub.md":  # in a process whose Hub is ours
        with Hub().running() as hub:
            what_the_hub_has(hub, tmp_path)
            environment = hub.environment(tmp_path / "home")
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            assert {repo for kind, repo in hub.repos if kind == "dataset"} == {
                "me/rollouts",
                "me/preferences",
                "me/clips",
            }
        return
    exec(compile(code, page.name, "exec"), {"__name__": "snippet"})


def what_the_hub_has(hub, folder):
    """What the page of the Hub presupposes: a pushed adapter, and an exported comparison."""
    pipe = WanPipeline.from_pretrained(toy.pipeline_path())
    (folder / "wan-grpo").mkdir()
    save_adapter(add_lora(pipe.transformer, LoraConfig(r=2)), folder / "wan-grpo")
    hub.put("me/wan-grpo", {ADAPTER_FILE: (folder / "wan-grpo" / ADAPTER_FILE).read_bytes()})
    (folder / "preferences").mkdir()
    row = {"prompt": "a red circle moving left"}
    for role, quality in (("chosen", "clean"), ("rejected", "raw")):
        row[f"{role}_file_name"] = f"{role}.mp4"
        write_video(folder / "preferences" / f"{role}.mp4", toy.render(row["prompt"], quality, seed=0), fps=8)
    (folder / "preferences" / "metadata.jsonl").write_text(json.dumps(row) + "\n")


def test_no_python_block_is_left_out():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"^ *```python.+$|^ +```python|^~~~|^>>>", page.read_text(), re.MULTILINE), page.name


def test_check_models_output_is_todays():
    shown = re.search(r"\$ vidtrl check-model.*?```", (ROOT / "docs" / "cli.md").read_text(), re.DOTALL).group()
    pipe, call = tiny_pipelines.wan()
    report = str(check_model(pipe, **call))
    without_numbers = [re.sub(r"\s+[\d.]+e[+-]\d+", "", text).strip() for text in (shown, report)]
    assert without_numbers[1] in without_numbers[0]


def test_links_point_at_files():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith(("http", "data:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_site_builds_with_its_formulas_and_requests_nothing(tmp_path):
    """What `make docs` runs."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    built = {page: (tmp_path / page.stem / "index.html").read_text() for page in (ROOT / "docs").glob("*_trainer.md")}
    for page, html in built.items():
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        formulas = len(re.findall(r"\$\$.*?\$\$|\$[^$\n]+\$", prose, re.DOTALL))
        assert html.count("<math") == formulas >= 10, page.name
        text = re.sub(r"<(script|style|code|math).*?</\1>", "", html, flags=re.DOTALL)
        assert "$" not in text and "\\(" not in text
    assert len(built) == 3
    # every page is in the navigation, and none loads anything from elsewhere
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    home = (tmp_path / "index.html").read_text()
    assert pages == {page for page in pages if f'href="{page}/"' in home}
    for html in [home, *built.values()]:
        assert not re.search(
            r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:[^>]*stylesheet", html
        )


def test_options_are_current():
    script = ROOT / "scripts" / "option_tables.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    page = (ROOT / "docs" / "options.md").read_text()
    sections = dict(re.findall(r"## (\w+)\n\n.*?(\| option.*?)(?=\n## |\Z)", page, re.DOTALL))
    for name, rows in (("VideoSFTConfig", 6), ("VideoGRPOConfig", 40), ("VideoDistillConfig", 25)):
        assert len(re.findall(r"^\| `", sections[name], re.MULTILINE)) >= rows
    # the hand-made table of the SFT page leaves none out
    sft = (ROOT / "docs" / "sft_trainer.md").read_text()
    for name in re.findall(r"^\| `(\w+)`", page.split("## VideoGRPOConfig")[0], re.MULTILINE):
        assert f"`{name}`" in sft, name


def test_paper_index_is_current_and_misses_none():
    script = ROOT / "scripts" / "paper_index.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "papers.md").read_text()
    cited = {
        paper
        for path in (ROOT / "src" / "vidtrl").rglob("*.py")
        for paper in re.findall(r"huggingface\.co/papers/(\d{4}\.\d{5})", path.read_text())
    }
    assert len(cited) > 40 and not {paper for paper in cited if f"[{paper}]" not in page}
    # each thing of vidtrl that the page names is there
    code = "\n".join(path.read_text() for path in (ROOT / "src" / "vidtrl").rglob("*.py"))
    for name in re.findall(r"`(\w+_\w+)`", page.split("## Everything else")[1]):
        assert re.search(rf"\b{name}\b", code), name
