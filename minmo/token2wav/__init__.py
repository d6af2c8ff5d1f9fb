"""Speech tokens to sound: flow matching (tokens -> mel) and a vocoder (mel -> 24 kHz)."""
