"""What people bring: not needed to understand the model.

arguments.py    what callers bring: numbers and ids
checkpoint.py   a folder: found, checked by its headers, read into memory of our own
tokenizer.py    its tokenizer
bounds.py       what a tokenizer may ask for
chat.py         its chat template, or Granite's
template.py     the process that renders it
terminal.py     a quiet start, prompts in, text out, one line of error
"""
