"""Per-token latency of the decoder and every other step of the engine: `minmo profile`, run by path.

python profiling/decoder_latency.py --preset nano
python profiling/decoder_latency.py --preset minmo-8b --part voice_lm --part llm --weights bf16 --output results/
"""

import sys

from minmo.cli import main

sys.argv = [sys.argv[0], "profile", *sys.argv[1:]]
main()
