"""Published methods as rows of values for [`VideoGRPOConfig`]. What a row leaves out has the value of `DEFAULTS`.

Values are the papers' where they state one; the number of generations, sizes and batch are the user's. A row can be
overridden field by field.
"""

# the paper's stage 2, https://huggingface.co/papers/2604.25427 (the same group's Flash-GRPO, 2605.15980): every prompt
# takes its one stochastic step at one step of the first half, and the loss is divided by that step's gradient scale
DEFAULTS = {
    "learning_rate": 1e-4,
    "weight_decay": 1e-4,
    "ema_decay": 0.9,
    "ema_update_steps": 8,
    "num_generations": 8,
    "num_inference_steps": 20,
    "guidance_scale": 4.5,
    "loss_type": "clipped",
    "epsilon": 1e-3,
    "beta": 0.0,
    "advantage_clip": 5.0,
    "scale_rewards": "batch",
    "baseline": "prompt",
    "transition": "wan-linear",
    "noise_level": 0.7,
    "sde_schedule": "single",
    "sde_range": [0.0, 0.5],
    "sde_steps": 1,
    "train_fraction": 1.0,
    "shared_noise": False,
    "timestep_weighting": "tgr",
    "ratio_normalization": False,
    "tail_ratio": 1.0,
    "tail_solver": "euler",
    "num_train_sigmas": 1,
    "nft_beta": 1.0,
    "old_policy_decay": [0.001, 0.5],
    "old_policy_beta": 0.0,
    "awm_weighting": "uniform",
}

_FLOW_GRPO = {
    "transition": "flow-sde",
    "noise_level": 0.7,
    "sde_schedule": "all",
    "sde_range": [0.0, 1.0],
    "num_inference_steps": 10,
    "scale_rewards": "group",
    "timestep_weighting": "none",
    "epsilon": 1e-4,
    "learning_rate": 3e-4,
    "beta": 0.04,
}
_MIX_GRPO = {
    "transition": "flow-sde",
    "sde_schedule": "window",
    "window_mode": "sliding",
    "sde_steps": 4,
    "sde_range": [0.0, 1.0],
    "num_inference_steps": 25,
    "shared_noise": True,
    "scale_rewards": "group",
    "timestep_weighting": "none",
}

RECIPES = {
    "flash-grpo": {},
    # https://huggingface.co/papers/2505.05470
    "flow-grpo": _FLOW_GRPO,
    # the same, two stochastic steps behind a shared prefix
    "flow-grpo-fast": {
        **_FLOW_GRPO,
        "noise_level": 0.8,
        "sde_schedule": "window",
        "window_mode": "random",
        "sde_steps": 2,
        "sde_range": [0.0, 0.5],
        "shared_noise": True,
        "epsilon": 1e-5,
    },
    # https://huggingface.co/papers/2505.07818
    "dance-grpo": {
        "transition": "dance",
        "noise_level": 0.3,
        "sde_schedule": "all",
        "sde_range": [0.0, 1.0],
        "train_fraction": 0.6,
        "shared_noise": True,
        "scale_rewards": "group",
        "timestep_weighting": "none",
        "epsilon": 1e-4,
        "learning_rate": 1e-5,
    },
    # https://huggingface.co/papers/2507.21802
    "mix-grpo": _MIX_GRPO,
    "mix-grpo-flash": {**_MIX_GRPO, "tail_ratio": 0.4, "tail_solver": "dpm-solver++"},
    # https://huggingface.co/papers/2510.22200
    "longcat": {
        "transition": "flow-sde-truncated",
        "noise_level": 1.0,
        "shared_noise": True,
        "scale_rewards": "max_group",
        "timestep_weighting": "longcat",
    },
    # https://huggingface.co/papers/2509.05952
    "cps": {**_FLOW_GRPO, "transition": "cps", "beta": 0.0},
    # https://huggingface.co/papers/2508.04324: 4 latents x 6 branches at each chosen step, credit inside a latent
    "tempflow-grpo": {
        "transition": "flow-sde",
        "sde_schedule": "branch",
        "num_generations": 24,
        "num_latents": 4,
        "num_inference_steps": 10,
        "baseline": "latent",
        "scale_rewards": "group",
        "timestep_weighting": "tempflow",
    },
    # https://huggingface.co/papers/2510.01982: 4 branches x tails at granularities 1, 2, 3
    "g2rpo": {
        "transition": "flow-sde",
        "sde_schedule": "granular",
        "num_generations": 12,
        "granularities": [1, 2, 3],
        "shared_noise": True,
        "scale_rewards": "group",
        "timestep_weighting": "none",
    },
    # https://huggingface.co/papers/2601.00423
    "e-grpo": {
        "transition": "flow-sde",
        "sde_schedule": "merged",
        "merge_threshold": 0.2,
        "shared_noise": True,
        "scale_rewards": "group",
        "timestep_weighting": "none",
    },
    # https://huggingface.co/papers/2509.06040: 16 leaves
    "branch-grpo": {
        "transition": "flow-sde",
        "sde_schedule": "tree",
        "tree_splits": [0, 3, 6, 9],
        "num_generations": 16,
        "num_inference_steps": 16,
        "shared_noise": True,
        "scale_rewards": "group",
        "timestep_weighting": "none",
    },
    # https://huggingface.co/papers/2510.22319
    "grpo-guard": {**_FLOW_GRPO, "timestep_weighting": "guard", "ratio_normalization": True, "beta": 0.0},
    # https://huggingface.co/papers/2509.16117
    "diffusion-nft": {
        "loss_type": "nft",
        "sde_schedule": "none",
        "num_inference_steps": 10,
        "guidance_scale": 1.0,
        "learning_rate": 3e-4,
        "beta": 1e-4,
        "scale_rewards": "group",
        "timestep_weighting": "none",
    },
    # https://huggingface.co/papers/2509.25050
    "awm": {
        "loss_type": "awm",
        "sde_schedule": "none",
        "num_inference_steps": 10,
        "guidance_scale": 1.0,
        "num_train_sigmas": 6,
        "beta": 1e-3,
        "old_policy_beta": 1.0,
        "old_policy_decay": [0.3, 0.3],
        "scale_rewards": "group",
        "timestep_weighting": "none",
    },
    # https://huggingface.co/papers/2606.11025: no clipping, an exact divergence bound instead
    "flow-dppo": {**_FLOW_GRPO, "loss_type": "dppo", "epsilon": 1e-3, "beta": 0.0},
}
