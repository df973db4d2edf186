"""Which paper a recipe is of: name and arXiv id."""

GRPO = {
    "flash-grpo": ("Flash-GRPO", "2605.15980"),
    "flow-grpo": ("Flow-GRPO", "2505.05470"),
    "flow-grpo-fast": ("Flow-GRPO, its fast variant", "2505.05470"),
    "dance-grpo": ("DanceGRPO", "2505.07818"),
    "mix-grpo": ("MixGRPO", "2507.21802"),
    "mix-grpo-flash": ("MixGRPO-Flash", "2507.21802"),
    "longcat": ("LongCat-Video", "2510.22200"),
    "cps": ("Coefficients-Preserving Sampling", "2509.05952"),
    "tempflow-grpo": ("TempFlow-GRPO", "2508.04324"),
    "g2rpo": ("Granular-GRPO (G²RPO)", "2510.01982"),
    "e-grpo": ("E-GRPO", "2601.00423"),
    "branch-grpo": ("BranchGRPO", "2509.06040"),
    "grpo-guard": ("GRPO-Guard", "2510.22319"),
    "diffusion-nft": ("DiffusionNFT", "2509.16117"),
    "awm": ("Advantage Weighted Matching", "2509.25050"),
    "flow-dppo": ("Flow-DPPO", "2606.11025"),
}
DISTILL = {
    "dmd2": ("DMD2", "2405.14867"),
    "causvid": ("CausVid", "2412.07772"),
    "self-forcing": ("Self Forcing", "2506.08009"),
    "causal-forcing": ("Causal Forcing", "2602.02214"),
    "longlive": ("LongLive", "2509.22622"),
    "rcm": ("rCM", "2510.08431"),
    "lcm": ("Latent Consistency Models", "2310.04378"),
}
FLOW_MATCHING = ("flow matching", "2210.02747")
FRAMEWORK = ("A Systematic Post-Train Framework for Video Generation", "2604.25427")
