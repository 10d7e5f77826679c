"""Write the tables of docs/scaling.md: bytes counted here against the formulas, and the model of many GPUs.

    torchrun --nproc-per-node=4 bench/scaling.py --count docs/scaling.md     # count, on CPUs; also with 2 processes
    python bench/scaling.py docs/scaling.md                                  # plan 8, 16 and 64 GPUs; takes minutes

Without a page the tables are printed. Counts are of steps of the sprites world; they need DeepSpeed.
"""
