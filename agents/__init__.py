"""Reinforcement learning in tinygrad over [T, B] arrays and an environment protocol. Knows no compiler."""
