"""Published distillation methods as rows of values for [`VideoDistillConfig`]. What a row leaves out has `DEFAULTS`' value.

Learning rates: the first is for LoRA, the second for all weights (papers train all weights; LoRA rates are the published ones
where there are any, else 50 times as high, which is what LightX2V's Self-Forcing LoRA uses). Guidance scales are in the
standard form, one more than in the configurations of CausVid, Self-Forcing, LongLive and rCM.
"""

# the common ground of DMD2 for video and Self-Forcing, https://huggingface.co/papers/2506.08009
DEFAULTS = {
    "learning_rate": (1e-4, 2e-6),
    "fake_learning_rate": (2e-5, 4e-7),
    "adam_beta1": 0.0,
    "adam_beta2": 0.999,
    "weight_decay": 0.01,
    "max_grad_norm": 10.0,
    "ema_decay": 0.99,
    "loss_type": "dmd",
    "rollout": "backward_simulation",
    "denoising_steps": [1000, 750, 500, 250],
    "shift": "auto",
    "sampler": "renoise",
    "teacher_guidance_scale": 4.0,
    "score_range": [0.02, 0.98],
    "fake_updates_per_student": 5,
    "critic_schedule": "exclusive",
    "causal": None,
    "frames_per_block": None,
    "window": None,
    "sink": 0,
    "context_noise": 0.0,
    "teacher_steps": 48,
    "consistency": "discrete",
    "consistency_target": "student",
    "consistency_weighting": "mse",
    "time_distribution": [0.7, 1.6],
    "tangent": "finite_difference",
    "tangent_warmup_steps": 1000,
    "dmd_weight": 0.0,
    "stream_num_frames": None,
    "stream_overlap": 3,
    "prompt_switch": False,
}

RECIPES = {
    # https://huggingface.co/papers/2405.14867; guidance as FastVideo uses it for Wan (8 for SDXL in the paper)
    "dmd2": {
        "learning_rate": (5e-5, 5e-7),
        "fake_learning_rate": (5e-5, 5e-7),
        "adam_beta1": 0.9,
        "ema_decay": None,
        "teacher_guidance_scale": 4.5,
    },
    # https://huggingface.co/papers/2412.07772: a causal student on noised clips, every block at its own noise level
    "causvid": {
        "learning_rate": (1e-4, 2e-6),
        "fake_learning_rate": (1e-4, 2e-6),
        "adam_beta1": 0.9,
        "ema_decay": None,
        "rollout": "data",
        # 1000, 757, 522 once shifted, as its configuration lists them; its scores are compared at shifted levels, too
        "denoising_steps": [1000, 280.267, 120.11],
        "shift": 8.0,
        "teacher_guidance_scale": 4.5,
        "causal": "diffusion_forcing",
        "frames_per_block": 3,
    },
    # https://huggingface.co/papers/2506.08009
    "self-forcing": {"rollout": "self_forcing", "shift": 5.0, "frames_per_block": 3},
    # the causal consistency initialisation of Causal Forcing (CF++): the teacher is the causal model itself, given clean
    # context; "self-forcing" comes after it. github.com/thu-ml/Causal-Forcing
    "causal-forcing": {
        "loss_type": "consistency",
        "rollout": "data",
        "shift": 5.0,
        "consistency_target": "ema",
        "teacher_guidance_scale": 3.0,
        "causal": "teacher_forcing",
        "frames_per_block": 3,
    },
    # https://huggingface.co/papers/2509.22622: streaming long tuning with re-cached keys and values on prompt switches
    "longlive": {
        "learning_rate": (1e-5, 2e-6),
        "fake_learning_rate": (2e-6, 4e-7),
        "rollout": "self_forcing",
        "shift": 5.0,
        "frames_per_block": 3,
        "window": 12,
        "sink": 3,
        "stream_num_frames": 240,
        "prompt_switch": True,
        "ema_decay": None,
    },
    # https://huggingface.co/papers/2510.08431: continuous-time consistency and, after its warm-up, a DMD term on the student's
    # own samples. Every fifth step of its code is the student's. Left out: its power-function average, and its random steps
    "rcm": {
        "loss_type": "consistency",
        "rollout": "data",
        "shift": 5.0,
        "consistency": "continuous",
        "dmd_weight": 1.0,
        "fake_updates_per_student": 4,
        "teacher_guidance_scale": 6.0,  # its code adds the guidance to the conditional branch: 5.0 there
    },
    # https://huggingface.co/papers/2310.04378 on the flow, https://huggingface.co/papers/2311.05556 (LCM-LoRA)
    "lcm": {
        "learning_rate": (1e-4, 8e-6),
        "adam_beta1": 0.9,
        "ema_decay": 0.95,
        "loss_type": "consistency",
        "rollout": "data",
        "consistency_target": "ema",
        "consistency_weighting": "huber",
        "teacher_steps": 50,
        "teacher_guidance_scale": 7.5,
    },
}
