r"""A vision-language model as a judge, behind a reward server.

The model looks at a few frames of each video and answers with a score from 1 to 5. Any image-text-to-text model of transformers
works that takes several images, such as Qwen/Qwen3-VL-2B-Instruct (Qwen's processors need `pip install torchvision`). Where the
judge runs:

    vidtrl reward-server --reward examples/grpo_multi_reward_vlm/remote_vlm_judge.py:get_judge \
        --kwargs '{"model_id": "Qwen/Qwen3-VL-2B-Instruct"}' --batch_size 8 --port 8000

Where the video model is trained:

    vidtrl grpo --config examples/grpo_flash_wan/config.yaml --reward_funcs http://judge-host:8000 motion-magnitude

On another machine than the trainer, give both the same secret in VIDTRL_REWARD_TOKEN and the server `--host 0.0.0.0`. One server
uses one GPU; for more, start one on each (CUDA_VISIBLE_DEVICES) and list them: `http://a:8000,http://a:8001`.

A score that the model states in words is coarse: most answers are 3 or 4. The reward is therefore the mean of the scores
weighted with the probabilities of the first digit, as in G-Eval (https://huggingface.co/papers/2303.16634), unless
`expected=False`, which generates an answer and reads the number.
"""

import re

import torch


PROMPT = (
    "These are {num_frames} frames of a video, in order. Somebody asked for this video: {prompt!r}\n"
    "How well does the video show what was asked for, with natural motion and without artefacts? "
    "Answer with one digit from 1 (not at all) to 5 (perfectly), and nothing else."
)
SCORE = re.compile(r"(?<![\d.,])([1-5](?:\.\d+)?)(?:\s*(?:/|out of)\s*5)?(?![.,]?\d)")


def parse_score(answer: str) -> float | None:
    """The last score from 1 to 5 in an answer; `None` if there is none."""
    found = [float(number) for number in SCORE.findall(answer)]
    return found[-1] if found and found[-1] <= 5 else None


def pick_frames(video: torch.Tensor, num_frames: int) -> list:
    """Frames of a video (F, C, H, W) in [0, 1], evenly spaced from the first to the last, as PIL images."""
    from PIL import Image

    index = torch.linspace(0, len(video) - 1, min(num_frames, len(video))).round().long()
    frames = (video[index.to(video.device)] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(frame) for frame in frames]


def messages(prompt: str, frames: list, template: str = PROMPT) -> list[dict]:
    """The conversation that asks for one video's score."""
    text = template.format(prompt=prompt, num_frames=len(frames))
    images = [{"type": "image", "image": frame} for frame in frames]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def expected_score(logits: torch.Tensor, digits: list[int]) -> torch.Tensor:
    """The mean of 1..5 under the next token's probabilities: logits (B, V) and the five digits' tokens -> (B,)."""
    share = logits[:, digits].float().softmax(-1)
    return share @ torch.arange(1.0, 6.0, device=share.device)


def get_judge(
    model_id: str,
    num_frames: int = 8,
    batch_size: int = 4,
    expected: bool = True,
    template: str = PROMPT,
    max_new_tokens: int = 64,
    device: str | None = None,
):
    """
    A reward function that asks a vision-language model.

    Args:
        model_id (`str`): Id on the Hub or folder of an image-text-to-text model with a chat template.
        num_frames (`int`): Frames that it sees of each video.
        batch_size (`int`): Videos in one forward pass.
        expected (`bool`): Mean score under the probabilities of the digits 1 to 5, in one forward pass. Otherwise an answer is
            generated and its last number taken; a video whose answer has none gets `None`.
        template (`str`): The question, with the fields `{prompt}` and `{num_frames}`.
        max_new_tokens (`int`): Length of a generated answer.
        device (`str`, *optional*): Default: the GPU if there is one.

    Returns:
        `Callable`: Scores from 0 (worst) to 1 (best).
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(model_id, padding_side="left")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=dtype).to(device).eval()
    digits = [processor.tokenizer.encode(str(score), add_special_tokens=False)[-1] for score in range(1, 6)]

    @torch.inference_mode()
    def judge(prompts, videos, log_metric=None, log_extra=None, **kwargs):
        scores, answers = [], []
        for start in range(0, len(videos), batch_size):
            part = slice(start, start + batch_size)
            asked = [
                messages(prompt, pick_frames(video, num_frames), template)
                for prompt, video in zip(prompts[part], videos[part], strict=True)
            ]
            inputs = processor.apply_chat_template(
                asked,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(device, dtype)
            if expected:
                scores += expected_score(model(**inputs, logits_to_keep=1).logits[:, -1], digits).tolist()
            else:
                output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
                texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                answers += texts
                scores += map(parse_score, texts)
        if answers and log_extra is not None:
            log_extra("answer", answers)
        if log_metric is not None:
            log_metric("judge/unreadable", sum(score is None for score in scores) / len(scores))
        return [None if score is None else (score - 1) / 4 for score in scores]

    return judge
