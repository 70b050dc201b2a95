"""What people bring: not needed to understand the model.

checkpoint.py   a folder: found, checked by its headers, read into memory of our own
tokenizer.py    its tokenizer
chat.py         its chat template, or Granite's
terminal.py     a quiet start, prompts in, text out, one line of error
"""
