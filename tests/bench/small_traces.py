"""A few made-up lines in each format of trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:01.2224670,879,55
"""
SERVEGEN = """arrival_s,tenant,input_tokens,output_tokens
0.020,34,64,9
0.124,104,582,27
0.109,104,843,15
"""
VTC = """arrival_s,client,prompt_tokens,output_tokens
0.0000,13,13,199
0.2079,2,36,137
0.4419,0,456,0
"""
LENGTHS = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
3772,54,3826,69.85
2015,156,2171,12.91
"""
MOONCAKE = "".join(
    json.dumps({"timestamp": at, "input_length": length, "output_length": 20, "hash_ids": ids}) + "\n"
    for at, length, ids in ((0, 1300, [0, 1, 2]), (0, 1100, [0, 1, 7]), (3000, 600, [0, 9]))
)
ALL = {"azure": AZURE, "servegen": SERVEGEN, "vtc": VTC, "lengths": LENGTHS, "mooncake": MOONCAKE}


def write(folder: Path, name: str, zipped: bool = False) -> Path:
    path = folder / f"{name}.txt{'.gz' if zipped else ''}"
    if zipped:
        path.write_bytes(gzip.compress(ALL[name].encode()))
    else:
        path.write_text(ALL[name])
    return path
