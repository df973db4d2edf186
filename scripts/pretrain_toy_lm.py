"""Build the toy world's small language model from nothing, into src/vidtrl/toy/enhancer.

    python scripts/pretrain_toy_lm.py

A Llama of 0.8 M parameters and a tokenizer of whole words. Its pretraining text is what an encyclopaedia and a forum would
hold about the toy world, of all three tiers of words alike:

- definitions: "crimson is a kind of red", "east means right";
- prompts as users write them, and captions, each for itself and never one after the other;
- conversations about one attribute: a sentence, a question, an answer of one word.

So it has met every word, and knows what it means in the sense that a definition can be completed; no text shows that a
prompt should be answered with its caption. That is what fine-tuning on pairs teaches, and rewards refine.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vidtrl.prompts import PromptEnhancer, PromptTemplate
from vidtrl.toy import captions
from vidtrl.toy.paraphrases import CLUTTER, SENTENCES, SYNONYMS, TIERS, VERBS, enhancer_path, paraphrases


DEFINITIONS = {
    "color": ("{word} is a kind of {value}", "a {word} thing is {value}", "if it is {word} , it is {value}"),
    "shape": ("{word} is a kind of {value}", "a {word} looks like a {value}", "draw a {value} for a {word}"),
    "direction": ("{word} means {value}", "going {word} is moving {value}", "what heads {word} is moving {value}"),
}
QUESTIONS = {"color": "what color ? {}", "shape": "what shape ? {}", "direction": "which way ? {}"}
# what a batch is drawn from, first and then: conversations teach little before the words are known
SHARES = (
    {"definition": 0.5, "prompt": 0.25, "caption": 0.15, "conversation": 0.1},
    {"definition": 0.2, "prompt": 0.15, "caption": 0.1, "conversation": 0.55},
)


def build_tokenizer():
    """Whole words; a word that is not in the toy world is `<unk>`."""
    texts = [*captions(), *CLUTTER, *VERBS, *QUESTIONS.values(), "=>"]
    texts += [s for group in (*SENTENCES.values(), *DEFINITIONS.values()) for s in group]
    texts += [w for values in SYNONYMS.values() for v, words in values.items() for w in (v, *words)]
    words = {w for text in texts for w in text.split() if not w.startswith("{")} | {"4k"}
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left",
        model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def text(rng, shares):
    kind = rng.choices(list(shares), list(shares.values()))[0]
    if kind == "caption":
        return rng.choice(captions())
    if kind == "definition":
        attribute = rng.choice(list(SYNONYMS))
        value = rng.choice(list(SYNONYMS[attribute]))
        word = rng.choice(SYNONYMS[attribute][value])
        return rng.choice(DEFINITIONS[attribute]).format(word=word, value=value)
    row = paraphrases(1, rng.choice(TIERS), seed=rng.randrange(10**9))[0]
    if kind == "prompt":
        return row["prompt"]
    attribute = rng.choice(list(QUESTIONS))
    value = next(w for w in row["caption"].split() if w in SYNONYMS[attribute])
    return f"{row['prompt']} . {QUESTIONS[attribute].format(value)}"


def build_model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} words", flush=True)
    return model


def train(model, tokenizer, steps, shares, batch_size, lr, seed):
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        batch = [text(rng, shares) + tokenizer.eos_token for _ in range(batch_size)]
        tokens = tokenizer(batch, padding=True, padding_side="right", return_tensors="pt")
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        loss = model(**tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            known = " ".join(f"{k} {v:.2f}" for k, v in answers(model, tokenizer).items())
            print(f"step {step + 1}/{steps} loss {loss:.3f} {time.time() - start:.0f} s; answers: {known}", flush=True)


@torch.no_grad()
def answers(model, tokenizer):
    """Share of right answers to questions about held-out paraphrases."""
    rows, shares = paraphrases(100, "held_out", seed=5), {}
    model.eval()
    for attribute, question in QUESTIONS.items():
        texts = [f"{row['prompt']} . {question.format('').strip()}" for row in rows]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        best = model(**tokens).logits[:, -1].argmax(-1).tolist()
        right = [tokenizer.decode([i]) in row["caption"].split() for i, row in zip(best, rows, strict=True)]
        shares[attribute] = sum(right) / len(right)
    model.train()
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(enhancer_path()))
    parser.add_argument("--steps", type=int, nargs=2, default=[1500, 300], help="of the first and the second mixture")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, nargs=2, default=[2e-3, 1e-3])
    parser.add_argument("--resume", type=Path, help="folder with a model to go on from, for another --steps 0 N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = (
        LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32) if args.resume else build_model(tokenizer)
    )
    for phase, shares in enumerate(SHARES):
        steps, lr = args.steps[phase], args.learning_rate[phase]
        train(model, tokenizer, steps, shares, args.batch_size, lr, args.seed + phase)
    enhancer = PromptEnhancer(
        model.bfloat16(), tokenizer, template=PromptTemplate(system="", turn="{prompt} =>", max_words=12),
        max_new_tokens=12, temperature=0.0, num_retries=0, batch_size=64,
    )  # fmt: skip
    model.config.max_position_embeddings = 256
    enhancer.save_pretrained(args.output)
