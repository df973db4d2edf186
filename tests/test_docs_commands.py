"""Every shell block of README and docs runs in bash. The programs in it are stand-ins that keep what they were called with, and
the parser of the real program must take that. Commands inside sentences name programs, files and options that exist."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_examples import COMMANDS as RECIPES
from test_examples import HERE

from vidtrl.cli import generate, launch, sft
from vidtrl.cli.errors import UserError
from vidtrl.cli.main import COMMANDS, main
from vidtrl.cli.parsing import VidtrlParser
from vidtrl.toy import write_dataset


ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, *sorted((ROOT / "examples").glob("*/README.md"))]
SHELL = re.compile(r"```(bash|console)\n(.*?)```", re.DOTALL)
PROGRAMS = ("vidtrl", "python", "python3", "pip", "accelerate", "make", "hf", "bash")
STAND_IN = """#!/bin/bash
if [ "$1" = -c ]; then exec {python} "$@"; fi
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && touch "$3/bin/activate"; fi
printf '%s\\x1f' "$PWD" "${{0##*/}}" "$@" >> {calls}; printf '\\x1e' >> {calls}
"""


class Parsed(Exception):
    """Instead of what a program does once it has understood its arguments."""


def shell_blocks(page: Path) -> list[str]:
    blocks = []
    for kind, block in SHELL.findall(page.read_text()):
        if kind == "console":
            block = "\n".join(line[2:] for line in block.splitlines() if line.startswith("$ "))
        blocks.append(block)
    return blocks


WITH_SHELL = [page for page in PAGES if shell_blocks(page)]


@pytest.fixture
def workplace(tmp_path):
    """A copy of what a reader has: the repository, and the files that the pages speak of."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("examples", "benchmarks", "scripts", "Makefile", "constraints.txt", "pyproject.toml"):
        (here / name).symlink_to(ROOT / name)
    examples = ROOT / "examples"
    shutil.copy(examples / "sft_lora_wan" / "config.yaml", here / "sft.yaml")
    shutil.copy(examples / "grpo_flash_wan" / "config.yaml", here / "grpo.yaml")
    shutil.copy(examples / "four_stages_wan" / "config.yaml", here / "config.yaml")
    shutil.copy(launch.CONFIGS / "single.yaml", here / "my_accelerate.yaml")
    for name in PROGRAMS:
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            STAND_IN.format(python=shlex.quote(sys.executable), calls=shlex.quote(str(tmp_path / "calls")))
        )
        program.chmod(0o755)
    return here


def calls_of(block: str, here: Path, root: Path) -> list[tuple[Path, list[str]]]:
    """(folder, command line) of every program that a block starts."""
    kept = root / "calls"
    kept.unlink(missing_ok=True)
    environment = {"PATH": f"{root / 'bin'}:/usr/bin:/bin", "HOME": str(root)} | {
        name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ
    }
    bash = shutil.which("bash")
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", block], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    calls = kept.read_text().split("\x1e")[:-1] if kept.exists() else []
    return [(Path(folder), words) for folder, *words in (call.split("\x1f")[:-1] for call in calls)]


@pytest.fixture
def only_parse(monkeypatch):
    """Programs end where they have understood their arguments."""
    for cls, name in ((argparse.ArgumentParser, "parse_args"), (VidtrlParser, "parse_args_and_config")):
        original = getattr(cls, name)

        def parse(self, args=None, namespace=None, *, original=original):
            raise Parsed(original(self, args) if namespace is None else original(self, args, namespace))

        monkeypatch.setattr(cls, name, parse)

    def launched(module, options, argv):
        launch.launch_command(module, {"num_processes": "2", **options}, argv)  # the reader's devices
        return importlib.import_module(module).train(argv)

    monkeypatch.setattr(sft, "launch", launched)


