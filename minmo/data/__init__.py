"""Data: what MinMo is trained and tested on: its schemas, its manifests, dialogues from a simulator, number words."""
