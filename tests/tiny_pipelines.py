"""Tiny random-weight diffusers pipelines, built offline in milliseconds: one function per supported family.

Each returns (pipe, call_kwargs): a stock pipeline and the size and arguments it can be called with.
"""

import string

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel


WORDS = (
    "a the cat dog robot red green blue square circle moves moving left right up down slowly fast video of in".split()
)
WAN_LIKE = dict(height=16, width=16, num_frames=9, max_sequence_length=16)


def tiny_tokenizer(max_length=64):
    vocab = dict.fromkeys(
        ["<pad>", "</s>", "<unk>", "<s>", *WORDS, *string.ascii_lowercase, *string.digits, *string.punctuation]
    )
    vocab = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )


def tiny_t5(d_model=32, cls=T5EncoderModel, config=T5Config):
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, d_model=d_model, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return cls(config(**sizes, relative_attention_num_buckets=8, pad_token_id=0, eos_token_id=1)).eval()


def tiny_umt5():
    return tiny_t5(cls=UMT5EncoderModel, config=UMT5Config)


def tiny_wan_vae(z_dim=16, **kwargs):
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **kwargs,
    ).eval()


def tiny_wan_transformer(channels=(16, 16), cls=WanTransformer3DModel, seed=0, **kwargs):
    torch.manual_seed(seed)
    return cls(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels[0],
        out_channels=channels[1],
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **kwargs,
    )


def wan():
    pipe = WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        vae=tiny_wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan_transformer(),
        transformer_2=None,
    )
    return pipe, WAN_LIKE
