"""What really differs between video model families, one row of data each.

The stock pipeline prepares the conditioning (capture.py); a row only says how its denoiser's numbers relate to the
canonical ones: layout, sign, prediction type, timestep, sigma grid, frame rule. `check_model` proves a row on a
checkpoint. To add a family, add a row and a tiny pipeline in tests/tiny_pipelines.py (docs/models.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        name: the family's name.
        pipelines: diffusers pipeline classes it covers.
        layout: the denoiser's latents: "BCFHW", "BFCHW", "BFHWC", or "packed" (B, tokens, C * patch).
        prediction: "flow" (velocity), "v_prediction" or "epsilon" (VP schedules).
        sign: what multiplies the denoiser's output to give noise - x0; -1 where the model predicts x0 - noise.
        timestep: "noise" (1000 sigma) or "clean" (1000 (1 - sigma)).
        grid: what the pipeline passes to `scheduler.set_timesteps`: "default" (only the number of steps), "uniform"
            (sigmas 1 ... 1/N) or "linear_quadratic" (Mochi).
        mu: the dynamic shift the pipeline passes along: None, "sequence" (from the number of latent tokens) or a number.
        normalize: whether latents are shifted and scaled by the VAE's statistics.
        pixel_range: what the VAE takes.
        per_sample_sigma: whether one batch may mix noise levels.
        frame_sigma: how the denoiser takes one noise level per latent frame: "" (it does not), as a timestep per "token" or
            per "frame".
        frame_call: denoiser arguments that go with one noise level per frame.
        factors: pipeline attributes with the VAE's temporal and spatial compression.
        frame_offset: valid frame counts are frame_offset + k * temporal factor.
        pixel_multiple: height and width must divide by this, besides VAE factor times patch.
        sparse_block: side, in tokens, of a block of its sparse attention ("nabla"); sizes must be whole blocks then.
        frames_argument: the pipeline's name for the number of frames.
        fps_argument: the pipeline's name for the frame rate; "" when the model knows no frame rate.
        denoiser_config: values of the denoiser's configuration that this row is for, where one pipeline class has several.
        image: whether the pipeline needs an `image`.
        fixed_frames: latent frames at the start that are the image's and not generated, where the timestep does not tell
            (it does if it is 0 for their tokens).
        dropped_frames: decoded frames at the start that the pipeline leaves out.
        guidance: the pipeline argument of classifier-free guidance; "guider" when it is a component.
        call: further pipeline arguments for capture.
        negative_call: pipeline arguments that make it encode a prompt the way it encodes negative ones.
        negative_branch: negative prompts are encoded as in no other call: what the second branch of guidance gets.
        tie_to_timestep: denoiser arguments that must follow the timestep.
        unbatched: tensor arguments without a batch dimension that belong to a clip (they follow its text length).
        decoded_layout: what `vae.decode` returns, "BCFHW" or "BFCHW".
        vae_batch: clips per VAE call; 0 for no limit.
        vae_tiling: the VAE works only with tiling enabled.
    """

    name: str
    pipelines: tuple[str, ...]
    layout: str = "BCFHW"
    prediction: str = "flow"
    sign: int = 1
    timestep: str = "noise"
    grid: str = "default"
    mu: str | float | None = None
    normalize: bool = True
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    per_sample_sigma: bool = True
    frame_sigma: str = ""
    frame_call: dict[str, Any] = field(default_factory=dict)
    factors: tuple[str, str] = ("vae_scale_factor_temporal", "vae_scale_factor_spatial")
    frame_offset: int = 1
    pixel_multiple: int = 1
    sparse_block: int = 1
    frames_argument: str = "num_frames"
    fps_argument: str = ""
    denoiser_config: dict[str, Any] = field(default_factory=dict)
    image: bool = False
    fixed_frames: int = 0
    dropped_frames: int = 0
    guidance: str = "guidance_scale"
    call: dict[str, Any] = field(default_factory=dict)
    negative_call: dict[str, Any] = field(default_factory=dict)
    negative_branch: bool = False
    tie_to_timestep: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
    decoded_layout: str = "BCFHW"
    vae_batch: int = 0
    vae_tiling: bool = False


