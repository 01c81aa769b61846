"""onnxruntime-genai's own generation loop, timed as its end-to-end benchmark does: `python genai_loop.py JOB`.

The prompt's time is that of append_tokens; a token's is that of one generate_next_token, which runs the graph and
chooses. The first choice needs no run and is left out. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import numpy as np
import onnxruntime_genai as genai


def main(job: dict[str, int | str]) -> dict[str, float]:
    """Medians over the repeats, after one that does not count."""
    config = genai.Config(str(job["package"]))
    options = {"intra_op_num_threads": job["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)
    prompt, decoded, repeats = int(job["prompt_tokens"]), int(job["decode_tokens"]), int(job["repeats"])
    ids = np.full((1, prompt), 100, np.int32)  # which tokens they are costs no time
    prefill, decode = [], []
    for _ in range(repeats + 1):
        parameters = genai.GeneratorParams(model)
        length = prompt + decoded + 1
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=1)
        generator = genai.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(ids)
        prefill.append(prompt / (time.perf_counter() - start))
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(decoded):
            generator.generate_next_token()
        decode.append(decoded / (time.perf_counter() - start))
    return {"prefill_tps": median(prefill[1:]), "decode_tps": median(decode[1:])}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
