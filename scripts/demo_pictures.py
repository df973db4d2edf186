"""The moving pictures of README.md: the same prompts and seeds through the stages of a finished `vidtrl demo`.

    vidtrl demo --output demo
    python scripts/demo_pictures.py demo docs

Writes `demo_stages.webp` (captions) and `demo_users.webp` (users' prompts). Which prompts are shown does not depend on how they
came out: they are spread evenly over the list that the demo measures.
"""

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vidtrl.data.video import read_video


SIDE, GAP, TEXT = 112, 6, 170  # pixels: of a clip, between clips, for the prompt
STAGES = {"base": "base", "sft": "SFT", "grpo": "SFT + GRPO", "distill": "distilled,\n4 evaluations"}
USERS = {"grpo": "as written", "enhancer": "enhanced", "distill": "enhanced,\ndistilled"}


def clips(folder: Path, files: list[str]) -> list[np.ndarray]:
    """Videos of a folder, (F, SIDE, SIDE, 3) in bytes."""
    videos = [read_video(folder / file).permute(0, 2, 3, 1).numpy() for file in files]
    return [np.stack([np.asarray(Image.fromarray(frame).resize((SIDE, SIDE))) for frame in v]) for v in videos]


def write_webp(
    target: Path, folder: Path, models: dict[str, str], rows: list[dict], texts: list[str], fps: int
) -> None:
    """A row for each of `rows` (its `file`), labelled with its text; a column for each model."""
    columns = [clips(folder / model, [row["file"] for row in rows]) for model in models]
    font, head = ImageFont.load_default(13), 44
    sheet = Image.new("RGB", (TEXT + len(models) * (SIDE + GAP), head + len(rows) * (SIDE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(models.values()):
        at = (TEXT + i * (SIDE + GAP) + SIDE // 2, head - 4)
        draw.multiline_text(at, label, "black", font, anchor="md", align="center")
    for j, text in enumerate(texts):
        lines = "\n".join("\n".join(textwrap.wrap(part, 25)) for part in text.split("\n"))
        draw.multiline_text((4, head + j * (SIDE + GAP) + SIDE // 2), lines, "black", font, anchor="lm")
    frames = []
    for number in range(len(columns[0][0])):
        frame = sheet.copy()
        for i, column in enumerate(columns):
            for j, clip in enumerate(column):
                frame.paste(Image.fromarray(clip[number]), (TEXT + i * (SIDE + GAP), head + j * (SIDE + GAP)))
        frames.append(frame)
    pauses = [round(1000 / fps)] * (len(frames) - 1) + [800]
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=pauses, loop=0, quality=70, method=6)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="output of vidtrl demo, with all stages")
    parser.add_argument("target", type=Path, help="folder for the pictures")
    parser.add_argument("--rows", type=int, default=5)
    args = parser.parse_args()
    fps = json.loads((args.demo / "demo.json").read_text())["settings"]["fps"]
    spread = lambda rows: [rows[(2 * i + 1) * len(rows) // (2 * args.rows)] for i in range(args.rows)]  # noqa: E731

    rows = spread(json.loads((args.demo / "jobs.json").read_text()))
    write_webp(args.target / "demo_stages.webp", args.demo / "videos", STAGES, rows, [r["prompt"] for r in rows], fps)

    users = args.demo / "users"
    rows = spread(json.loads((users / "jobs.json").read_text()))
    enhanced = {row["file"]: row["prompt"] for row in json.loads((users / "enhanced.json").read_text())}
    texts = [f"{row['prompt']}\n({enhanced[row['file']]})" for row in rows]
    write_webp(args.target / "demo_users.webp", users / "videos", USERS, rows, texts, fps)


if __name__ == "__main__":
    main()