FAMILIES: tuple[Family, ...] = (
    Family("wan", ("WanPipeline",), pixel_multiple=16, frame_sigma="token"),
    Family("wan-i2v", ("WanImageToVideoPipeline",), pixel_multiple=16, image=True),
    Family(
        "skyreels-v2",
        ("SkyReelsV2Pipeline",),
        pixel_multiple=16,
        frame_sigma="frame",
        frame_call={"enable_diffusion_forcing": True},
    ),
    Family("skyreels-v2-i2v", ("SkyReelsV2ImageToVideoPipeline",), pixel_multiple=16, image=True),
    Family(
        "ltx",
        ("LTXPipeline",),
        layout="packed",
        frame_sigma="token",
        grid="uniform",
        mu="sequence",
        factors=("vae_temporal_compression_ratio", "vae_spatial_compression_ratio"),
        pixel_multiple=32,
        fps_argument="frame_rate",
    ),
    Family(
        "ltx-i2v",
        ("LTXImageToVideoPipeline",),
        layout="packed",
        grid="uniform",
        mu="sequence",
        factors=("vae_temporal_compression_ratio", "vae_spatial_compression_ratio"),
        pixel_multiple=32,
        fps_argument="frame_rate",
        image=True,
    ),
    Family("hunyuan-video", ("HunyuanVideoPipeline",), grid="uniform", pixel_multiple=16, guidance="true_cfg_scale"),
    Family(
        "hunyuan-video-i2v-concat",
        ("HunyuanVideoImageToVideoPipeline",),
        denoiser_config={"image_condition_type": "latent_concat"},
        grid="uniform",
        pixel_multiple=16,
        image=True,
        dropped_frames=4,
        guidance="true_cfg_scale",
        negative_branch=True,
    ),
    Family(
        "hunyuan-video-i2v",
        ("HunyuanVideoImageToVideoPipeline",),
        denoiser_config={"image_condition_type": "token_replace"},
        grid="uniform",
        pixel_multiple=16,
        image=True,
        fixed_frames=1,
        guidance="true_cfg_scale",
        negative_branch=True,
    ),
    Family("hunyuan-video-1.5", ("HunyuanVideo15Pipeline",), grid="uniform", guidance="guider", vae_batch=1),
    Family("cogvideox", ("CogVideoXPipeline",), layout="BFCHW", prediction="v_prediction"),
    Family("cogvideox-i2v", ("CogVideoXImageToVideoPipeline",), layout="BFCHW", prediction="v_prediction", image=True),
    Family(
        "mochi",
        ("MochiPipeline",),
        sign=-1,
        timestep="clean",
        grid="linear_quadratic",
        factors=("vae_temporal_scale_factor", "vae_spatial_scale_factor"),
    ),
    Family(
        "sana-video",
        ("SanaVideoPipeline",),
        pixel_multiple=32,
        frames_argument="frames",
        call={"use_resolution_binning": False},
        negative_call={"complex_human_instruction": None},
    ),
    Family(
        "sana-video-i2v",
        ("SanaImageToVideoPipeline",),
        pixel_multiple=32,
        frames_argument="frames",
        image=True,
        call={"use_resolution_binning": False},
        negative_call={"complex_human_instruction": None},
    ),
    Family(
        "kandinsky5",
        ("Kandinsky5T2VPipeline",),
        layout="BFHWC",
        pixel_multiple=16,
        sparse_block=8,
        unbatched=("text_rope_pos",),
    ),
    Family(
        "anyflow",
        ("AnyFlowPipeline",),
        layout="BFCHW",
        pixel_multiple=16,
        call={"use_mean_velocity": False},
        tie_to_timestep=("r_timestep",),
    ),
    Family(
        "allegro",
        ("AllegroPipeline",),
        prediction="epsilon",
        frame_offset=0,
        call={"clean_caption": False},
        decoded_layout="BFCHW",
        vae_tiling=True,
    ),
    Family(
        "easyanimate",
        ("EasyAnimatePipeline",),
        mu=1.0,
        factors=("vae_temporal_compression_ratio", "vae_spatial_compression_ratio"),
        pixel_multiple=16,
    ),
    Family("motif-video", ("MotifVideoPipeline",), grid="uniform", mu="sequence", guidance="guider"),
)

_AUDIO = "its denoiser generates audio together with video; vidtrl trains video latents only."
_CHUNKS = (
    "it generates chunk after chunk with history latents and its own loop, so one captured call does not describe it."
)
_EDIT = "it edits a source video or image; use the family's text-to-video or image-to-video pipeline for training."
_EDM = "its EDM preconditioning (c_in, c_skip, sigma_data) is not a flow or VP model in the sense of this table."
_UNET = "it is a U-Net of the Stable Diffusion generation without a video transformer."
_NO_ROW = "no row has been verified for it yet; docs/models.md says how to add one."
_UPSAMPLER = "it enlarges latents in one pass; there is no noise to train on."
_MODULAR = "vidtrl captures classic pipelines only"

UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        (
            "LTX2Pipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2ConditionPipeline",
            "LTX2InContextPipeline",
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
            "LTX2HDRPipeline",
            "Kandinsky6TI2VAPipeline",
            "Cosmos3OmniPipeline",
        ),
        _AUDIO,
    ),
    **dict.fromkeys(
        ("HeliosPipeline", "HeliosPyramidPipeline", "HunyuanVideoFramepackPipeline", "SanaWMPipeline"), _CHUNKS
    ),
    **dict.fromkeys(
        (
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
            "LTXI2VLongMultiPromptPipeline",
            "AnyFlowFARPipeline",
            "WanAnimatePipeline",
        ),
        _CHUNKS,
    ),
    **dict.fromkeys(
        (
            "WanVideoToVideoPipeline",
            "WanVACEPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
            "EasyAnimateControlPipeline",
            "EasyAnimateInpaintPipeline",
            "ChronoEditPipeline",
            "LucyEditPipeline",
            "Kandinsky6SRPipeline",
        ),
        _EDIT,
    ),
    **dict.fromkeys(("LTXLatentUpsamplePipeline", "LTX2LatentUpsamplePipeline"), _UPSAMPLER),
    "LTX2VideoDiffusionDecodePipeline": "it decodes latents: its diffusion model is the decoder, which knows no text.",
    **dict.fromkeys(("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline", "Cosmos2VideoToWorldPipeline"), _EDM),
    **dict.fromkeys(
        (
            "AnimateDiffPipeline",
            "AnimateDiffSDXLPipeline",
            "AnimateDiffControlNetPipeline",
            "AnimateDiffPAGPipeline",
            "AnimateDiffSparseControlNetPipeline",
            "AnimateDiffVideoToVideoPipeline",
            "AnimateDiffVideoToVideoControlNetPipeline",
            "I2VGenXLPipeline",
            "PIAPipeline",
            "StableVideoDiffusionPipeline",
            "TextToVideoSDPipeline",
            "TextToVideoZeroPipeline",
            "TextToVideoZeroSDXLPipeline",
            "VideoToVideoSDPipeline",
        ),
        _UNET,
    ),
    "Cosmos2TextToImagePipeline": "it generates single images; and " + _EDM,
    "Kandinsky5I2VPipeline": "it rescales the first frame after sampling, so what it decodes is not what was denoised.",
    "HunyuanVideo15ImageToVideoPipeline": "it takes its size from the image instead of height and width.",
    "LTXConditionPipeline": "its conditions add tokens to the sequence; LTXImageToVideoPipeline trains the same weights.",
    "LattePipeline": "it has an image VAE that is called frame by frame and a learned-variance head.",
    "Cosmos2_5_PredictBasePipeline": "it runs only with its separate safety checker; " + _NO_ROW,
    "Cosmos2_5_TransferPipeline": "it runs only with its separate safety checker; " + _NO_ROW,
    "ConsisIDPipeline": "it needs embeddings of a face, which its call does not compute; " + _NO_ROW,
    **dict.fromkeys(("HunyuanSkyreelsImageToVideoPipeline", "MotifVideoImage2VideoPipeline"), _NO_ROW),
    **dict.fromkeys(
        (
            "WanModularPipeline",
            "WanImage2VideoModularPipeline",
            "Wan22ModularPipeline",
            "Wan22Image2VideoModularPipeline",
            "LTXModularPipeline",
            "HunyuanVideo15ModularPipeline",
        ),
        _MODULAR + "; load the classic pipeline of this model.",
    ),
    **dict.fromkeys(
        ("HeliosModularPipeline", "HeliosPyramidModularPipeline", "HeliosPyramidDistilledModularPipeline"),
        _MODULAR + ", and this one generates chunk after chunk.",
    ),
    **dict.fromkeys(
        (
            "LTX2ModularPipeline",
            "LTX25ModularPipeline",
            "MiniMaxH3ModularPipeline",
            "EchoModularPipeline",
            "Cosmos3OmniModularPipeline",
            "Cosmos3DistilledModularPipeline",
        ),
        _MODULAR + ", and this one generates audio together with video.",
    ),
    **dict.fromkeys(
        ("Wan22VaceModularPipeline", "WanAnimate2ModularPipeline", "WanAnimate2DistilledModularPipeline"),
        _MODULAR + ", and this one edits a source.",
    ),
}


def find_family(pipeline_class: str, denoiser_config: Mapping[str, Any] | None = None) -> Family:
    """The row for a pipeline class name.

    Args:
        pipeline_class: its name.
        denoiser_config: decides between several rows of a class; by default its first one is taken.

    Raises:
        ValueError: the class is unknown or refused, or no row is for this denoiser; the message has the reason.
    """
    rows = [family for family in FAMILIES if pipeline_class in family.pipelines]
    for family in rows:
        if denoiser_config is None or all(denoiser_config.get(k) == v for k, v in family.denoiser_config.items()):
            return family
    if rows:
        known = " or ".join(str(family.denoiser_config) for family in rows)
        raise ValueError(f"{pipeline_class} is supported with a denoiser that is configured with {known}.")
    if pipeline_class in UNSUPPORTED:
        raise ValueError(f"{pipeline_class} cannot be trained: {UNSUPPORTED[pipeline_class]}")
    supported = ", ".join(sorted(name for family in FAMILIES for name in family.pipelines))
    raise ValueError(
        f"{pipeline_class} is not a supported video pipeline. Supported: {supported}. docs/models.md says how to add one."
    )
