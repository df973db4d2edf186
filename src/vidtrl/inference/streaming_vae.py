"""Decode a Wan video as its latents arrive: frame for frame what `vae.decode` returns for the whole clip."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from ..models.video_model import VideoModel


class StreamingDecoder:
    """
    The causal decoder of `AutoencoderKLWan`, which remembers the last two inputs of each convolution and nothing else.

    `vae.decode` walks over the latent frames in the same way but forgets what it remembers at the end of each call, so
    that a video decoded piece by piece through it has the wrong frames at every seam. Here the walk is ours, over the
    VAE's own modules, and the memory lives as long as the video. Tiling is not applied; one latent frame at a time is
    decoded in any case.

    Args:
        model ([`VideoModel`]): Its VAE must be `AutoencoderKLWan`.

    Raises:
        `ValueError`: Another VAE. Decoders that look at later frames (LTX) have no exact streaming form.

    Example:

    ```python
    >>> decoder = StreamingDecoder(model)
    >>> first, second = decoder(latents[:, :, :3]), decoder(latents[:, :, 3:])  # 9 and then 12 frames
    ```
    """

    def __init__(self, model: VideoModel):
        if not isinstance(model.pipe.vae, AutoencoderKLWan):
            raise ValueError(
                f"{type(model.pipe.vae).__name__} cannot decode a video block by block: only AutoencoderKLWan's decoder is "
                "causal. Use stream(..., output_type='latent'), or call the pipeline for the whole video."
            )
        self.model = model
        # one slot for each convolution, which are among the modules
        self._memory: list[Tensor | str | None] = [None] * sum(1 for _ in model.pipe.vae.decoder.modules())
        self._first = True

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> list[Tensor]:
        """
        Args:
            latents (`Tensor`): The next latent frames, canonical (B, C, f, h, w).

        Returns:
            `list[Tensor]`: B videos (F, C, H, W), float32 in [0, 1]: 4 frames for each latent frame, except for one
            frame for the very first.
        """
        vae = self.model.pipe.vae
        place = next(vae.parameters())
        z = vae.post_quant_conv(self.model.denormalize(latents).to(place.device, place.dtype))
        frames = []
        for frame in z.split(1, 2):
            frames.append(vae.decoder(frame, feat_cache=self._memory, feat_idx=[0], first_chunk=self._first))
            self._first = False
        pixels = torch.cat(frames, 2)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        pixels = pixels.float().transpose(1, 2)
        return list(((pixels.clamp(-1, 1) + 1) / 2).unbind())
