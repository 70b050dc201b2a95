"""The same numbers sooner: not needed to understand the model.

cpu.py      on a CPU, in C: cpu.c (a token step), prompt.c (prompts), numbers.h
cuda.py     on a GPU
"""
