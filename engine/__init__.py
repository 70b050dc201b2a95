"""What running for real takes and reading does not: to understand the model, nobody has to open it.

checkpoint.py   a stranger's folder: found, compared, read, owned
tokenizer.py    its tokenizer
chat.py         its chat template, or Granite's
terminal.py     a quiet start, prompts in, text out, one line of error
cpu.py          the same numbers sooner on a CPU; one token a row in C: cpu.c, numbers.h
prompt.py       prompts in C: prompt.c
cuda.py         the same numbers sooner on a GPU
"""
