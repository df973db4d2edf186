"""The four stages one after the other in one job, such as a scheduler's on several machines: the Python side of config.yaml.

    accelerate launch train.py --config config.yaml          again after an interruption: goes on where it stopped

`vidtrl run --config config.yaml` does the same with a process for each stage, and beside that keeps a state, refuses settings that
changed in between, and writes a program that uses the results. Here a stage is finished when its result is there; `launch` in the
file is not read, and the processes of this job train all stages.
"""

import argparse
import gc
from importlib import import_module

import torch
from accelerate import PartialState

from vidtrl.cli.run_plan import parse_stage, read_pipeline
from vidtrl.cli.run_prompts import enhance_prompts
from vidtrl.cli.run_stage import write_config
from vidtrl.cli.run_state import output_files


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    pipeline = read_pipeline(parser.parse_args().config)
    for stage in pipeline.stages:
        parse_stage(stage)  # a mistake in the last stage shows before the first one trains

    processes = PartialState()
    for stage in pipeline.stages:
        if output_files(stage):
            processes.print(f"{stage.name}: done before")
            continue
        if processes.is_main_process:
            write_config(stage)  # the stage's own section, `shared`, and the adapters of the stages before it
            if stage.enhance:  # the student learns on what the enhancer of the prompt stage makes of the prompts
                enhance_prompts(str(pipeline.output_dir / "prompt"), stage.folder / "prompts", stage.enhance)
        processes.wait_for_everyone()

        # what each rank of `vidtrl sft`, `grpo`, `prompt` or `distill` runs; the train.py of the other recipes write it out
        import_module(stage.module).train(["--config", str(stage.config_file)])
        processes.wait_for_everyone()
        processes.print(f"processes: {processes.num_processes}, done: {stage.name}")
        gc.collect()  # the models of a stage leave the device before the next one loads its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
