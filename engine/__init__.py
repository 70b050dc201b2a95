"""What running for real takes and reading does not: to understand the model, nobody has to open it.

checkpoint.py   a stranger's folder: found, compared, read, owned
tokenizer.py    its tokenizer, and Granite's chat format
terminal.py     a quiet start, prompts in, text out, one line of error
cpu.py          the same numbers sooner on a CPU, single tokens in C
prompt.py       prompts in C
cuda.py         the same numbers sooner on a GPU
"""
