"""Data: what MinMo is trained and tested on, generated from rules."""
