"""`vidtrl report` on what real tiny runs wrote, whole and broken."""

import json
import shutil
import time

import distill_setup
import grpo_setup
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sft_setup
from test_report import HOSTILE, Browser, needs_chromium, parse, probe, set_value, shown

from vidtrl.cli.main import main
from vidtrl.cli.run_state import STATE_FILE
from vidtrl.report import pipelines
from vidtrl.report.runs import _evenly, read_run, write_run_report


VALIDATION = {
    "validation_steps": 2,
    "validation_prompts": ["a red circle", HOSTILE],
    "validation_num_inference_steps": 1,
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """Two prompts a step, four samples each; completions before every update, validations before the first and after 2 and 4."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    trainer = grpo_setup.make_trainer(
        folder, max_steps=4, num_inference_steps=2, log_completions=True, num_completions_to_print=0, **VALIDATION
    )
    trainer.train()
    trainer.save_model(str(folder))
    trainer.save_state()
    return folder


@pytest.fixture
def copy(grpo, tmp_path):
    return shutil.copytree(grpo, tmp_path / "run")


def page_text(path):
    return " ".join(" ".join(parse(path).text).split())


def test_a_grpo_run(grpo, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert main(["report", str(grpo), "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(output) and err == ""
    text, html = page_text(output), output.read_text()
    assert "4 optimizer steps logged, 32 completions, 6 validation videos." in text
    assert html.count("data:video/mp4;base64,") == 32 + 6 and html.count("data-step=") == 8
    for title in ("Loss", "Reward", "Reward brightness", "Learning rate", "Step time", "Gradient norm"):
        assert f"{title}: " in html and f">{title}</figcaption>" in html, title
    assert "learning_rate 0.01" in text and "WanPipeline" not in text and str(grpo.parent) not in html
    # the table holds the means of the Parquet files
    for step in range(4):
        rows = pq.read_table(grpo / "completions" / f"completions_{step:05d}.parquet")["brightness"].to_pylist()
        assert f"step {step} 8 clips {sum(rows) / 8:.3f}".replace("-", "\N{MINUS SIGN}") in text
    rows = read_run(grpo).completions
    assert all(set(row["scores"]) == {"brightness", "advantage"} and "seed" in row["facts"] for row in rows)
    assert abs(sum(row["scores"]["advantage"] for row in rows[:4])) < 1e-4  # a group


@needs_chromium
@pytest.mark.parametrize("width", [375, 1440])
def test_its_page_in_a_browser(grpo, browser, tmp_path, width):
    page, _ = write_run_report(grpo, tmp_path / "page.html")
    browser.open(page.as_uri(), width)
    state = probe(browser)
    assert state["total"] == 38 and state["wide"] == 0 and state["width"] == width
    validations = [VALIDATION["validation_prompts"][0], HOSTILE]
    assert shown(browser)[:2] == validations and len(shown(browser)) == 4
    assert browser.evaluate("document.querySelector('.step output').textContent") == "step 3"
    first = json.dumps(shown(browser)[2:])
    set_value(browser, "[aria-label='Training step']", "0", "input")
    assert browser.evaluate("document.querySelector('.step output').textContent") == "step 0"
    steps = "JSON.stringify([...document.querySelectorAll('.card:not([hidden]) .at')].map((p) => p.textContent))"
    assert json.loads(browser.evaluate(steps)) == ["Step 0"] * 2 and json.dumps(shown(browser)[2:]) != first
    browser.evaluate(
        "[...document.querySelectorAll('button')].find((b) => b.textContent === 'First beside last').click()"
    )
    assert sorted(json.loads(browser.evaluate(steps))) == ["Step 0"] * 2 + ["Step 3"] * 2
    assert browser.errors == [] and not [u for u in browser.requests if not u.startswith(("data:", "file:", "blob:"))]


def test_its_completions_folder_alone(grpo, copy, tmp_path, capsys):
    """Inside the run the log is found; downloaded under another name, the folder is all there is."""
    assert main(["report", str(copy / "completions")]) == 0
    text = page_text(copy / "completions" / "report.html")
    assert "Run run/completions" in text and "4 optimizer steps logged, 32 completions." in text
    alone = shutil.copytree(grpo / "completions", tmp_path / "downloads" / "log")
    shutil.copy(grpo / "trainer_state.json", alone.parent)  # of another run
    assert main(["report", str(alone)]) == 0
    text = page_text(alone / "report.html")
    assert "Run log 32 completions." in text and "Learning curves" not in text
    assert main(["report", str(copy / "validation"), "--link"]) == 0
    html = (copy / "validation" / "report.html").read_text()
    assert 'src="step_000004/00-a-red-circle.mp4"' in html and "32 completions" not in page_text(
        copy / "validation/report.html"
    )


def test_broken_files_cost_a_warning_each(copy, capsys):
    completions = copy / "completions"
    (completions / "completions_00002.parquet").write_bytes(b"PAR1 half written")
    pq.write_table(pa.table({"loss": [1.0]}), completions / "completions_00009.parquet")
    (completions / "_completions_00005.parquet.tmp").write_bytes(b"under way")
    cut, gone, *_ = sorted((completions / "step_000001").glob("*.mp4"))
    cut.write_bytes(cut.read_bytes()[:-50])
    gone.unlink()
    outside = copy.parent / "secret.mp4"
    shutil.copy(sorted((completions / "step_000003").glob("*.mp4"))[0], outside)
    table = pq.read_table(completions / "completions_00003.parquet")
    names = ["../../secret.mp4", str(outside), *table["video"].to_pylist()[2:]]
    table = table.set_column(table.column_names.index("video"), "video", pa.array(names))
    pq.write_table(table, completions / "completions_00003.parquet")
    (copy / "validation" / "step_000004" / "prompts.json").unlink()
    (copy / "training_args.json").write_text("{")
    assert main(["report", str(copy)]) == 0
    warnings = capsys.readouterr().err.splitlines()
    for name in (
        *(
            "completions_00002.parquet",
            "completions_00009.parquet",
            f"{cut.name} is no mp4",
            f"{gone.name} does not exist",
        ),
        *(
            "lists '../../secret.mp4', which is no mp4 file inside it",
            f"lists {str(outside)!r}, which is no mp4",
            "step_000004 has no prompts.json",
        ),
        "training_args.json could not be read",
    ):
        assert sum(name in line for line in warnings) == 1, name
    assert len(warnings) == 8
    text, html = page_text(copy / "report.html"), (copy / "report.html").read_text()
    assert html.count("data:video/mp4;base64,") == 24 - 4 + 4 and text.count("no video") == 4
    assert f"{copy}/" not in html and "completions/completions_00002.parquet could not be read" in text
    assert "Not everything could be shown" in text and "24 completions, 4 validation videos" in text


def test_a_page_names_no_folder_and_no_token_of_this_machine(copy):
    arguments = json.loads((copy / "training_args.json").read_text())
    kwargs = {"token": "hf_secret", "cache_dir": "/home/somebody/models", "revision": "main"}
    arguments |= {"model_init_kwargs": kwargs, "base_adapters": ["/home/somebody/sft", "owner/adapter"]}
    (copy / "training_args.json").write_text(json.dumps(arguments))
    html = write_run_report(copy)[0].read_text()
    assert "hf_secret" not in html and "/home/somebody" not in html
    assert "owner/adapter" in html and ".../models" in html and ".../sft" in html and "revision" in html
    (copy / "training_args.json").write_text("{")  # of the run, read from a folder in it
    page, warnings = write_run_report(copy / "completions")
    assert f"{copy}/training_args.json could not be read" in warnings[0]
    assert "training_args.json could not be read" in page.read_text() and f"{copy.parent}/" not in page.read_text()


def test_folders_without_a_run(grpo, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "is no folder: give the output directory of a trainer"),
        ([str(grpo.parent)], "The folders run in it are runs."),
        ([str(grpo), "--output", str(tmp_path / "page.txt")], "must be an .html file"),
        ([str(grpo), "--max_videos", "0"], "--max_videos must be at least 1"),
        ([], "DIR"),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "completions_*.parquet" in capsys.readouterr().err and not list((tmp_path / "empty").iterdir())


def test_sft_and_distillation_runs(tmp_path):
    """Validation videos of both; an SFT run that is still going on has its log in the last checkpoint alone."""
    sft, student = tmp_path / "sft", tmp_path / "student"
    rows = sft_setup.write_clips(tmp_path, 2)
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "hub_token": "secret", **VALIDATION}
    trainer = sft_setup.make_trainer(sft, rows, tmp_path / "cache", **config)
    trainer.train()
    distill = distill_setup.make_trainer(student, tmp_path / "cache2", **VALIDATION)
    distill.train()
    distill.save_state()
    for folder, titles in (
        (sft, ("Loss", "Learning rate", "Speed")),
        (student, ("Score difference", "Loss of each network")),
    ):
        page, warnings = write_run_report(folder)
        html = page.read_text()
        assert warnings == [] and html.count("data:video/mp4;base64,") == 4 and HOSTILE in page_text(page)
        assert all(f">{title}</figcaption>" in html for title in titles)
        assert "step 0" in html and "step 2" in html and "data-step=" not in html
    assert (
        "2 optimizer steps logged" in page_text(sft / "report.html")
        and "secret" not in (sft / "report.html").read_text()
    )


def test_completions_of_a_language_model(tmp_path):
    """As TRL's GRPOTrainer writes them: text in place of videos, prompts as messages, extras before the advantage."""
    folder = tmp_path / "completions"
    folder.mkdir()
    messages = [{"role": "system", "content": "Rewrite."}, {"role": "user", "content": HOSTILE}]
    rows = {
        "step": [5, 5],
        "prompt": [messages] * 2,
        "completion": [[{"role": "assistant", "content": "a red disc"}], [{"role": "assistant", "content": HOSTILE}]],
        "video_reward": [1.0, None],
        "rendered_prompt": ["a red disc", ""],
        "advantage": [0.7, -0.7],
    }
    pq.write_table(pa.table(rows), folder / "completions_00005.parquet")
    page, warnings = write_run_report(folder)
    text = page_text(page)
    assert warnings == [] and "Rewrite." in text and text.count(HOSTILE) == 2 and "no video" not in text
    assert "Enhanced (sample 1): a red disc" in text and "video_reward 1" in text and "advantage −0.7" in text
    assert "rendered_prompt a red disc" in text


def test_a_completion_log_without_steps(tmp_path):
    """The step is in the file's name, or it is 0."""
    for name in ("00007", "merged"):
        pq.write_table(pa.table({"prompt": ["p"], "completion": [name]}), tmp_path / f"completions_{name}.parquet")
    assert [(row["step"], row["text"]) for row in read_run(tmp_path).completions] == [(0, "merged"), (7, "00007")]


def test_many_steps_are_chosen_quickly():
    began = time.perf_counter()
    chosen = _evenly([1] * 20_000, 24)
    assert time.perf_counter() - began < 1
    assert len(chosen) == 24 and (chosen[0], chosen[-1]) == (0, 19_999)
    assert {b - a for a, b in zip(chosen, chosen[1:], strict=False)} <= {869, 870}


def test_steps_are_left_out_evenly(grpo, tmp_path):
    assert _evenly([4] * 10, 40) == list(range(10)) and _evenly([4] * 9, 20) == [0, 2, 4, 6, 8]
    assert _evenly([4] * 10, 1) == [0, 9] and _evenly([4], 1) == [0] and _evenly([], 5) == []
    run = read_run(grpo, max_videos=16)
    assert {row["step"] for row in run.completions if row["shown"]} == {0, 3}
    assert {row["step"] for row in run.completions} == {0, 1, 2, 3}  # the table has them all
    assert [w for w in run.warnings if "2 of 4 steps with completions are shown" in w]


@pytest.fixture
def pipeline(grpo, tmp_path):
    """What `vidtrl run` leaves: two finished stages of the video model, the enhancer's trainings, a distillation under way."""
    folder = tmp_path / "four stages"
    for stage, parts in (("sft", ("validation",)), ("grpo", ("validation", "completions"))):
        for part in parts:
            shutil.copytree(grpo / part, folder / stage / part)
        for name in ("trainer_state.json", "training_args.json"):
            shutil.copy(grpo / name, folder / stage / name)
    for step, log in (("sft", {"loss": 2.0}), ("grpo", {"reward": 0.5})):
        (folder / "prompt" / step).mkdir(parents=True)
        history = [{"step": n, **log} for n in (1, 2)]
        (folder / "prompt" / step / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "distill" / "prompts").mkdir(parents=True)
    rows = [{"prompt": "A cat sits on a wall.", "user_prompt": "cat"}, {"prompt": HOSTILE, "user_prompt": HOSTILE}]
    (folder / "distill" / "prompts" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {"updates": {"grpo": 4}, "metrics": {"eval_rewards/accuracy/mean": [0.25, 0.5]}}
    finished = {"status": "finished", "seconds": 90.0, "figures": figures}
    settings = {"learning_rate": 0.01, "hub_token": "hf_secret", "dataset_name": str(tmp_path / "clips")}
    records = {name: finished | {"settings": settings} for name in ("sft", "grpo", "prompt")}
    records["prompt"] = records["prompt"] | {"figures": {"updates": {"sft": 1, "grpo": 2}, "metrics": {}}}
    records["distill"] = {"status": "interrupted", "seconds": 30.0}
    (folder / "pipeline_state.json").write_text(json.dumps({"vidtrl": "0", "stages": records}))
    return folder


def test_a_pipeline(pipeline, capsys):
    assert main(["report", str(pipeline)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(pipeline / "report.html") and "distill has nothing to show yet" in err
    text, html = page_text(pipeline / "report.html"), (pipeline / "report.html").read_text()
    assert "Finished: SFT, GRPO, Prompt enhancement." in text and STATE_FILE == pipelines.STATE_FILE
    assert "GRPO 4 updates, eval_accuracy 0.25 → 0.5 90 s" in text and "Distillation interrupted 30 s" in text
    assert "Prompt enhancement SFT 1 update, GRPO 2 updates 90 s" in text
    for heading in ("Stage by stage", "GRPO: completions", "Enhanced prompts", "Learning curves"):
        assert f">{heading}</h2>" in html, heading
    for title in ("SFT: Loss", "GRPO: Reward", "Reward brightness"):
        assert f">{title}</figcaption>" in html, title
    # before, SFT, GRPO of both prompts, and the completions
    assert html.count("data:video/mp4;base64,") == 2 * 3 + 32
    assert "Enhanced (enhanced): A cat sits on a wall." in text and HOSTILE not in html
    assert "sft: learning_rate 0.01" in text and "sft: dataset_name .../clips" in text
    assert "hf_secret" not in html and str(pipeline.parent) not in html
    # one stage of it is a run of its own
    assert main(["report", str(pipeline / "grpo")]) == 0
    (pipeline / "pipeline_state.json").write_text("{")
    assert main(["report", str(pipeline)]) == 2 and "that can be read" in capsys.readouterr().err


@needs_chromium
@pytest.mark.parametrize("width", [375, 1440])
def test_a_pipeline_in_a_browser(pipeline, browser, width):
    page, _ = pipelines.write_pipeline_report(pipeline)
    browser.open(page.as_uri(), width)
    state = probe(browser)
    assert state["wide"] == 0 and state["width"] == width and state["total"] == 38
    columns = "[...document.querySelectorAll('.card')][0].querySelectorAll('figure')"
    names = browser.evaluate(f"[...{columns}].map((f) => f.dataset.column).join()")
    assert names == "before,SFT,GRPO" and shown(browser)[:2] == VALIDATION["validation_prompts"]
    browser.evaluate("document.querySelector('.cards').scrollIntoView()")
    browser.wait(lambda: len(times := probe(browser)["times"]) >= 1 and min(times) > 0)  # they play
    assert browser.errors == [] and not [u for u in browser.requests if not u.startswith(("data:", "file:", "blob:"))]