def understood(words: list[str]) -> None:
    """Let the real program's parser read a command line; the present folder is that of the call."""
    program, *args = words
    if program == "vidtrl":
        command = importlib.import_module(COMMANDS[args[0]][0], "vidtrl.cli")
        here = HERE if args[0] in ("sft", "grpo", "distill") else []  # where bfloat16 need not be
        with pytest.raises(Parsed):
            command.run([*args[1:], *here])
    elif program in ("python", "python3") and args[0] == "-m":
        assert args[1] in ("venv", "pytest")
    elif program in ("python", "python3") and args[0] == "demo/generate.py":  # which the demo writes
        with pytest.raises(Parsed):
            generate.main(args[1:])
    elif program in ("python", "python3"):
        script_takes(Path(args[0]), args[1:])
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert args[0] == "launch"
        with pytest.raises(Parsed) as parsed:
            launch_command_parser().parse_args(args[1:])
        config = parsed.value.args[0].config_file
        assert config is None or Path(config).is_file()
    elif program == "pip":
        for word, value in zip(args, args[1:], strict=False):
            assert word != "-c" or Path(value).is_file()
            for extra in re.findall(r"(?:\.|vidtrl)\[(.*)\]", value):
                assert set(extra.split(",")) <= installable_extras()
    elif program == "make":
        assert re.search(rf"^{args[0]}:", Path("Makefile").read_text(), re.MULTILINE), args
    elif program == "bash":
        assert Path(args[0]).is_file()
        recipe = Path(args[0]).absolute().parent.name
        if recipe in RECIPES and "--smoke" not in args:  # what run.sh passes on to train.py
            understood(["vidtrl", RECIPES[recipe], "--config", "config.yaml", *args[1:]])
    else:
        assert words == ["hf", "auth", "login"]


def installable_extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    return set(
        re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
    )


def script_takes(script: Path, args: list[str]) -> None:
    """A script of this repository that knows these options."""
    text = script.read_text()
    for option in args:
        assert not option.startswith("--") or f'"{option}"' in text, (script, option)


def name(page: Path) -> str:
    return page.name if page in DOCS else page.parent.name


@pytest.mark.parametrize("page", WITH_SHELL, ids=name)
def test_shell_blocks_run(page, workplace, only_parse, monkeypatch):
    number, here = 0, workplace if page in DOCS else workplace / "examples" / page.parent.name
    for block in shell_blocks(page):
        for folder, words in calls_of(block, here, workplace.parent):
            monkeypatch.chdir(folder)
            understood(words)
            number += 1
    assert number


def test_what_does_not_exist_is_found_out(workplace, only_parse, monkeypatch):
    """Negative control."""
    monkeypatch.chdir(workplace)
    ((_, words),) = calls_of(
        "vidtrl sft --config sft.yaml --learning_rat 1e-4  # a comment", workplace, workplace.parent
    )
    with pytest.raises(UserError, match="did you mean --learning_rate"):
        understood(words)
    for line in ("vidtrl report", "vidtrl compare a b --axes x", "vidtrl sft --config none.yaml"):
        with pytest.raises(UserError):
            understood(shlex.split(line))
    for line in ("make nothing", "python benchmarks/import_time.py --no", "pip install '.[no]'", "bash no.sh"):
        with pytest.raises((AssertionError, FileNotFoundError)):
            understood(shlex.split(line))
    with pytest.raises(AssertionError):
        calls_of("cd nowhere", workplace, workplace.parent)


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_commands_in_sentences_exist(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", text):
        words = [word for word in span.split() if not re.match(r"[A-Z_]+=", word)]
        if words[:1] == ["python"]:
            script_takes(Path(words[1]), words[2:])
        if words[:1] == ["vidtrl"] and len(words) > 1 and words[1] not in ("COMMAND", "NAME"):
            options = [word for word in words[2:] if word.startswith("--") and word != "--config"]
            assert words[1] in COMMANDS, span
            if options:
                with pytest.raises(SystemExit):
                    main([words[1], "--help"])
                shown = capsys.readouterr().out
                if words[1] == "estimate":  # which takes those of the trainers as well
                    with pytest.raises(SystemExit):
                        main(["sft", "--help"])
                    shown += capsys.readouterr().out
                assert all(re.search(rf"{option}\b", shown) for option in options), span
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(), re.MULTILINE), span


def test_data_blocks_are_data(workplace, monkeypatch, capsys):
    """JSON is JSON, and the pipeline file of the page is one that `vidtrl run` takes."""
    blocks = [block for page in PAGES for block in re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)]
    assert blocks and all(json.loads(line) for block in blocks for line in block.splitlines())
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "pipeline.md").read_text(), re.DOTALL)
    monkeypatch.chdir(workplace)
    write_dataset(workplace / "clips", num_clips=2)
    (workplace / "prompts.txt").write_text("a red circle moving right\n")
    (workplace / "pairs.jsonl").write_text('{"prompt": "a cat", "enhanced": "A cat sits on a wall."}\n')
    (workplace / "pipeline.yaml").write_text(text)
    assert list(yaml.safe_load(text)["stages"]) == ["sft", "grpo", "prompt", "distill"]
    assert main(["run", "--config", "pipeline.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "4 stages, in wan-four-stages" in shown and "missing" not in shown
