"""Tokenizers: text (byte-level BPE, ChatML) and speech (log-mel, encoder, finite scalar quantisation)."""
