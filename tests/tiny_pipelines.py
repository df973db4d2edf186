"""Tiny random-weight diffusers pipelines, built offline in milliseconds: one function per supported family.

Each returns (pipe, call_kwargs): a stock pipeline and the size and arguments it can be called with.
"""

import string

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


WORDS = (
    "a the cat dog robot red green blue square circle moves moving left right up down slowly fast video of in".split()
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %} {% endfor %}"
)
WAN_LIKE = dict(height=16, width=16, num_frames=9, max_sequence_length=16)


def alive(transformer):
    """Zero-initialised gates and output layers would hide everything behind them; give them values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return transformer


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
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_t5(d_model=32, cls=T5EncoderModel, config=T5Config):
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, d_model=d_model, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return cls(config(**sizes, relative_attention_num_buckets=8, pad_token_id=0, eos_token_id=1)).eval()


def tiny_umt5():
    return tiny_t5(cls=UMT5EncoderModel, config=UMT5Config)


def tiny_wan_vae(z_dim=16, **kwargs):
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **kwargs,
    ).eval()


def tiny_wan_transformer(channels=(16, 16), cls=diffusers.WanTransformer3DModel, seed=0, **kwargs):
    torch.manual_seed(seed)
    transformer = cls(
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
    return alive(transformer)


def tiny_llama(hidden_size):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=hidden_size, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=256
    )
    return LlamaModel(LlamaConfig(**sizes, bos_token_id=3, eos_token_id=1, pad_token_id=0)).eval()


def tiny_clip_text(hidden_size):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=hidden_size, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=256
    )
    return CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=3, eos_token_id=1, pad_token_id=0)).eval()


def tiny_hunyuan_vae(latent_channels, **kwargs):
    torch.manual_seed(0)
    return diffusers.AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        **kwargs,
    ).eval()


def flow_unipc(shift):
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def wan():
    pipe = diffusers.WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        vae=tiny_wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan_transformer(),
        transformer_2=None,
    )
    return pipe, WAN_LIKE


def wan22():
    """Two experts, integer timesteps."""
    pipe = diffusers.WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        vae=tiny_wan_vae(),
        scheduler=flow_unipc(3.0),
        transformer=tiny_wan_transformer(),
        transformer_2=tiny_wan_transformer(seed=1),
        boundary_ratio=0.875,
    )
    return pipe, WAN_LIKE


def wan22_ti2v():
    """One timestep per token."""
    vae = tiny_wan_vae(
        z_dim=48,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        latents_mean=[0.1] * 48,
        latents_std=[0.9] * 48,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    pipe = diffusers.WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        vae=vae,
        scheduler=flow_unipc(5.0),
        transformer=tiny_wan_transformer((48, 48)),
        transformer_2=None,
        expand_timesteps=True,
    )
    return pipe, dict(WAN_LIKE, height=32, width=32)


def wan22_ti2v_i2v():
    """One timestep per token, zero on the given first frame."""
    parts = wan22_ti2v()[0].components
    parts = {k: parts[k] for k in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer", "transformer_2")}
    pipe = diffusers.WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, expand_timesteps=True)
    return pipe, dict(WAN_LIKE, height=32, width=32, image=tiny_image(32))


def wan_i2v():
    """The image condition comes as extra input channels."""
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        vae=tiny_wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan_transformer((36, 16)),
        image_encoder=None,
        image_processor=None,
        transformer_2=None,
    )
    return pipe, dict(WAN_LIKE, image=tiny_image(16))


def wan21_i2v():
    """The released 2.1: the image is also an embedding that the denoiser attends to."""
    parts = wan_i2v()[0].components
    transformer = tiny_wan_transformer((36, 16), image_dim=32)
    parts |= dict(image_encoder=tiny_clip_vision(), image_processor=CLIPImageProcessor(crop_size=32, size=32))
    pipe = diffusers.WanImageToVideoPipeline(**{**parts, "transformer": transformer})
    return pipe, dict(WAN_LIKE, image=tiny_image(16))


def tiny_clip_vision():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, projection_dim=32, num_hidden_layers=2, num_attention_heads=4, image_size=32)
    return CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=37, patch_size=16)).eval()


def tiny_image(size):
    array = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(array.numpy())


def skyreels():
    pipe = diffusers.SkyReelsV2Pipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        vae=tiny_wan_vae(),
        scheduler=flow_unipc(8.0),
        transformer=tiny_wan_transformer(cls=diffusers.SkyReelsV2Transformer3DModel),
    )
    return pipe, WAN_LIKE


def skyreels_i2v():
    pipe = diffusers.SkyReelsV2ImageToVideoPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        image_encoder=tiny_clip_vision(),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
        vae=tiny_wan_vae(),
        scheduler=flow_unipc(5.0),
        transformer=tiny_wan_transformer((36, 16), cls=diffusers.SkyReelsV2Transformer3DModel, image_dim=32),
    )
    return pipe, dict(WAN_LIKE, image=tiny_image(16))


def _ltx_parts():
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    vae.latents_mean.fill_(0.1)
    vae.latents_std.fill_(0.8)
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    parts = dict(vae=vae, text_encoder=tiny_t5(), tokenizer=tiny_tokenizer(128), transformer=alive(transformer))
    return dict(parts, scheduler=scheduler), dict(WAN_LIKE, height=32, width=32)


def ltx():
    parts, call = _ltx_parts()
    return diffusers.LTXPipeline(**parts), call


def ltx_i2v():
    parts, call = _ltx_parts()
    return diffusers.LTXImageToVideoPipeline(**parts), dict(call, image=tiny_image(32))


def _cogvideox_parts(in_channels=4, **kwargs):
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=kwargs.pop("attention_head_dim", 8),
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        **kwargs,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    scheduler = dict(  # the released configuration
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )
    parts = dict(tokenizer=tiny_tokenizer(), text_encoder=tiny_t5(), vae=vae, transformer=alive(transformer))
    return parts, scheduler


def cogvideox():
    parts, scheduler = _cogvideox_parts()
    scheduler = diffusers.CogVideoXDDIMScheduler(**scheduler, clip_sample=False)
    return diffusers.CogVideoXPipeline(**parts, scheduler=scheduler), WAN_LIKE


def cogvideox15():
    """A temporal patch, rotary embeddings, and the DPM scheduler with its own step signature."""
    parts, scheduler = _cogvideox_parts(
        attention_head_dim=16, patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True
    )
    pipe = diffusers.CogVideoXPipeline(**parts, scheduler=diffusers.CogVideoXDPMScheduler(**scheduler))
    return pipe, dict(WAN_LIKE, num_frames=13)


def cogvideox_i2v():
    parts, scheduler = _cogvideox_parts(in_channels=8)
    pipe = diffusers.CogVideoXImageToVideoPipeline(**parts, scheduler=diffusers.CogVideoXDPMScheduler(**scheduler))
    return pipe, dict(WAN_LIKE, image=tiny_image(16))


def cogvideox15_i2v():
    """A temporal patch, rotary embeddings, and the frame offset embedding."""
    parts, scheduler = _cogvideox_parts(
        in_channels=8,
        attention_head_dim=16,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
        ofs_embed_dim=2,
    )
    pipe = diffusers.CogVideoXImageToVideoPipeline(**parts, scheduler=diffusers.CogVideoXDPMScheduler(**scheduler))
    return pipe, dict(WAN_LIKE, num_frames=13, image=tiny_image(16))


def _hunyuan_transformer(in_channels=4, guidance_embeds=True, **kwargs):
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=guidance_embeds,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        **kwargs,
    )
    return alive(transformer)


def hunyuan():
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=tiny_llama(16),
        tokenizer=tiny_tokenizer(256),
        transformer=_hunyuan_transformer(),
        vae=tiny_hunyuan_vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=tiny_clip_text(8),
        tokenizer_2=tiny_tokenizer(77),
    )
    return pipe, dict(WAN_LIKE, prompt_template={"template": "{}", "crop_start": 0})


def _hunyuan_i2v(**transformer):
    """The text encoder looks at the image; its template is the released one, but short: 4 image tokens instead of 576."""
    tokenizer = tiny_tokenizer(256)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end_header_id|>", "<image>"]})
    torch.manual_seed(0)
    sizes = dict(intermediate_size=37, num_attention_heads=4, num_hidden_layers=3)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, projection_dim=16, image_size=32, patch_size=16, **sizes),
        text_config=LlamaConfig(
            hidden_size=16, vocab_size=256, bos_token_id=3, eos_token_id=1, pad_token_id=0, **sizes
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        pad_token_id=0,
    )
    pipe = diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=_hunyuan_transformer(**transformer),
        vae=tiny_hunyuan_vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=tiny_clip_text(8),
        tokenizer_2=tiny_tokenizer(77),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
    )
    template = "<|end_header_id|> <image> a video of <|end_header_id|> {} <|end_header_id|>"
    places = dict(crop_start=6, image_emb_start=1, image_emb_end=5, image_emb_len=4)
    return pipe, dict(WAN_LIKE, prompt_template={"template": template, **places}, image=tiny_image(16))


def hunyuan_i2v():
    """The first latent frame is the image, and the denoiser knows; as released, guidance is an input of it."""
    return _hunyuan_i2v(image_condition_type="token_replace", guidance_embeds=True)


def hunyuan_i2v_concat():
    """The image comes as extra input channels, and the pipeline drops the first four frames it decodes."""
    return _hunyuan_i2v(image_condition_type="latent_concat", in_channels=9, guidance_embeds=False)


def hunyuan15():
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    qwen = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=256,
            rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            rope_theta=1e6,
            pad_token_id=0,
            bos_token_id=3,
            eos_token_id=1,
        )
    ).eval()
    glyph = T5EncoderModel(T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)).eval()
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=qwen,
        tokenizer=tiny_tokenizer(1200),
        transformer=alive(transformer),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=glyph,
        tokenizer_2=ByT5Tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )
    pipe.tokenizer_max_length, pipe.prompt_template_encode_start_idx = 48, 80  # 1000 and 108 when released
    pipe.vision_num_semantic_tokens, pipe.tokenizer_2_max_length = 8, 24  # 729 and 256
    return pipe, dict(height=16, width=16, num_frames=9)


def mochi():
    torch.manual_seed(0)
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    transformer.pos_frequencies.data.normal_(std=0.1)  # uninitialised memory otherwise
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    ).eval()
    pipe = diffusers.MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=tiny_t5(),
        tokenizer=tiny_tokenizer(),
        transformer=alive(transformer),
    )
    return pipe, dict(WAN_LIKE, num_frames=7)


def _sana_parts():
    torch.manual_seed(0)
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        mlp_ratio=2.5,
        sample_size=8,
        patch_size=(1, 2, 2),
        norm_elementwise_affine=False,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    tokenizer, text_encoder = tiny_tokenizer(1200), tiny_t5(8)
    return dict(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_wan_vae(),
        transformer=alive(transformer),
        scheduler=scheduler,
    ), dict(WAN_LIKE, height=32, width=32)


def sana():
    parts, call = _sana_parts()
    return diffusers.SanaVideoPipeline(**parts), call


def sana_i2v():
    """One timestep per token, zero on the given first frame, as a (B, 1, f, h, w) tensor."""
    parts, call = _sana_parts()
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=8.0)
    return diffusers.SanaImageToVideoPipeline(**parts), dict(call, image=tiny_image(32))


def kandinsky5():
    torch.manual_seed(0)
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=16,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(1, 1, 2),
        visual_cond=True,
        attention_type="regular",
    )
    pipe = diffusers.Kandinsky5T2VPipeline(
        vae=tiny_hunyuan_vae(16, mid_block_add_attention=False),
        text_encoder=tiny_llama(32),
        tokenizer=tiny_tokenizer(256),
        text_encoder_2=tiny_clip_text(16),
        tokenizer_2=tiny_tokenizer(77),
        transformer=alive(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "{}", 0  # the real template has 128 tokens
    return pipe, dict(WAN_LIKE, height=32, width=32, num_frames=5)


def anyflow():
    torch.manual_seed(0)
    transformer = diffusers.AnyFlowTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    pipe = diffusers.AnyFlowPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        vae=tiny_wan_vae(),
        transformer=alive(transformer),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    )
    return pipe, WAN_LIKE


def allegro():
    torch.manual_seed(0)
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    pipe = diffusers.AllegroPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_t5(24),
        vae=vae,
        transformer=alive(transformer),
        scheduler=diffusers.DDIMScheduler(),
    )
    return pipe, dict(WAN_LIKE, num_frames=8)


def easyanimate():
    torch.manual_seed(0)
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    ).eval()
    pipe = diffusers.EasyAnimatePipeline(
        vae=vae,
        text_encoder=tiny_llama(16),
        tokenizer=tiny_tokenizer(256),
        transformer=alive(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    return pipe, dict(height=16, width=16, num_frames=5)


def motif():
    torch.manual_seed(0)
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    )
    pipe = diffusers.MotifVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_wan_vae(),
        text_encoder=tiny_t5(),
        tokenizer=tiny_tokenizer(),
        transformer=alive(transformer),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )
    return pipe, WAN_LIKE


ALL = {
    "wan": wan,
    "wan22": wan22,
    "wan22_ti2v": wan22_ti2v,
    "wan22_ti2v_i2v": wan22_ti2v_i2v,
    "wan_i2v": wan_i2v,
    "wan21_i2v": wan21_i2v,
    "skyreels": skyreels,
    "skyreels_i2v": skyreels_i2v,
    "ltx": ltx,
    "ltx_i2v": ltx_i2v,
    "hunyuan": hunyuan,
    "hunyuan_i2v": hunyuan_i2v,
    "hunyuan_i2v_concat": hunyuan_i2v_concat,
    "hunyuan15": hunyuan15,
    "cogvideox": cogvideox,
    "cogvideox15": cogvideox15,
    "cogvideox_i2v": cogvideox_i2v,
    "cogvideox15_i2v": cogvideox15_i2v,
    "mochi": mochi,
    "sana": sana,
    "sana_i2v": sana_i2v,
    "kandinsky5": kandinsky5,
    "anyflow": anyflow,
    "allegro": allegro,
    "easyanimate": easyanimate,
    "motif": motif,
}
