"""The layouts in which denoisers take latents; canonical is (B, C, f, h, w)."""

from torch import Tensor


CHANNEL_DIM = {"BCFHW": 1, "BFCHW": 2, "BFHWC": 4, "packed": 2}


def pack(latents: Tensor, layout: str, patch: tuple[int, int]) -> Tensor:
    """Canonical -> `layout`; `patch` is the (temporal, spatial) patch of "packed"."""
    if layout == "BFCHW":
        return latents.permute(0, 2, 1, 3, 4)
    if layout == "BFHWC":
        return latents.permute(0, 2, 3, 4, 1)
    if layout == "packed":  # tokens in (f, h, w) order, each (C, pt, p, p)
        b, c, f, h, w = latents.shape
        pt, p = patch
        x = latents.reshape(b, c, f // pt, pt, h // p, p, w // p, p)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)
    return latents


def unpack(hidden: Tensor, layout: str, patch: tuple[int, int], latent_shape: tuple[int, int, int, int]) -> Tensor:
    """`layout` -> canonical."""
    if layout == "BFCHW":
        return hidden.permute(0, 2, 1, 3, 4)
    if layout == "BFHWC":
        return hidden.permute(0, 4, 1, 2, 3)
    if layout == "packed":
        c, f, h, w = latent_shape
        pt, p = patch
        x = hidden.reshape(-1, f // pt, h // p, w // p, c, pt, p, p)
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(-1, c, f, h, w)
    return hidden


def token_mask(mask: Tensor, patch: tuple[int, int], latent_shape: tuple[int, int, int, int]) -> Tensor:
    """A mask per token or per frame, (1, tokens) or (1, f) -> (1, 1, f, h, w)."""
    _, f, h, w = latent_shape
    if mask[0].numel() == f:
        return mask.reshape(1, 1, f, 1, 1).expand(1, 1, f, h, w).contiguous()
    pt, p = patch
    mask = mask.reshape(1, 1, f // pt, h // p, w // p)
    return mask.repeat_interleave(pt, 2).repeat_interleave(p, 3).repeat_interleave(p, 4)
