"""Rows of text: reading, cleaning, chat templates, token ids and loss masks."""
