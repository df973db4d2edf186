"""Every Python block of README and docs runs, page by page, with the big checkpoint replaced by the toy pipeline."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines

from vidtrl import toy
from vidtrl.cli.main import COMMANDS, main
from vidtrl.models import check_model
from vidtrl.toy.paraphrases import enhancer_path


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
    names, ran = {"__name__": "snippet"}, 0
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if ">>>" in block:
            continue
        for big, small in SMALL.items():
            block = block.replace(big, small)
        exec(compile(block, f"{page.name}", "exec"), names)
        ran += 1
    assert ran


def test_commands_exist_and_take_their_options(monkeypatch, capsys):
    """Every `vidtrl ...` and `python script.py ...` of a shell block."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def options(*command):
        with pytest.raises(SystemExit) as stop:
            if command[0] == "vidtrl":
                main([*command[1:], "--help"])
            else:
                monkeypatch.setattr(sys, "argv", [command[1], "--help"])
                runpy.run_path(str(ROOT / command[1]), run_name="__main__")
        assert stop.value.code == 0
        return set(re.findall(r"--[\w-]+", capsys.readouterr().out)) | {"--debug"}

    known, checked = {}, 0
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]:
        text = page.read_text().replace("\\\n", " ")
        typed = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
        for line in typed + re.findall(r"^\$ (.*)", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]  # VARIABLE=value command
            if words[:1] == ["python"] and (ROOT / words[1]).parent.name in ("benchmarks", "scripts"):
                assert (ROOT / words[1]).is_file(), f"{page.name}: {line}"
            elif words[:1] == ["vidtrl"]:
                assert words[1] in COMMANDS, f"{page.name}: {line}"
            else:
                continue
            given, command = {word.split("=")[0] for word in words if word.startswith("--")}, tuple(words[:2])
            if given and command not in known:
                known[command] = options(*command)
                if command[1] == "estimate":  # of a run of these
                    known[command] |= (
                        options("vidtrl", "sft") | options("vidtrl", "grpo") | options("vidtrl", "distill")
                    )
            assert not given - known.get(command, set()), f"{page.name}: {line}"
            checked += len(given)
    assert len(known) > 15 and checked > 100


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
